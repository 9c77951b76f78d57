"""The data order: each epoch holds each sample once, at any world size and from any step."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import AT_BORDER, Group, Order, Places, Schedule, Stream, rank_positions
from pipeline.errors import ConfigError, DataError

shard_sizes = st.lists(st.sampled_from([0, 1, 3]) | st.integers(1, 40), min_size=1, max_size=12).filter(sum)
batches = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])
windows = st.sampled_from([1, 4, 16])


def rows(places: Places) -> list[tuple[int, int, int]]:
    return list(zip(places.epoch.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


def whole(sizes: list[int]) -> Counter[tuple[int, int]]:
    return Counter((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))


@given(sizes=shard_sizes, batch=batches, window=windows, seed=st.integers(-5, 2**70))
@settings(max_examples=60, deadline=None)
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
@settings(max_examples=50, deadline=None)
def test_world_size_and_restart_change_nothing(sizes, batch, window, start, data) -> None:
    def fresh() -> Order:
        return Order(sizes, global_batch=batch, seed=5, window=window)

    undisturbed = fresh()
    expected = [undisturbed.batch(step) for step in range(start + 6)][start:]
    world = data.draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    ranks = [fresh() for _ in range(world)]
    for step, want in enumerate(expected, start):
        parts = [order.batch(step, rank_positions(batch, r, world)) for r, order in enumerate(ranks)]
        assert {part.group for part in parts} == {want.group}
        for name in ("stream", "epoch", "shard", "sample", "window"):
            assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(want, name).tolist()


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
    """A change here breaks every run that is resumed: it needs a new `order.VERSION`."""
    order = Order([[5, 0, 3, 4]], global_batch=4, seed=7, window=2)
    assert [rows(order.batch(step)) for step in (0, 1, 3)] == [
        [(0, 3, 0), (0, 0, 1), (0, 0, 2), (0, 2, 2)],
        [(0, 3, 1), (0, 3, 3), (0, 0, 3), (0, 2, 1)],
        [(1, 2, 0), (1, 3, 2), (1, 0, 0), (1, 0, 4)],
    ]


def reads(order: Order, steps: range, position: int) -> list[tuple[int, int]]:
    """Window and sample that a position reads in each step."""
    return [
        (int(places.window[position]), int(places.sample[position])) for places in (order.batch(step) for step in steps)
    ]


def test_a_window_is_read_as_a_whole_and_shuffled_inside() -> None:
    """Memory: while a position is in a window, it reads that window's samples, each once, and no other."""
    order = Order([[4096]], global_batch=4, seed=0, window=64)
    shuffled = 0
    for position in range(4):
        found: dict[int, list[int]] = {}
        numbers = [number for number, _ in reads(order, range(1024), position)]
        assert numbers == sorted(numbers)
        for number, sample in reads(order, range(1024), position):
            found.setdefault(number, []).append(sample)
        for number, samples in found.items():
            low, high = min(samples), max(samples) + 1
            assert sorted(samples) == list(range(low, high))
            assert order.streams[0].pieces(0, position, number) == [(0, low, high)]
            shuffled += samples != sorted(samples)
            assert len(samples) == 64 or number in (0, max(found))
        starts = [min(samples) for samples in found.values()]
        assert starts == sorted(starts, reverse=position % 2 == 1)
    assert shuffled > 50


def test_windows_begin_at_other_steps_for_other_positions() -> None:
    """Of any ranks' positions about as many begin a window in each step: reads come evenly."""
    order = Order([[64 * 4096]], global_batch=64, seed=0, window=128)
    for first in (0, 16, 48):
        windows = np.stack([order.batch(step).window[first : first + 16] for step in range(256, 512)])
        begun = (np.diff(windows, axis=0) != 0).sum(1)
        assert begun.sum() == pytest.approx(2 * 16, abs=1)
        assert max(begun[i : i + 8].sum() for i in range(0, 248, 8)) <= 2


def test_neighbours_meet_where_their_runs_meet() -> None:
    """Even runs go up, odd ones down: what the border of two runs cuts is needed by both at once."""
    order = Order([[4000]], global_batch=4, seed=0, window=10)
    first, last = order.batch(0).sample, order.batch(999).sample
    assert [abs(int(s) - border) < 10 for s, border in zip(first, (0, 2000, 2000, 4000), strict=True)] == [True] * 4
    assert [abs(int(s) - border) < 10 for s, border in zip(last, (1000, 1000, 3000, 3000), strict=True)] == [True] * 4


