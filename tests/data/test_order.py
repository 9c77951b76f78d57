"""The data order: each epoch holds each sample once, at any world size and from any step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order, Places, Schedule, rank_positions
from pipeline.errors import ConfigError, DataError

shard_sizes = st.lists(st.sampled_from([0, 1, 3]) | st.integers(1, 40), min_size=1, max_size=12).filter(sum)
batches = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])
windows = st.sampled_from([1, 4, 16])


def rows(places: Places) -> list[tuple[int, int, int]]:
    return list(zip(places.epoch.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


def whole(sizes: list[int]) -> Counter[tuple[int, int]]:
    return Counter((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))


@given(sizes=shard_sizes, batch=batches, window=windows, seed=st.integers(-5, 2**70))
@settings(max_examples=150, deadline=None)
def test_every_epoch_holds_each_sample_once(sizes, batch, window, seed) -> None:
    order = Order([sizes], global_batch=batch, seed=seed, window=window)
    seen: dict[int, Counter[tuple[int, int]]] = {}
    read = []
    for step in range(-(-3 * sum(sizes) // batch)):
        for epoch, shard, sample in rows(order.batch(step)):
            seen.setdefault(epoch, Counter())[shard, sample] += 1
            read.append(epoch)
    assert all(seen[epoch] == whole(sizes) for epoch in range(3))
    assert read == sorted(read)  # epochs follow one another, within border batches too


@given(
    sizes=st.lists(shard_sizes, min_size=1, max_size=3),
    batch=batches,
    window=windows,
    start=st.integers(0, 60),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_world_size_and_restart_change_nothing(sizes, batch, window, start, data) -> None:
    def fresh() -> Order:
        return Order(sizes, global_batch=batch, seed=5, window=window)

    undisturbed = fresh()
    expected = [undisturbed.batch(step) for step in range(start + 6)][start:]
    world = data.draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    ranks = [fresh() for _ in range(world)]
    for step, want in enumerate(expected, start):
        parts = [order.batch(step, rank_positions(batch, r, world)) for r, order in enumerate(ranks)]
        assert {(part.stream, part.first_epoch) for part in parts} == {(want.stream, want.first_epoch)}
        assert [row for part in parts for row in rows(part)] == rows(want)


def test_epochs_and_seeds_and_streams_differ() -> None:
    sizes = [20, 20, 20, 20]

    def epoch(order: Order, first: int) -> list[tuple[int, int]]:
        return [row[1:] for step in range(first, first + 10) for row in rows(order.batch(step))]

    order = Order([sizes], global_batch=8, seed=0, window=16)
    other_seed = Order([sizes], global_batch=8, seed=1, window=16)
    twins = Order([sizes, sizes], global_batch=8, seed=0, window=16)
    first_twin = [row[1:] for step in range(0, 20, 2) for row in rows(twins.batch(step))]
    second_twin = [row[1:] for step in range(1, 20, 2) for row in rows(twins.batch(step))]
    orders = [epoch(order, 0), epoch(order, 10), epoch(other_seed, 0), second_twin]
    assert first_twin == orders[0]
    assert len({tuple(o) for o in orders}) == len(orders)


def test_the_order_of_a_run_is_pinned() -> None:
    """A change here breaks every run that is resumed: it needs a new format version."""
    order = Order([[5, 0, 3, 4]], global_batch=4, seed=7, window=2)
    assert [rows(order.batch(step)) for step in (0, 1, 3)] == [
        [(0, 3, 1), (0, 3, 3), (0, 0, 2), (0, 2, 1)],
        [(0, 3, 0), (0, 0, 0), (0, 0, 3), (0, 2, 0)],
        [(1, 2, 1), (1, 3, 0), (1, 3, 3), (1, 0, 3)],
    ]


def test_a_window_is_read_front_to_back_and_shuffled_inside() -> None:
    """Memory: in w steps a position reads the w samples of one window, and no other."""
    order = Order([[4096]], global_batch=4, seed=0, window=64)
    for first in range(0, 1024, 64):
        read = np.stack([order.batch(step).sample for step in range(first, first + 64)])
        assert np.array_equal(np.sort(read, axis=0), np.sort(read, axis=0)[:1] + np.arange(64)[:, None])
        assert not np.array_equal(read, np.sort(read, axis=0))


def test_every_permutation_of_a_window_comes_up() -> None:
    order = Order([[6]], global_batch=1, seed=3, window=3)
    seen = Counter(tuple(int(order.batch(step + t).sample[0]) % 3 for t in range(3)) for step in range(0, 6000, 3))
    assert len(seen) == 6
    assert all(abs(count - 2000 / 6) < 5 * (2000 * 5 / 36) ** 0.5 for count in seen.values())


def test_shards_are_permuted_evenly() -> None:
    order = Order([[1, 1, 1, 1]], global_batch=4, seed=3, window=1)
    first = Counter(int(order.batch(step).shard[0]) for step in range(4000))
    assert all(abs(first[shard] - 1000) < 5 * 750**0.5 for shard in range(4))


def test_fewer_samples_than_a_batch_span_several_epochs() -> None:
    order = Order([[2, 1]], global_batch=8, seed=0, window=4)
    places = order.batch(1)
    assert places.first_epoch == 2
    assert places.epoch.tolist() == [2, 3, 3, 3, 4, 4, 4, 5]


@pytest.mark.parametrize("sizes", [[[]], [[0, 0]], [[3], [0]]])
def test_a_stream_without_samples_is_refused(sizes) -> None:
    with pytest.raises(DataError, match="no sample"):
        Order(sizes, global_batch=4, seed=0, window=4)


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5), steps=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_streams_keep_their_shares(weights, steps) -> None:
    schedule, taken = Schedule(weights), [0] * len(weights)
    for step in range(steps):
        stream, number = schedule.at(step)
        assert number == taken[stream]
        taken[stream] += 1
        assert all(c - w * (step + 1) / sum(weights) < 1 for c, w in zip(taken, weights, strict=True))
        if (step + 1) % sum(weights) == 0:
            assert taken == [w * (step + 1) // sum(weights) for w in weights]
    assert Schedule(weights).at(steps - 1) == (stream, number)
    schedule.at(0)
    assert schedule.at(steps - 1) == (stream, number)


def test_a_stream_comes_as_often_as_its_samples_ask() -> None:
    order = Order([[30], [10]], global_batch=2, seed=0, window=4)
    assert Counter(order.batch(step).stream for step in range(20)) == {0: 15, 1: 5}
    order = Order([[30], [10]], global_batch=2, seed=0, window=4, weights=[1, 1])
    assert [order.batch(step).stream for step in range(4)] == [0, 1, 0, 1]


def test_ranks_own_consecutive_positions() -> None:
    assert rank_positions(12, 1, 3).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("batch", "world", "nearest"), [(64, 3, "2 or 4"), (64, 5, "4 or 8"), (12, 24, "12"), (7, 3, "1 or 7")]
)
def test_other_world_sizes_are_refused_with_the_nearest(batch: int, world: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        rank_positions(batch, 0, world)
    assert f"{world} ranks" in error.value.message
    assert f"start {nearest} ranks" in error.value.remedy


def test_a_late_step_of_a_large_data_set_costs_no_more_than_the_first() -> None:
    order = Order([[1000] * 100_000], global_batch=4096, seed=0, window=256)
    places = order.batch(10**9, rank_positions(4096, 3, 64))
    assert places.first_epoch == 10**9 * 4096 // 10**8
    assert (places.sample < 1000).all()
