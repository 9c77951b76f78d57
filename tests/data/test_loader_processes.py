"""The same batches, byte by byte, from real processes on a real S3 server: one rank, two, killed and resumed as one."""

import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
from latent_shards import FINGERPRINT, write_latents
from loader_process import GLOBAL_BATCH, run

from pipeline.storage import open_store

STEPS = 30
BUCKETS = ((4, 4), (4, 8), (8, 4))
MARK = FINGERPRINT.model_copy(update={"buckets": BUCKETS, "flip": True})
FRESH = {"step": 0, "skipped": []}


@pytest.fixture(scope="module")
def data_sets(s3_server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets on S3: several picture sizes, captions, mirrored latents; shards with few samples or none."""
    found = []
    for name, sizes in {
        "one": [{BUCKETS[0]: (21, 2), BUCKETS[1]: (5, 0)}, {}, {BUCKETS[0]: (1, 0), BUCKETS[2]: (19, 3)}],
        "two": [{BUCKETS[0]: (33, 1)}, {BUCKETS[1]: (12, 0), BUCKETS[2]: (7, 2)}],
    }.items():
        folder = tmp_path_factory.mktemp(name)
        write_latents(folder, sizes, captions=2, fingerprint=MARK, prefix=name)
        store = open_store(f"{s3_server.url}/loader-{name}")
        for path in folder.iterdir():
            store.upload(path, path.name)
        found.append(f"{s3_server.url}/loader-{name}/manifest.json")
    return found


class Ranks:
    """Processes that note what they are given."""

    def __init__(self, urls: list[str], folder: Path, world: int, mixing: str, workers: int) -> None:
        self.notes = [folder / f"{world}-{rank}.jsonl" for rank in range(world)]
        self._urls, self._world, self._mixing, self._workers = urls, world, mixing, workers

    def start(self, state: dict[str, Any], stop: int) -> list[BaseProcess]:
        started: list[BaseProcess] = []
        for rank, notes in enumerate(self.notes):
            arguments = (self._urls, rank, self._world, state, stop, self._workers, self._mixing, notes)
            started.append(forked.start(run, *arguments))
        return started

    def finish(self, state: dict[str, Any], stop: int) -> None:
        for process in self.start(state, stop):
            process.join(60)
            assert process.exitcode == 0

    def read(self) -> list[list[dict[str, Any]]]:
        """The lines of each rank that are whole."""
        texts = [notes.read_text().splitlines(keepends=True) if notes.exists() else [] for notes in self.notes]
        return [[json.loads(line) for line in lines if line.endswith("\n")] for lines in texts]


def batches(ranks: list[list[dict[str, Any]]], first: int, stop: int) -> list[list[dict[str, Any]]]:
    """Global batches of the steps [first, stop), from all ranks' notes, by place."""
    samples = [sample for lines in ranks for line in lines for sample in line["samples"]]
    found = [
        sorted((s for s in samples if s["step"] == step), key=lambda s: s["position"]) for step in range(first, stop)
    ]
    assert all([s["position"] for s in batch] == list(range(GLOBAL_BATCH)) for batch in found)
    return found


@pytest.mark.parametrize("mixing", ["steps", "batches"])
def test_one_rank_two_ranks_and_two_killed_and_gone_on_with_as_one(data_sets, tmp_path: Path, mixing: str) -> None:
    one = Ranks(data_sets, tmp_path, 1, mixing, workers=0)
    one.finish(FRESH, STEPS)
    expected = batches(one.read(), 0, STEPS)
    assert len({json.dumps(batch) for batch in expected}) == STEPS
    assert {tuple(sample["bucket"]) for batch in expected for sample in batch} == set(BUCKETS)
    assert {sample["key"][:3] for batch in expected for sample in batch} == {"one", "two"}

    (tmp_path / "two").mkdir()
    two = Ranks(data_sets, tmp_path / "two", 2, mixing, workers=2)
    two.finish(FRESH, STEPS)
    assert batches(two.read(), 0, STEPS) == expected

    (tmp_path / "killed").mkdir()
    killed = Ranks(data_sets, tmp_path / "killed", 2, mixing, workers=3)
    processes = killed.start(FRESH, 10**6)
    deadline = time.monotonic() + 60
    while min(map(len, killed.read())) < 7:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    # a checkpoint is of a step that all ranks had done
    states = [line["state"] for line in min(killed.read(), key=len)]
    assert batches(killed.read(), 0, states[-1]["step"])[:STEPS] == expected[: states[-1]["step"]]
    state = states[min(6, len(states) - 1)]
    (tmp_path / "again").mkdir()
    again = Ranks(data_sets, tmp_path / "again", 1, mixing, workers=1)
    again.finish(state, STEPS)
    assert batches(again.read(), state["step"], STEPS) == expected[state["step"] :]
