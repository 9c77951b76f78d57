"""Memory comes back when its last reader is gone, and never before."""

import gc
import threading

import numpy as np
import torch

from pipeline.data.buffers import BufferPool

SHAPE = (64, 8, 32, 32)


def address(array) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nobody_refers_to_it() -> None:
    pool = BufferPool()
    first = pool.empty(SHAPE, np.float16)
    where = address(first)
    assert (first.shape, first.dtype, first.flags.writeable, first.flags.c_contiguous) == (
        SHAPE,
        np.float16,
        True,
        True,
    )
    second = pool.empty(SHAPE, np.float16)
    assert address(second) != where
    del first
    third = pool.empty(SHAPE, np.float16)
    assert address(third) == where
    assert address(pool.empty((32, *SHAPE[1:]), np.float16)) not in (where, address(second))


def test_views_and_tensors_keep_it() -> None:
    pool = BufferPool()
    for derive in (
        lambda a: a[3:5],
        lambda a: a.reshape(-1).view(np.uint8),
        lambda a: a.reshape(-1).view(np.uint8).data[100:200],
        torch.from_numpy,
        lambda a: torch.from_numpy(a)[1].mT,
        lambda a: torch.from_numpy(a).view(torch.int16).reshape(-1)[7:9].detach(),
        lambda a: memoryview(a).cast("B")[5:6],
    ):
        array = pool.empty(SHAPE, np.float16)
        array[...] = 1
        where, kept = address(array), derive(array)
        del array
        gc.collect()
        others = [pool.empty(SHAPE, np.float16) for _ in range(4)]
        assert where not in map(address, others)
        for other in others:
            other[...] = 2
        del kept, others, other
        gc.collect()
        assert where in {address(free) for free in pool._free[array_bytes()]}


def array_bytes() -> int:
    return int(np.prod(SHAPE)) * 2


def test_what_is_small_is_not_kept_and_no_more_than_a_few() -> None:
    pool = BufferPool()
    assert pool.empty((3,), np.int32).base is None
    arrays = [pool.empty(SHAPE, np.float16) for _ in range(30)]
    del arrays
    gc.collect()
    assert sum(map(len, pool._free.values())) == 8


def test_many_threads_never_share_a_buffer() -> None:
    pool, wrong = BufferPool(), []

    def use(number: int) -> None:
        for _ in range(300):
            array = pool.empty((70_000,), np.uint8)
            array[...] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
