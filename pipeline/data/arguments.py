"""What LatentDataset is given: checked, and told in one line where it cannot be used."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

import torch
from pydantic import BeforeValidator, Field, ValidationError

from pipeline import runfile
from pipeline.config import DataSetConfig, LoaderConfig
from pipeline.config.base import Count, Section, Seed
from pipeline.data.datasets import DataSets
from pipeline.data.manifest import Split
from pipeline.data.prepare import Normalisation, Posterior
from pipeline.data.skips import WHOLE_SHARD
from pipeline.errors import ConfigError

Source = str | os.PathLike[str] | DataSetConfig | Mapping[str, Any]
_Values = TypeVar("_Values", bound=Section)
_Step = Annotated[int, Field(ge=0, lt=2**31)]


class Options(LoaderConfig):
    """All arguments but data sets and device; the defaults are LatentDataset's own."""

    global_batch: Count
    seed: Seed
    window: Count
    rank: int | None
    world_size: int | None
    start_step: _Step
    split: Split
    normalisation: Normalisation
    posterior: Posterior
    caption_dropout: float = Field(ge=0, le=1)
    dropout_by_tower: bool


def _whole(value: Any) -> int:
    """Integers of any kind, numpy's and torch's too; nothing that only looks like one."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError("Input should be a whole number")
    return operator.index(value)


_Whole = Annotated[int, BeforeValidator(_whole)]
_Place = Annotated[_Whole, Field(ge=0)]
_Skipped = tuple[_Place, _Place, Annotated[_Whole, Field(ge=WHOLE_SHARD)], _Place]


class State(Section):
    """Where to go on, and what is skipped."""

    step: Annotated[_Step, BeforeValidator(_whole)]
    order: _Whole | None = None
    skipped: list[_Skipped] = Field(default_factory=list)
    workers: Annotated[_Whole, Field(ge=1)] | None = None


def checked(kind: type[_Values], values: Mapping[str, Any]) -> _Values:
    """The values as the model has them. Raises ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise runfile.explain(kind, "LatentDataset", error, in_file=False) from error


def given_sources(manifests: Source | Sequence[Source]) -> list[DataSetConfig]:
    """One data set or several. Raises ConfigError."""
    if isinstance(manifests, str | os.PathLike | DataSetConfig | Mapping) or not isinstance(manifests, Iterable):
        return [_source(manifests)]
    return [_source(source) for source in manifests]


def given_device(device: torch.device | str) -> torch.device:
    """A device that can be used. Raises ConfigError."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()  # which a device without memory cannot
    except (RuntimeError, TypeError, AssertionError) as error:
        said = f": {str(error).splitlines()[0]}" if isinstance(device, str) else ""
        raise ConfigError(
            f"LatentDataset: device: {device!r} cannot be used{said}", 'give "cpu", "cuda" or accelerator.device'
        ) from error
    return found


def check_skipped(state: State, datasets: DataSets) -> None:
    """Raises ConfigError where what is skipped cannot be in the data sets, by what their manifests tell."""
    for place, (dataset, shard, block, samples) in enumerate(state.skipped):
        shards = datasets.manifests[dataset].shards if dataset < len(datasets.manifests) else None
        if shards is None:
            said = f"there is no data set {dataset}"
        elif shard >= len(shards):
            said = f"data set {dataset} has no shard {shard}"
        elif max(block + 1, samples) > (there := sum(shards[shard].samples(split) for split in get_args(Split))):
            said = f"{samples} samples of block {block}: shard {shard} of data set {dataset} has {there} samples"
        else:
            continue
        raise ConfigError(
            f"LatentDataset: skipped.{place}: {said}", "leave the entry out, or give the state as it was saved"
        )


def _source(source: Source) -> DataSetConfig:
    if isinstance(source, DataSetConfig):
        return source
    if isinstance(source, Mapping):
        return checked(DataSetConfig, source)
    if isinstance(source, str | os.PathLike):
        return checked(DataSetConfig, {"manifest": os.fspath(source)})
    raise ConfigError(
        f"LatentDataset: manifests: {source!r} is no address of a manifest.json",
        'give one, such as "s3://bucket/latents/manifest.json", or a list of them',
    )
