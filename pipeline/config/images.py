"""Which pictures are read, and at which sizes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.base import Byte, Count, Fraction, Section


class ShardsConfig(Section):
    """Which image shards are read, and what of each picture."""

    shards: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="image shards: a folder, a pattern such as s3://bucket/shards/*.tar, a .txt file that lists"
        " addresses, one a line, or several of these"
    )
    background: tuple[Byte, Byte, Byte] = Field((255, 255, 255), description="colour laid under transparent pixels")
    caption_field: str = Field("caption", description="field of KEY.json with the caption, where there is no KEY.txt")
    holdout: Fraction = Field(0.0, description="share of the pictures that is never trained on, chosen by hash of key")


class ImagesConfig(ShardsConfig):
    """Image shards, and the size that their pictures are brought to."""

    resolution: Count = Field(description="side of the square training pictures, in pixels")


class BucketsConfig(Section):
    """Aspect-ratio buckets: picture sizes of about resolution x resolution pixels, wide and tall ones too."""

    max_aspect: float = Field(2.0, ge=1, le=16, description="longest side over shortest side of the widest bucket")
    step: Count = Field(64, description="sides are multiples of so many pixels")


class FiltersConfig(Section):
    """Which pictures are wanted. What is left out is counted apart from rejects, and does not make the job fail."""

    min_side: Count | None = Field(None, description="pixels that the shorter side must have; null = any")
    max_aspect: float | None = Field(None, ge=1, description="longer over shorter side may be this at most; null = any")
    min_caption_chars: int = Field(0, ge=0, description="captions shorter than this are left out")
    max_caption_chars: Count | None = Field(None, description="captions longer than this are left out; null = any")
    where: str = Field(
        "",
        description="condition on the fields of KEY.json, for example: punsafe < 0.1 and pwatermark < 0.5"
        " (a picture without the field is left out)",
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> FiltersConfig:
        if self.max_caption_chars is not None and self.max_caption_chars < self.min_caption_chars:
            raise ValueError(
                f"max_caption_chars: {self.max_caption_chars} is less than min_caption_chars={self.min_caption_chars}"
            )
        return self


class EncodeImagesConfig(ShardsConfig):
    """Image shards, and the sizes that their pictures are encoded at."""

    resolution: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="side of a square picture, in pixels; with buckets, the root of a picture's pixels. Of several,"
        " such as [256, 512], each gets its own sub-folder of output and its own manifest"
    )
    buckets: BucketsConfig | None = Field(None, description="aspect-ratio buckets; null = squares, cut from the centre")
    max_upscale: float = Field(
        2.0, ge=1, le=64, description="pictures that would have to grow more than this are left out"
    )
    flip: bool = Field(False, description="store the mirrored picture's latent too")
    filters: FiltersConfig = FiltersConfig()
    shard_name_parts: Count = Field(
        1, description="last parts of a shard's address that name it; 2 tells a/00000.tar from b/00000.tar"
    )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions as a tuple, one or several."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @model_validator(mode="after")
    def _sizes_can_be(self) -> EncodeImagesConfig:
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"resolution: {list(self.resolutions)} names one twice")
        if self.buckets:
            for resolution in self.resolutions:
                if resolution < self.buckets.step:
                    raise ValueError(f"buckets.step: {self.buckets.step} is more than resolution={resolution}")
        return self
