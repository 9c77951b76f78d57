"""Rates, time left and bottleneck, on a clock that only the test moves."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.encode.meter import STAGES, WINDOW_SECONDS, Meter, Stage


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(meter: Meter, clock: Clock, seconds: float, **stages: float) -> None:
    """Let each stage be busy for its share of each of some seconds, at the second's beginning."""
    for _ in range(int(seconds)):
        spans = sorted(stages.items(), key=lambda stage: stage[1])
        opened = {stage: meter.busy(stage) for stage, _ in spans}  # type: ignore[arg-type]
        for span in opened.values():
            span.__enter__()
        passed = 0.0
        for stage, share in spans:
            clock.passes(share - passed)
            passed = share
            opened[stage].__exit__(None, None, None)
        clock.passes(1 - passed)
        meter.snapshot()


def test_before_anything_happened_nothing_is_claimed(clock: Clock) -> None:
    first = Meter(1000, 4, decoders=2, clock=clock).snapshot()
    assert (first.images, first.images_per_second, first.eta_seconds, first.bottleneck) == (0, 0.0, None, "")
    assert (first.shards, first.total, first.done) == (0, 4, 0.0)
    assert set(first.busy.values()) == {0.0}
    assert first.note() == ""


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    meter = Meter(1000, 4, decoders=2, clock=clock)
    for rate in (100, 300):
        for _ in range(60):
            clock.passes(1.0)
            meter.count(images=rate)
    assert meter.snapshot().images == 24_000
    assert meter.snapshot().images_per_second == pytest.approx(300)
    clock.passes(WINDOW_SECONDS / 2)
    assert meter.snapshot().images_per_second == pytest.approx(150, rel=0.05)
    clock.passes(2 * WINDOW_SECONDS)
    meter.snapshot()
    clock.passes(WINDOW_SECONDS)
    assert meter.snapshot().images_per_second == 0


def test_the_busiest_stage_is_the_one_that_the_others_wait_for(clock: Clock) -> None:
    meter = Meter(1000, 4, decoders=1, clock=clock)
    work(meter, clock, 40, fetch=0.25, decode=0.5, encode=0.875, upload=0.125)
    now = meter.snapshot()
    assert now.busy == pytest.approx({"fetch": 0.25, "decode": 0.5, "encode": 0.875, "upload": 0.125})
    assert now.bottleneck == "encode"
    work(meter, clock, 40, fetch=0.9, encode=0.4)
    assert meter.snapshot().bottleneck == "fetch"
    assert meter.snapshot().busy["decode"] == 0


def test_a_pools_share_is_over_all_its_threads(clock: Clock) -> None:
    meter = Meter(1000, 4, decoders=4, clock=clock, uploaders=2)
    with meter.busy("decode"), meter.busy("decode"), meter.busy("upload"), meter.busy("encode"):
        clock.passes(6)
    clock.passes(4)
    assert meter.snapshot().busy == pytest.approx({"fetch": 0, "decode": 0.3, "encode": 0.6, "upload": 0.3})


def test_a_span_counts_while_it_lasts(clock: Clock) -> None:
    meter = Meter(1000, 4, decoders=1, clock=clock)
    clock.passes(5)
    with meter.busy("upload"):
        clock.passes(15)
        assert meter.snapshot().busy["upload"] == pytest.approx(0.75)
        assert meter.snapshot().bottleneck == "upload"
        clock.passes(10 * WINDOW_SECONDS)
        meter.snapshot()
        clock.passes(WINDOW_SECONDS)
        assert meter.snapshot().busy["upload"] == pytest.approx(1.0)


def test_a_span_ends_with_an_error_too(clock: Clock) -> None:
    meter = Meter(1000, 4, decoders=1, clock=clock)

    def fetch() -> None:
        with meter.busy("fetch"):
            clock.passes(1)
            raise KeyError

    with pytest.raises(KeyError):
        fetch()
    clock.passes(9)
    assert meter.snapshot().busy["fetch"] == pytest.approx(0.1)


def test_time_left_is_told_by_the_bytes_of_this_run(clock: Clock) -> None:
    meter = Meter(10_000, 12, decoders=1, clock=clock, shards_before=2)
    for _ in range(25):
        clock.passes(2)
        meter.count(read=100)
    now = meter.snapshot()
    assert now.eta_seconds == pytest.approx(150)
    assert now.shards == 2
    assert now.done == 2.99  # 4.5 by bytes read, of which not one is stored
    meter.count(shards=2)
    assert meter.snapshot().done == pytest.approx(4.5)
    meter.count(read=7_500, shards=7)
    assert meter.snapshot().eta_seconds is None  # all is read, not all is done
    meter.count(shards=1)
    done = meter.snapshot()
    assert (done.shards, done.done, done.eta_seconds) == (12, 12, 0.0)


def test_samples_that_wait_for_the_encoder_are_not_done(clock: Clock) -> None:
    meter = Meter(10_000, 1, decoders=1, clock=clock)
    meter.count(read=10_000, parsed=100)  # a small shard is read at once
    clock.passes(10)
    meter.count(images=15, rejected={"a": 3}, filtered={"b": 2})
    now = meter.snapshot()
    assert now.done == pytest.approx(0.2)
    assert now.eta_seconds == pytest.approx(40)


