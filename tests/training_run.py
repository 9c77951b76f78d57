"""`lathe train` as a user starts it, for tests that kill, stop and resume it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from forked import Command

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.errors import StorageError
from pipeline.metrics import read_log
from pipeline.storage import open_store
from pipeline.train import checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 30
SMALL = {
    "unet": {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "norm_num_groups": 8,
    },
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "train_token_embedding": False},
    "engine": {"threads_per_rank": 1, "timeout_seconds": 60, "stall_seconds": 50},
    "optimizer": {"warmup_steps": 3},
    "steps": STEPS,
    "global_batch": 8,
    "shuffle_window": 4,
    "checkpoint": {"every": 4, "keep": 2},
    "log_every": 1,
}
_commands: list[subprocess.Popen[str] | Command] = []


class Run:
    """One output, and the commands started on it.

    Args:
        folder: of the run file.
        latents: address of the manifest.
        output: of the run; empty = a folder beside the run file.
    """

    def __init__(self, folder: Path, latents: str, output: str = "", **changes: Any) -> None:
        self.changes = changes
        self.latents, self.output = latents, Path(output) if output else folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "train.yaml"
        address = output or str(self.output)
        config = TrainConfig.model_validate({"manifest": latents, "output": address, **SMALL, **changes})
        self.file.write_text(runfile.dump(config))
        self.store = open_store(address)

    def launch(self, *overrides: str) -> subprocess.Popen[str]:
        """As a user does, on two ranks."""
        child = subprocess.Popen(
            ["bash", str(ROOT / "launchers/accelerate.sh"), str(self.file), *overrides],
            env={**_environment(), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.file.parent,
        )
        _commands.append(child)
        return child

    def start(self, *overrides: str, ranks: int = 2) -> Command:
        """The ranks alone, in processes that have imported everything before; no launcher tells their errors once."""
        number = len(list(self.file.parent.glob("*.said")))
        child = Command(
            ("train", str(self.file), *overrides),
            self.file.with_name(f"{number}.said"),
            ranks=ranks,
            environment=_environment(),
            folder=self.file.parent,
        )
        _commands.append(child)
        return child

    def wait_for_step(self, step: int, child: subprocess.Popen[str] | Command) -> None:
        started = _start_time(child.pid)
        deadline = time.monotonic() + 120
        while not self.has_logged(step, started):
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def has_logged(self, step: int, since: float) -> bool:
        """Whether there is a line of this step or a later one, from after a Unix time."""
        try:
            return any(line["step"] >= step and line["time"] > since for line in read_log(self.store))
        except StorageError:
            return False  # a run that starts anew deletes parts of the log while they are read

    def losses(self) -> list[float]:
        lines = [line for line in read_log(self.store) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def validations(self) -> dict[int, dict[str, Any]]:
        """Lines of the log by step; one each."""
        lines = [line for line in read_log(self.store) if "validation_loss" in line]
        found = {line["step"]: line for line in lines}
        assert len(found) == len(lines)
        return found

    def steps(self) -> list[int]:
        return [found.step for found in checkpoint.find(self.store)]

    def state(self, step: int) -> dict[str, bytes]:
        """Everything that is trained, as the ranks wrote it at a step: bytes by file."""
        prefix = f"{checkpoint.step_name(step)}/"
        names = [entry.name for entry in self.store.list(prefix) if entry.name.endswith(".safetensors")]
        return {name.removeprefix(prefix): self.store.read(name) for name in names}


def _start_time(pid: int) -> float:
    """When a process was started, on the clock of the log: the kernel's own time of its start is up to a second off."""
    since_boot = psutil.Process(pid).create_time() - psutil.boot_time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}


def ranks_of(child: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(child.pid).children(recursive=True) if is_rank(p)]


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:  # it has ended
        return False


def end_all() -> None:
    """Kill the commands that a failed test left behind; their ranks end with them."""
    while _commands:
        child = _commands.pop()
        if child.poll() is None:
            child.kill()
            child.wait()


def finish(child: subprocess.Popen[str] | Command, code: int = 0) -> str:
    said = child.communicate(timeout=180)[0]
    assert child.returncode == code, said
    return said


def copy_of(run: Run, folder: Path, step: int) -> Run:
    """A run as it was after a step."""
    copy = Run(folder, run.latents, **run.changes)
    shutil.copytree(run.output, copy.output)
    for later in copy.steps():
        if later > step:
            checkpoint.clear(copy.store, checkpoint.step_name(later))
    return copy


def same_in_the_end(run: Run, other: Run) -> None:
    """Weights, averages and counters of two finished runs, but for rounding."""
    last = [checkpoint.find(one.store)[0] for one in (run, other)]
    assert last[0].run()["counters"] == last[1].run()["counters"]
    for which in ("main", "raw"):
        ours, theirs = (checkpoint.load_weights(found.store, found.name, which) for found in last)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4
