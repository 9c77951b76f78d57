"""The latents that a run is trained on, and how they are read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Fraction, Positive, Section


class DataSetConfig(Section):
    """One of the data sets that a run is trained on."""

    manifest: str = Field(min_length=1, description="manifest.json of the latents")
    weight: Positive | None = Field(
        None,
        description="its share of the samples that are drawn, relative to the other data sets'; null = its number of"
        " samples. All have one, or none",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of its training samples that takes part, chosen by hash of key; a smaller share is part of"
        " a larger one",
    )
    keys: str | None = Field(
        None, description="text file, local or s3://, of the keys that take part, one a line; null = all"
    )

    @property
    def part_in_words(self) -> str:
        """What part of its training samples takes part, such as "30%" or "listed ones"; "" = all."""
        listed = "listed ones" if self.keys is not None else ""
        share = f"{100 * self.share:.4g}%" if self.share < 1 else ""
        return " of ".join(filter(None, (share, listed)))


class LoaderConfig(Section):
    """How latents are read. Of these fields only `mixing` and `flip` change what a batch holds."""

    mixing: Literal["steps", "batches"] = Field(
        "steps",
        description="several data sets: each step takes one of them, or each batch holds a constant part of each",
    )
    flip: bool = Field(True, description="take the mirrored latent for half of the draws, where the data set has one")
    workers: int = Field(
        1, ge=0, le=64, description="threads that assemble batches; 0 = everything in the caller's thread"
    )
    requests: int | None = Field(
        None,
        ge=1,
        le=256,
        description="reads under way at once; null = 16 where latents are on S3, 4 where all are local",
    )
    steps_ahead: Count = Field(32, description="steps whose blocks are asked for ahead of time")
    on_damage: Literal["fail", "skip"] = Field(
        "fail",
        description="what a block does that is damaged or cannot be read; skip gives its samples loss weight 0 from"
        " then on",
    )
    max_skip_rate: Fraction = Field(0.01, description="share of skipped samples past which the run fails all the same")
    cache: str | None = Field(
        None,
        min_length=1,
        description="local folder that keeps blocks for later epochs, shared by the ranks of a machine; null = none",
    )
    cache_gib: float = Field(100.0, gt=0, le=2**30, description="size that the cache may grow to")