def test_a_stall_is_told(clock: Clock) -> None:
    meter = Meter(1000, 2, decoders=1, clock=clock)
    meter.count(images=5)
    for _ in range(100):
        clock.passes(1)
        meter.snapshot()
    assert meter.snapshot().note() == "0 images/s"


def test_time_left_follows_a_change_of_speed(clock: Clock) -> None:
    meter = Meter(10**9, 12, decoders=1, clock=clock)
    for _ in range(7200):
        clock.passes(1)
        meter.count(read=1000)
    for _ in range(1800):
        clock.passes(1)
        meter.count(read=100)
    now = meter.snapshot()
    assert now.eta_seconds == pytest.approx((10**9 - now.bytes_read) / 100, rel=0.1)


def test_a_worker_without_work_is_done(clock: Clock) -> None:
    now = Meter(0, 3, decoders=1, clock=clock, shards_before=3).snapshot()
    assert (now.done, now.eta_seconds) == (3, 0.0)
    assert Meter(0, 0, decoders=1, clock=clock).snapshot().done == 0


def test_the_note_is_a_few_words(clock: Clock) -> None:
    meter = Meter(1000, 2, decoders=1, clock=clock)
    with meter.busy("decode"):
        clock.passes(10)
    meter.count(images=4120, rejected={"not_an_image": 50})
    assert meter.snapshot().note() == "412 images/s, 1.2 % rejected, waiting for decode"
    meter.count(filtered={"filtered_caption": 4170})
    assert meter.snapshot().note() == "412 images/s, 0.6 % rejected, 50.0 % filtered, waiting for decode"
    clock.passes(90)
    meter.count(shards=2)
    assert meter.snapshot().note() == "41 images/s, 0.6 % rejected, 50.0 % filtered"  # of the whole run


def test_small_figures_do_not_read_as_none(clock: Clock) -> None:
    meter = Meter(1000, 2, decoders=1, clock=clock)
    clock.passes(10)
    meter.count(images=4, rejected={"x": 1})
    assert meter.snapshot().note().startswith("0.4 images/s, 20.0 % rejected")
    meter.count(images=99_995)
    assert meter.snapshot().note().startswith("10,000 images/s, <0.1 % rejected")


def test_reasons_are_counted_apart(clock: Clock) -> None:
    meter = Meter(1000, 2, decoders=1, clock=clock)
    meter.count(rejected={"a": 1, "b": 2}, written=5)
    meter.count(rejected={"a": 1}, filtered={"filtered_where": 3}, written=6)
    now = meter.snapshot()
    assert now.rejected == {"a": 2, "b": 2}
    assert now.filtered == {"filtered_where": 3}
    assert now.bytes_written == 11


@given(
    st.lists(
        st.tuples(st.sampled_from(STAGES), st.booleans(), st.floats(0, 20), st.integers(0, 50)),
        max_size=60,
    )
)
def test_shares_stay_shares_and_the_counts_add_up(events: list[tuple[Stage, bool, float, int]]) -> None:
    clock, open_spans, images = Clock(), dict.fromkeys(STAGES, 0), 0
    meter = Meter(5000, 9, decoders=2, clock=clock)
    for stage, enters, seconds, count in events:
        if enters and open_spans[stage] < (2 if stage == "decode" else 1):
            meter.busy(stage).__enter__()
            open_spans[stage] += 1
        elif not enters and open_spans[stage]:
            meter.busy(stage).__exit__(None, None, None)
            open_spans[stage] -= 1
        clock.passes(seconds)
        meter.count(images=count, read=count)
        images += count
        now = meter.snapshot()
        assert now.images == images
        assert all(0 <= share <= 1 for share in now.busy.values())
        assert now.shards <= now.done <= now.total
        assert now.images_per_second >= 0
        assert now.eta_seconds is None or now.eta_seconds >= 0


def test_threads_lose_no_count_and_no_time() -> None:
    meter, threads, rounds = Meter(10**6, 10**6, decoders=4), 4, 2000
    seconds = [0.0] * threads

    def run(number: int) -> None:
        dice = random.Random(number)
        for _ in range(rounds):
            with meter.busy("decode"):
                began = time.monotonic()
                sum(range(dice.randrange(50)))
                seconds[number] += time.monotonic() - began
            meter.count(images=1, read=2, rejected={"a": 1})

    crew = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in crew:
        thread.start()
    while any(thread.is_alive() for thread in crew):
        assert meter.snapshot().images <= threads * rounds
    now = meter.snapshot()
    assert (now.images, now.bytes_read, now.rejected) == (
        threads * rounds,
        2 * threads * rounds,
        {"a": threads * rounds},
    )
    assert now.busy["decode"] * 4 * now.elapsed_seconds >= 0.99 * sum(seconds)
    with meter.busy("decode"):
        pass


def test_a_span_costs_microseconds() -> None:
    meter, rounds = Meter(1, 1, decoders=1), 20_000
    began = time.process_time()
    for _ in range(rounds):
        with meter.busy("decode"):
            pass
    assert (time.process_time() - began) / rounds < 20e-6  # about 1 us; the bound is for a busy machine
