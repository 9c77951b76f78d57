"""Room on local disks, against what the run file says will be kept there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.config import EncodeConfig, TrainConfig
from pipeline.data.cache_folder import FOLDER, CacheFolder
from pipeline.errors import StorageError
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.latents import Training
from pipeline.operate.doctor.stores import is_remote
from pipeline.operate.numerals import in_units
from pipeline.storage import local_path, open_store
from pipeline.train import checkpoint

_FLOAT32 = 4
_SCARCE_BYTES, _LEAST_BYTES = 1 << 30, 64 << 20
_REMEDY = "free some room, give an output on another disk or on S3"


def train_checks(run: Training, *, whole: bool) -> list[Check]:
    """Of checkpoints where they are local (`whole`: the output is asked about once), and of the cache."""
    found = []
    if whole and not is_remote(run.config.output):
        found.append(Check("disk", lambda: for_checkpoints(run), ("output", "network")))
    if run.config.loader.cache:
        found.append(Check("cache", lambda: for_cache(run.config)))
    return found


def encode_checks(config: EncodeConfig) -> list[Check]:
    """Of latent shards, where they are local."""
    return [] if is_remote(config.output) else [Check("disk", lambda: for_latents(config.output), ("output",))]


def for_checkpoints(run: Training) -> str | Doubt:
    """Whether those that are kept fit, with the one that is written meanwhile. Raises StorageError: not even two."""
    config, network = run.config, run.network()
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in network.parameters() if not weight.requires_grad)
    of_one = _FLOAT32 * (trained * (3 + len(config.ema.averages)) + frozen)
    keeps = config.checkpoint
    lasting = config.steps // keeps.keep_every if keeps.keep_every else 0
    taken = config.steps // config.ema.snapshot_every if config.ema.snapshot_every else 0
    snapshots = min(taken, config.ema.snapshot_keep or taken)
    of_snapshots = snapshots * _FLOAT32 * (trained * len(config.ema.profiled) + frozen)
    needed = of_one * (keeps.keep + 1 + lasting) + of_snapshots
    free, held = _free(config.output), _checkpoint_bytes(config.output)
    said = f"{config.output}: {in_units(free)} free, and a checkpoint takes {in_units(of_one)}"
    if free < of_one or free + held < 2 * of_one:  # the old one stays until the new one is whole
        raise StorageError(f"{said}, two while one is written", _REMEDY)
    if free + held < needed:
        return Doubt(
            f"{said}; those that are kept take {in_units(needed)} by step {config.steps}",
            f"{_REMEDY}; or keep fewer (checkpoint.keep, checkpoint.keep_every, ema.snapshot_every)",
        )
    return f"{said}, all that are kept {in_units(needed)}"


def for_cache(config: TrainConfig) -> str | Doubt:
    """Whether the cache's folder can be used, and may grow as large as it should. Raises StorageError."""
    folder = Path(config.loader.cache or "").absolute()
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        is_new = not (folder / FOLDER).exists()
        opened = CacheFolder(folder)
    except OSError as error:
        raise StorageError(
            f"loader.cache={folder} cannot be used: {error.filename or folder}: {error.strerror}",
            "name another folder, mend its permissions, or free some disk space",
        ) from error
    held, _ = opened.entries()
    free, wanted = opened.free_bytes() + held, int(config.loader.cache_gib * 2**30)
    if is_new:
        shutil.rmtree(opened.root)
        for path in new:
            path.rmdir()
    if free < wanted:
        return Doubt(
            f"{folder}: room for {in_units(max(0, free))}, and loader.cache_gib={config.loader.cache_gib:g}",
            "set loader.cache_gib to what there is, or name another disk; what does not fit is read again each epoch",
        )
    return f"{folder}: room for {in_units(free)}, {in_units(held)} of it filled"


def for_latents(output: str) -> str | Doubt:
    """Whether there is any room to speak of: how much is needed, only the pictures tell. Raises StorageError."""
    free = _free(output)
    said = f"{output}: {in_units(free)} free"
    if free < _LEAST_BYTES:
        raise StorageError(said, _REMEDY)
    return Doubt(said, _REMEDY) if free < _SCARCE_BYTES else said


def _free(address: str) -> int:
    folder = local_path(address).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _checkpoint_bytes(output: str) -> int:
    """Of an earlier start, which later ones take the place of."""
    return sum(entry.size for entry in open_store(output).list("step-") if checkpoint.is_name(entry.name.split("/")[0]))
