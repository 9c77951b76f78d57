"""What the system grants a process: open files, temporary and shared memory; and the file that asks for a new start."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from pipeline.config import EncodeConfig, MetricsConfig, TrainConfig
from pipeline.errors import SetupError
from pipeline.metrics.trackers import Trackers
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.world import World
from pipeline.operate.numerals import in_units
from pipeline.runtime import requeue
from pipeline.storage import open_store, temporary_folder

_FILES, _FILES_PER_RANK = 256, 8  # packages, storage and data; connections with each other rank, in several groups
_SHARED_BYTES = 64 << 20  # NCCL's of each rank, and what a container has by default
_TEMPORARY_BYTES = 1 << 30  # models that are fetched from S3 pass through it


def checks(world: World) -> list[Check]:
    """What every job needs."""
    return [
        Check("open-files", lambda: open_files(world.ranks)),
        Check("temporary-folder", temporary),
    ]


def train_checks(config: TrainConfig, world: World, *, on_gpu: bool) -> list[Check]:
    """What a training needs beside."""
    return [
        Check("shared-memory", lambda: shared_memory(world.local_ranks, on_gpu=on_gpu)),
        Check("requeue-file", requeue_file),
        Check("trackers", lambda: trackers(config)),
    ]


def discovery_check(config: TrainConfig | EncodeConfig) -> list[Check]:
    """Of the folder by which Prometheus finds processes, where there is one."""
    return [Check("discovery", lambda: discovery(config.metrics))] if config.metrics.discovery else []


def open_files(ranks: int) -> str:
    """Whether a rank may have as many files and connections open as it will. Raises SetupError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES + _FILES_PER_RANK * ranks
    if soft != resource.RLIM_INFINITY and soft < needed:
        may = hard == resource.RLIM_INFINITY or hard >= needed
        raise SetupError(
            f"a process may have {soft} files open (RLIMIT_NOFILE), and of {ranks} ranks each wants {needed}",
            f"ulimit -n {max(needed, 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))}"
            if may
            else f"have the limit raised to {needed} (limits.conf, LimitNOFILE of slurmd, --ulimit of the container)",
        )
    return f"{'any number' if soft == resource.RLIM_INFINITY else soft} for each process; {needed} are wanted"


def temporary() -> str | Doubt:
    """Whether temporary files can be written, and large ones. Raises StorageError."""
    with temporary_folder("doctor") as folder:
        (folder / "probe").write_bytes(b"probe")
        free = shutil.disk_usage(folder).free
        where = folder.parent
    asked = os.environ.get("TMPDIR")
    if asked and where != Path(os.path.abspath(asked)):  # noqa: PTH100  as tempfile writes it, links and all
        return Doubt(
            f"TMPDIR={asked} cannot be written; {where} is used, {in_units(free)} free",
            "name a folder that is there, can be written and has room; or leave TMPDIR out",
        )
    if free < _TEMPORARY_BYTES:
        return Doubt(f"{where}: {in_units(free)} free", "set TMPDIR to a folder with more room")
    return f"{where}, {in_units(free)} free"


def shared_memory(local_ranks: int, *, on_gpu: bool, folder: Path = Path("/dev/shm")) -> str | Doubt:  # noqa: S108
    """Whether /dev/shm has room for what the ranks of a machine share by NCCL."""
    needed = _SHARED_BYTES * local_ranks if on_gpu and local_ranks > 1 else 0
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        if not needed:
            return "none, and none is needed"
        free = 0
    if free < needed:
        return Doubt(
            f"{folder}: {in_units(free)} free, and NCCL may want {in_units(needed)} for {local_ranks} ranks",
            "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory there)",
        )
    return f"{in_units(free)} free"


def requeue_file() -> str:
    """Whether a run that is stopped could ask for another start. Raises StorageError."""
    requeue.check()
    said = os.environ.get(requeue.VARIABLE, "")
    return f"{said} can be written" if said else f"none ({requeue.VARIABLE} is not set)"


def trackers(config: TrainConfig) -> str:
    """Whether what numbers are to be told to is installed. Raises SetupError, ConfigError."""
    chosen = config.metrics
    Trackers(chosen, open_store(config.output), {})
    named = [name for name, on in (("TensorBoard", chosen.tensorboard), ("Weights & Biases", chosen.wandb)) if on]
    return " and ".join(named) or "none"


def discovery(config: MetricsConfig) -> str | Doubt:
    """Whether the folder that Prometheus reads can be written; a run goes on without."""
    folder = Path(config.discovery or "")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Doubt(
            f"metrics.discovery={folder}: {error.strerror}; Prometheus would not be told of this run",
            "name a folder that can be written, or null",
        )
    return f"{folder} can be written"