@given(sizes=shard_sizes, batch=batches, window=windows, epoch=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_windows_of_an_epoch_are_what_its_batches_read(sizes, batch, window, epoch) -> None:
    stream = Stream(sizes, batch, (1, 2), window)
    positions = np.arange(batch)
    read: Counter[tuple[int, int, int, int]] = Counter()
    for number in range(epoch * stream.samples // batch, -(-(epoch + 1) * stream.samples // batch)):
        for p, (e, shard, sample, v) in enumerate(zip(*stream.at(number, positions), strict=True)):
            if e == epoch and v != AT_BORDER:
                read[p, int(v), int(shard), int(sample)] += 1
    planned: Counter[tuple[int, int, int, int]] = Counter()
    for v, (low, high) in enumerate(stream.windows(epoch, positions)):
        for p in range(batch):
            within = np.arange(low[p], high[p])
            shards, samples = stream.locate(epoch, within)
            place = list(zip(shards.tolist(), samples.tolist(), strict=True))
            planned.update((p, v, *one) for one in place)
            pieces = stream.pieces(epoch, p, v)
            assert place == [(shard, i) for shard, first, end in pieces for i in range(first, end)]
    assert read == planned


@given(
    quotas=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sizes=st.lists(shard_sizes, min_size=4, max_size=4),
    window=windows,
)
@settings(max_examples=50, deadline=None)
def test_a_group_of_several_streams_has_constant_parts_of_each_batch(quotas, sizes, window) -> None:
    sizes, batch = sizes[: len(quotas)], sum(quotas)
    group = Group(tuple(range(len(quotas))), tuple(quotas), 1)
    order = Order(sizes, global_batch=batch, seed=1, window=window, groups=[group])
    seen: dict[tuple[int, int], Counter[tuple[int, int]]] = {}
    steps = max(-(-2 * sum(n) // quota) for n, quota in zip(sizes, quotas, strict=True))
    for step in range(steps):
        places = order.batch(step)
        assert places.stream.tolist() == [s for s, quota in enumerate(quotas) for _ in range(quota)]
        for s, epoch, shard, sample in zip(
            places.stream.tolist(), *(a.tolist() for a in (places.epoch, places.shard, places.sample)), strict=True
        ):
            seen.setdefault((s, epoch), Counter())[shard, sample] += 1
    assert all(seen[s, epoch] == whole(n) for s, n in enumerate(sizes) for epoch in range(2))


@pytest.mark.parametrize("groups", [[Group((0,), (4,), 1)], [Group((0, 1), (2, 1), 1)], [Group((0, 0), (2, 2), 1)]])
def test_groups_that_are_no_plan_are_a_bug(groups) -> None:
    with pytest.raises(ValueError, match="quotas"):
        Order([[3], [4]], global_batch=4, seed=0, window=2, groups=groups)


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
    assert places.epoch.tolist() == [2, 3, 3, 3, 4, 4, 4, 5]


@pytest.mark.parametrize("sizes", [[[]], [[0, 0]], [[3], [0]]])
def test_a_stream_without_samples_is_refused(sizes) -> None:
    with pytest.raises(DataError, match="no sample"):
        Order(sizes, global_batch=4, seed=0, window=4)


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=6), steps=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_groups_keep_their_shares(weights, steps) -> None:
    schedule, taken, total = Schedule(weights), [0] * len(weights), sum(weights)
    for step in range(steps):
        group, number = schedule.at(step)
        assert number == taken[group]
        taken[group] += 1
        assert all(
            abs(c - w * (step + 1) / total) <= 0.5 + w * len(weights) / total
            for c, w in zip(taken, weights, strict=True)
        )
        if (step + 1) % total == 0:
            assert [c * total for c in taken] == [w * (step + 1) for w in weights]
    assert Schedule(weights).at(steps - 1) == (group, number)
    schedule.at(0)
    assert schedule.at(steps - 1) == (group, number)


def test_a_late_step_of_the_schedule_costs_no_more_than_the_first() -> None:
    weights = [10**9 + 7 * i for i in range(40)]
    step = 10**12 + 12345
    group, number = Schedule(weights).at(step)
    assert number == pytest.approx(step * weights[group] / sum(weights), abs=2)
    schedule = Schedule(weights)
    assert [schedule.at(step + i) for i in range(50)] == [Schedule(weights).at(step + i) for i in range(50)]


def test_a_stream_comes_as_often_as_its_samples_ask() -> None:
    order = Order([[30], [10]], global_batch=2, seed=0, window=4)
    assert Counter(order.batch(step).group for step in range(20)) == {0: 15, 1: 5}
    alike = [Group((0,), (2,), 1), Group((1,), (2,), 1)]
    order = Order([[30], [10]], global_batch=2, seed=0, window=4, groups=alike)
    assert [order.batch(step).group for step in range(4)] == [0, 1, 0, 1]


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


def test_a_large_global_batch_costs_a_rank_no_more_than_its_part() -> None:
    batch = 2**31 - 2
    with pytest.raises(ConfigError) as error:
        rank_positions(batch, 0, 5)
    assert "start 3 or 6 ranks" in error.value.remedy
    positions = rank_positions(batch, 7, batch // 2)
    order = Order([[40, 33]], global_batch=batch, seed=0, window=4)
    tracemalloc.start()
    places = [order.batch(step, positions) for step in range(3)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [place.sample.shape for place in places] == [(2,)] * 3
    assert peak < 1 << 26, "the whole batch has 16 GB of positions"
    with pytest.raises(ConfigError, match="more than 1048576"):
        rank_positions(batch, 0, 2)


@pytest.mark.parametrize(
    ("rank", "world", "said", "remedy"),
    [
        (-1, 4, "rank: -1 is none of 4 ranks", "0 to 3"),
        (4, 4, "rank: 4 is none of 4 ranks", "0 to 3"),
        (0, 0, "world_size: 0", "1 rank"),
        (0, -2, "world_size: -2", "1 rank"),
    ],
)
def test_ranks_that_are_none_are_refused(rank: int, world: int, said: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        rank_positions(8, rank, world)
    assert said in error.value.message
    assert remedy in error.value.remedy


@given(sizes=shard_sizes, window=windows, start=st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_one_order_serves_two_ranks_in_turn(sizes, window, start) -> None:
    """What an order keeps from one call is not taken for another rank's, nor for another epoch's."""
    shared, *own = (Order([sizes], global_batch=4, seed=5, window=window) for _ in range(3))
    for step in range(start, start + 8):
        for rank, alone in enumerate(own):
            places = rank_positions(4, rank, 2)
            found, expected = shared.batch(step, places), alone.batch(step, places)
            for name in ("epoch", "shard", "sample", "window"):
                assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_a_late_step_of_a_large_data_set_costs_no_more_than_the_first() -> None:
    order = Order([[1000] * 100_000], global_batch=4096, seed=0, window=256)
    places = order.batch(10**9, rank_positions(4096, 3, 64))
    assert (places.epoch >= 10**9 * 4096 // 10**8).all()
    assert (places.sample < 1000).all()
