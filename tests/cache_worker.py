"""What the processes of the cache tests run: a module of its own, so that a fresh process can import it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.data.cache import BlockCache, block_name

SPAWN = multiprocessing.get_context("spawn")


def name(number: int) -> str:
    return block_name("0" * 64, number, 1)


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def opened(folder: Path, limit: int) -> BlockCache:
    """A cache that keeps blocks already."""
    cache = BlockCache(folder, limit)
    cache.scan.join()
    return cache


def put_the_same(folder: Path, start: Any, size: int) -> None:
    cache = opened(folder, 1 << 30)
    start.wait()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cache.put(name(number // 4), content(number // 4, size)), range(80)))


def hammer(folder: Path, start: Any, limit: int, seed: int) -> None:
    """Sixteen threads get, put and drop; what they get must be whole."""
    cache = opened(folder, limit)
    start.wait()

    def work(thread: int) -> None:
        chance = random.Random(1000 * seed + thread)
        for _ in range(60):
            number = chance.randrange(200)
            size = 1000 + 100 * number
            data = cache.get(name(number), size)
            assert data is None or data == content(number, size)
            if data is None:
                cache.put(name(number), content(number, size))
            elif chance.random() < 0.1:
                cache.drop(name(number))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


def stop_in_the_middle(folder: Path, in_the_middle: Any, go_on: Any) -> None:
    """Write half a block, say so, and wait; without `go_on` be killed."""
    write = os.write

    def half(file: int, data: memoryview) -> int:
        if len(data) < 1000:
            return write(file, data)
        written = write(file, data[: len(data) // 2])
        in_the_middle.set()
        if go_on is None:
            os.kill(os.getpid(), signal.SIGKILL)
        go_on.wait()
        return written

    cache = opened(folder, 1 << 20)
    os.write = half
    cache.put(name(0), content(0, 1999))


def put_with_small_files_only(folder: Path, log: Path) -> None:
    logging.basicConfig(filename=log)
    cache = opened(folder, 1 << 30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for number in range(3):
        cache.put(name(number), content(number, 200_000))
    assert cache.get(name(0), 200_000) is None
