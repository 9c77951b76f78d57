"""`lathe encode` as an array on a real SLURM: tasks that are killed, stopped and requeued make the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import numpy as np
import psutil
import pytest
import small_models
from monitoring import wait_until
from slurm import Slurm

from pipeline import runfile
from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.tar import TarBuilder
from pipeline.encode.job import encode
from pipeline.storage import Store, open_store

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parents[2] / "launchers/slurm_encode.sh"
SIDE, PER_SHARD, TASKS = 96, 100, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image shards of noise, and an autoencoder whose latents are large."""
    place = tmp_path_factory.mktemp("array")
    (place / "images").mkdir()
    for shard in range(2 * TASKS):
        tar, rng = TarBuilder(), np.random.default_rng(shard)
        for i in range(PER_SHARD):
            tar.add(f"{shard:03d}{i:03d}.png", images.png(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)))
            tar.add(f"{shard:03d}{i:03d}.txt", f"picture {i}".encode())
        (place / "images" / f"{shard:02d}.tar").write_bytes(tar.finish())
    small_models.autoencoder_of_large_latents().save_pretrained(place / "vae")
    return place


def settings(place: Path, output: str) -> EncodeConfig:
    return EncodeConfig(
        images={"shards": str(place / "images"), "resolution": SIDE},
        autoencoder=str(place / "vae"),
        output=output,
        batch_size=8,
        threads=1,
        metrics={"prometheus": False},
    )


def content(address: str) -> dict[str, bytes]:
    store: Store = open_store(address)
    return {entry.name: store.read(entry.name) for entry in store.list()}


class Array:
    """Tasks of one array, two at a time."""

    def __init__(self, cluster: Slurm, config: EncodeConfig, folder: Path, tasks: int) -> None:
        self.cluster, self.folder, self.tasks = cluster, folder, range(tasks)
        file = folder / "it's a run; $(false).yaml"
        file.write_text(runfile.dump(config))
        self.number = cluster.submit(
            SCRIPT,
            str(file),
            options=[f"--array=0-{tasks - 1}%2", f"--output={folder}/said-%a", f"--chdir={folder}", "--exclusive"],
            PYTHON=sys.executable,
            PYTHONPATH=str(SCRIPT.parents[1]),
        )

    def worker(self, task: int) -> psutil.Process:
        """Of a task, as soon as there is one."""

        def found() -> list[psutil.Process]:
            return [one for one in self.cluster.processes() if is_worker(one, task)]

        return wait_until(found, 120, f"a worker of task {task}")[0]

    def worker_at_work(self, task: int) -> psutil.Process:
        """Of a task that is started for the first time, once it has loaded its models."""
        found = self.worker(task)
        wait_until(lambda: "to encode of" in self.said(task), 120, f"task {task} to encode")
        return found

    def state(self, task: int) -> dict[str, str]:
        return self.cluster.job(f"{self.number}_{task}")

    def said(self, task: int) -> str:
        file = self.folder / f"said-{task}"
        return file.read_text() if file.exists() else ""

    def finish(self) -> None:
        for task in self.tasks:
            state = self.cluster.wait_for(f"{self.number}_{task}")["JobState"]
            assert state == "COMPLETED", self.said(task)


def is_worker(process: psutil.Process, task: int) -> bool:
    try:
        is_one = process.cmdline()[1:4] == ["-m", "pipeline", "encode"]
        return is_one and process.environ().get("SLURM_ARRAY_TASK_ID") == str(task)
    except psutil.Error:  # it has ended
        return False


@pytest.mark.long
def test_an_array_of_eight_with_two_killed_tasks_makes_the_bytes_of_one_worker(
    slurm: Slurm, place: Path, tmp_path: Path
) -> None:
    alone = forked.start(encode, settings(place, str(tmp_path / "alone")))
    alone.join(300)
    assert alone.exitcode == 0
    array = Array(slurm, settings(place, str(tmp_path / "array")), tmp_path, TASKS)
    array.worker_at_work(1).kill()
    slurm.end_pause(f"{array.number}_1", 1)
    array.worker_at_work(3)
    slurm.run("scontrol", "requeue", f"{array.number}_3")
    array.worker_at_work(6)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array.number}_6")
    last = array.worker_at_work(7)  # of the task whose job id is that of the whole array
    slurm.run("scancel", "--batch", "--signal=TERM", f"{array.number}_7")
    last.wait(30)
    array.finish()
    assert [int(array.state(task)["Restarts"]) for task in array.tasks] == [0, 1, 0, 1, 0, 0, 1, 1]
    assert content(str(tmp_path / "array")) == content(str(tmp_path / "alone"))


@pytest.mark.long
def test_a_task_that_is_killed_at_each_start_is_given_up(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    array = Array(slurm, settings(place, str(tmp_path / "array")), tmp_path, 1)
    for start in range(4):
        if start:
            assert slurm.end_pause(f"{array.number}_0", start) > 5 * 2 ** (start - 1) - 1
        slurm.wait_for_start(f"{array.number}_0", start)
        array.worker(0).kill()
    found = slurm.wait_for(f"{array.number}_0")
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "3", "137:0")
