"""`lathe bench checkpoint`, as small as it goes."""

from __future__ import annotations

import mmap
import socket
import time

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.memory import MemoryPeak
from pipeline.operate.bench.checkpoint.job import SIZES, CheckpointBench, bench_checkpoint, sized
from pipeline.operate.bench.checkpoint.page import page, summary

TINY = CheckpointBench(widths=(32,), side=4, batch=2, steps=2, rounds=2, pairs=3)


@pytest.fixture
def world_of_one(monkeypatch):
    """The variables that such a start sets, and its threads, are as before afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.ranks
def test_every_figure_is_there_and_on_the_page(world_of_one, tmp_path):
    said: list[str] = []
    result = bench_checkpoint(TINY, str(tmp_path / "s3"), said.append)
    assert result["state_bytes"] == 16 * result["parameters"]
    assert 0 < result["file_bytes"] - result["state_bytes"] < 100_000
    assert len(result["pairs"]) == 3
    for store in ("folder", "s3"):
        one = result[store]
        assert len(result["rounds"][store]) == 2
        assert all(one[name] > 0 for name in ("step_seconds", "slow_down", "save_seconds", "mb_per_second"))
    assert result["stall_over_copy"] > 0
    assert f"stall_over_copy: {result['stall_over_copy']:.3f}, to be at most 1.2: " in summary(result)
    told = page(result, "lathe bench checkpoint --size small")
    assert "| s3 |" in told
    assert "lathe bench checkpoint --size small" in told
    assert len(said) == 4


def test_sizes():
    assert sized("small", None) == SIZES["small"]
    assert sized("large", 2).rounds == 2
    with pytest.raises(ConfigError, match="there is no such size"):
        sized("huge", None)


def test_memory_that_is_held_for_a_while_is_seen():
    with MemoryPeak(0.01, alone=True) as before:
        wait_until(lambda: before.bytes > 0)
    with MemoryPeak(0.01, alone=True) as during, mmap.mmap(-1, 120_000_000) as held:  # of the kernel, not of malloc
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        wait_until(lambda: during.bytes >= before.bytes + 100_000_000)


def wait_until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
