"""Before a run begins: whether it has all of its steps already, and its latents, which must fit the run file."""

from __future__ import annotations

import os

from pipeline.config import TrainConfig
from pipeline.console import ProgressLine
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.held_out import places
from pipeline.errors import LatheError
from pipeline.models.pretrained_unet import with_geometry
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train import checkpoint
from pipeline.train.compatibility import check_data
from pipeline.train.snapshots import is_missing
from pipeline.train.towers import check_named


def conclusion_seen(store: Store, config: TrainConfig) -> str:
    """What to say of a run that is finished already, as this rank sees it; empty where it is not."""
    finished = [found for found in checkpoint.find(store, warn=False) if found.step >= config.steps]
    if not finished or is_missing(store, config, finished[0].step):
        return ""
    return f"finished already: {store.url}/{finished[0].name} has all {config.steps} steps"


def is_finished(seen: str, store: Store, ranks: Process) -> bool:
    """Whether all ranks leave, by what rank 0 has seen; all of them call it, before one leaves.

    Args:
        seen: by this rank, see `conclusion_seen`.
        store: the run's output.
        ranks: this rank among the others.

    Raises:
        LatheError: others have seen a checkpoint of the last step, and rank 0 has not.
    """
    witness = ranks.first(bool(seen))
    if witness:
        raise LatheError(
            f"rank {witness} sees a checkpoint of the last step in {store.url}, and rank 0 does not",
            "give an output that all machines share; if another run has just ended there, start again",
        )
    return witness == 0


def open_data(config: TrainConfig) -> tuple[TrainConfig, DataSets]:
    """The run file with the UNet's whole geometry, and the latents, which fit together.

    Raises:
        ConfigError, DataError: they do not, or nothing is held out and yet to be validated with.
        StorageError: they cannot be read.
    """
    config = config.model_copy(update={"unet": with_geometry(config.unet)})
    with ProgressLine("data", "receipts", visible=os.environ.get("RANK", "0") == "0") as line:
        datasets = open_datasets(
            config.sources, global_batch=config.global_batch, mixing=config.loader.mixing, progress=line.update
        )
    for manifest in datasets.manifests:
        check_data(config, manifest)
        check_named(config, manifest)
    if config.validation.every is not None:
        places(datasets.manifests, config.validation.samples)  # raises where nothing is held out
    return config, datasets
