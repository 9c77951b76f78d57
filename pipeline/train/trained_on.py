"""Which latents a run is trained on, as its checkpoints tell it: `latents.json`, and every manifest.

Legend: C latent channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.data.datasets import DataSets
from pipeline.data.manifest import Manifest, canonical, parse_manifest
from pipeline.train.checkpoint import Checkpoint

LATENTS = "latents.json"


@dataclass(frozen=True)
class TrainedOn:
    """The data sets of a run."""

    manifests: tuple[Manifest, ...]
    mean: tuple[float, ...]  # [C], by which the latents were whitened
    std: tuple[float, ...]  # [C]
    order: str  # `DataSets.identity`


def files(datasets: DataSets) -> dict[str, bytes]:
    """What a checkpoint holds of them, by file name."""
    names = ["manifest.json", *(f"manifest-{number}.json" for number in range(1, len(datasets.manifests)))]
    about = {"manifests": names, "mean": datasets.mean, "std": datasets.std, "order": datasets.identity}
    manifests = {name: m.to_bytes() for name, m in zip(names, datasets.manifests, strict=True)}
    return {LATENTS: canonical(about), **manifests}


def trained_on(checkpoint: Checkpoint) -> TrainedOn:
    """The data sets of a checkpoint. Raises DamagedError, and DataError where a manifest is of another format."""
    about = json.loads(checkpoint.read(LATENTS))
    where = f"{checkpoint.store.url}/{checkpoint.name}"
    manifests = tuple(parse_manifest(checkpoint.read(name), f"{where}/{name}") for name in about["manifests"])
    return TrainedOn(manifests, tuple(about["mean"]), tuple(about["std"]), about["order"])
