"""Which latents a run is trained on, as its checkpoints tell it: `latents.json`, and every manifest.

Legend: C latent channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.datasets import DataSets
from pipeline.data.manifest import Manifest, canonical, parse_manifest
from pipeline.data.order import VERSION
from pipeline.train.checkpoint import Checkpoint

LATENTS = "latents.json"


@dataclass(frozen=True)
class TrainedOn:
    """The data sets of a run."""

    manifests: tuple[Manifest, ...]
    mean: tuple[float, ...]  # [C], by which the latents were whitened
    std: tuple[float, ...]  # [C]
    order: str  # `DataSets.identity`
    order_version: int


def files(datasets: DataSets, mean: Sequence[float], std: Sequence[float]) -> dict[str, bytes]:
    """What a checkpoint holds of them, by file name; `mean` and `std` [C] are what the latents were whitened by."""
    names = ["manifest.json", *(f"manifest-{number}.json" for number in range(1, len(datasets.manifests)))]
    about = {"manifests": names, "mean": mean, "std": std, "order": datasets.identity, "order_version": VERSION}
    manifests = {name: m.to_bytes() for name, m in zip(names, datasets.manifests, strict=True)}
    return {LATENTS: canonical(about), **manifests}


def trained_on(checkpoint: Checkpoint) -> TrainedOn:
    """The data sets of a checkpoint. Raises DamagedError, and DataError where a manifest is of another format."""
    about = json.loads(checkpoint.read(LATENTS))
    where = f"{checkpoint.store.url}/{checkpoint.name}"
    manifests = tuple(parse_manifest(checkpoint.read(name), f"{where}/{name}") for name in about["manifests"])
    mean, std = tuple(about["mean"]), tuple(about["std"])
    return TrainedOn(manifests, mean, std, about["order"], about["order_version"])
