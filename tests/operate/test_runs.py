"""What is read of runs: which kind stands where, logs that grow and restart, states."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from run_folders import NOW, log_lines, write_encoded, write_log, write_receipts, write_training

from pipeline.errors import DataError, StorageError
from pipeline.metrics import LogFollower
from pipeline.operate.runs.find import find
from pipeline.operate.runs.numbers import Numbers, thinned
from pipeline.operate.runs.run import Run, open_runs
from pipeline.operate.runs.state import State, look_at, states_of
from pipeline.storage import Entry, Lease, open_store


def opened(folder: Path) -> Run:
    run = open_runs([find(str(folder))])[0]
    run.refresh()
    return run


def state(run: Run, now: float = NOW + 60) -> State:
    return states_of([look_at(run, now)], lambda seconds: None)[0]


def word(run: Run, now: float = NOW + 60) -> str:
    return state(run, now).word


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While a process that lives holds it."""
    lease = Lease(open_store(str(folder)))
    lease.take()
    try:
        yield
    finally:
        lease.release()


def numbers(*lines: dict[str, object]) -> Numbers:
    found = Numbers()
    for line in lines:
        found.add({"step": 1, "time": 0.0, **line})
    return found


def test_each_kind_of_run_is_known_by_what_it_leaves(tmp_path):
    assert find(str(write_training(tmp_path / "train"))).kind == "train"
    assert find(str(write_encoded(tmp_path / "latents"))).kind == "encode"
    assert find(str(write_receipts(tmp_path / "begun", [1]))).kind == "encode"
    write_encoded(tmp_path / "several" / "256")
    assert find(str(tmp_path / "several")).kind == "encode"
    write_log(tmp_path / "bare", log_lines(3))
    assert find(str(tmp_path / "bare")).kind == "train"
    write_log(tmp_path / "vae", [{"step": 1, "loss": 1.0, "reconstruction_loss": 1.0}])
    assert find(str(tmp_path / "vae")).kind == "first_stage"
    write_log(tmp_path / "empty", [])
    assert find(str(tmp_path / "empty")).kind == "train"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.yaml").write_text("job: train-vae\n")
    assert find(str(tmp_path / "new")).kind == "first_stage"


def test_a_file_of_a_run_stands_for_it(tmp_path):
    write_training(tmp_path / "run")
    assert find(str(tmp_path / "run" / "metrics.jsonl")).store.url == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "said", "kind"),
    [
        (lambda folder: None, "nothing is there", StorageError),
        (lambda folder: folder.mkdir(), "is empty: nothing has run there yet", DataError),
        (lambda folder: folder.write_text("x"), "is a file, and no run", DataError),
        (lambda folder: write_training(folder / "a"), "is no run, but holds some: a", DataError),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "manifest.json").write_text(""),
                (folder / "complete.json").touch(),
            ),
            "is a checkpoint of a run",
            DataError,
        ),
        (
            lambda folder: write_log(folder / "x", []) or (folder / "x").rename(folder / "x y"),
            "holds some: x y",
            DataError,
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("")),
            "is no run; it holds notes.txt",
            DataError,
        ),
    ],
)
def test_what_is_no_run_is_said_with_what_it_holds(tmp_path, make, said, kind):
    make(tmp_path / "there")
    with pytest.raises(kind, match=said) as refused:
        find(str(tmp_path / "there"))
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("checkpoint", "file"),
    [
        ("step-00000040", "run.json"),
        ("checkpoints/step-00000003", "state.safetensors"),
        ("ema/step-00000040", "run.json"),
    ],
)
def test_a_checkpoint_is_none_but_its_run(tmp_path, checkpoint, file):
    (tmp_path / "run" / checkpoint).mkdir(parents=True)
    (tmp_path / "run" / checkpoint / file).touch()
    with pytest.raises(DataError) as refused:
        find(f"{tmp_path}/run/{checkpoint}/")
    assert refused.value.remedy == f"give {tmp_path}/run"


def test_a_run_has_its_name_from_wherever_it_is_looked_at(tmp_path, monkeypatch):
    write_log(tmp_path / "run", log_lines(1))
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert [run.name for run in open_runs([find(".")])] == ["run"]
    assert [run.name for run in open_runs([find("../latest/")])] == ["latest"]
    for again in ("../run", str(tmp_path / "latest"), "metrics.jsonl"):
        with pytest.raises(DataError, match="given twice"):
            open_runs([find("."), find(again)])


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        write_log(tmp_path / name, log_lines(1))
    found = [find(str(tmp_path / name)) for name in ("a/run", "b/run")]
    assert [run.name for run in open_runs(found)] == ["a/run", "b/run"]
    assert [run.name for run in open_runs([found[0], find(str(tmp_path / "c/other"))])] == ["run", "other"]
    with pytest.raises(DataError, match="given twice"):
        open_runs([found[0], found[0]])


def test_numbers_by_key_and_label():
    found = numbers({"loss": 1.5}, {"step": 2, "loss": None, "validation_loss": {"main": {"a": 3}}})
    assert found.named() == [("loss",), ("validation_loss", "main", "a")]
    assert found.get("loss").steps.tolist() == [1, 2]
    assert np.isnan(found.get("loss").values[1])
    assert found.last("loss") is None
    assert found.last("validation_loss", "main", "a") == 3.0
    assert found.get("nothing") is None


@pytest.mark.parametrize(
    "value", ["text", True, [1.0], {"a": {"b": {"c": {"d": 1.0}}}}, 10**400, {"a": "text"}], ids=lambda v: repr(v)[:20]
)
def test_what_is_no_number_is_left_out_and_counted(value):
    found = numbers({"loss": 1.0, "odd": value})
    assert found.ignored == 1
    assert found.named() == [("loss",)]


def test_a_step_told_again_replaces_what_came_after():
    found = numbers(
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}, {"step": 2, "loss": 9.0}
    )
    assert found.get("loss").values.tolist() == [1.0, 9.0]
    assert found.superseded == 2
    assert len(found) == 2


def test_a_step_beyond_all_numbers_is_ignored():
    found = numbers({"step": 10**30, "loss": 1.0}, {"step": -5, "loss": 1.0})
    assert (len(found), found.ignored) == (0, 2)


def test_thinning_hides_nothing():
    found = Numbers()
    for step in range(10_001):
        found.add({"step": step, "time": 0.0, "loss": math.nan if step == 5_000 else float(step == 777)})
    points = thinned(found.get("loss"), 100)
    assert len(points.steps) == 100
    assert points.steps[-1] == 10_000
    assert points.high.max() == 1.0
    assert points.mean.sum() == pytest.approx(1 / 100, rel=0.02)
    assert len(points.not_finite) == 1
    few = thinned(numbers({"loss": 2.0}).get("loss"), 100)
    assert (few.mean.tolist(), few.lines_per_point) == ([2.0], 1.0)


def test_a_log_is_followed_as_it_grows(tmp_path):
    log = tmp_path / "metrics.jsonl"
    follower = LogFollower(open_store(str(tmp_path)))
    assert list(follower.lines()) == []
    log.write_bytes(b'{"step": 1}\n{"step": 2')
    assert [line["step"] for line in follower.lines()] == [1]
    with log.open("ab") as file:
        file.write(b'2}\nnot a line\n{"step": 23}')
    assert [line["step"] for line in follower.lines()] == [22, 23]
    assert follower.damaged == 1
    assert not follower.changed()
    assert list(follower.lines()) == []
    (tmp_path / "anew").write_bytes(b'{"step": 1}\n')
    (tmp_path / "anew").replace(log)
    assert follower.changed()
    assert [line["step"] for line in follower.lines()] == [1]
    assert follower.damaged == 0


def test_a_log_that_was_cut_or_deleted_is_read_anew(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    follower = LogFollower(open_store(str(tmp_path)))
    assert len(list(follower.lines())) == 2
    log.write_bytes(b'{"step": 7}\n')
    assert follower.changed()
    assert [line["step"] for line in follower.lines()] == [7]
    log.unlink()
    assert follower.changed()
    assert list(follower.lines()) == []


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"9" * 5000, b"[" * 100_000, b'{"step": "x"}', b"null", b'{"step": 1.5}']
)
def test_lines_that_are_none_of_ours_are_passed_over(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"step": 1}\n')
    follower = LogFollower(open_store(str(tmp_path)))
    assert [found["step"] for found in follower.lines()] == [1]
    assert follower.damaged == 1


@dataclass
class Parts:
    """A log on S3, as far as reading goes."""

    contents: dict[str, bytes]
    url: str = "s3://bucket/run"
    listed: int = 0

    def read(self, name: str) -> bytes:
        return self.contents[name]

    def list(self, prefix: str = "") -> list[Entry]:
        self.listed += 1
        return [Entry(name, 0, "1") for name in sorted(self.contents)]


def test_parts_are_read_at_once_and_listed_by_whoever_did(tmp_path):
    store = Parts({f"metrics/{step:08d}.jsonl": b'{"step": %d}' % step for step in range(200)} | {"lease.json": b"{}"})
    follower, told = LogFollower(store), []
    entries = store.list()
    assert not follower.changed(entries)
    lines = follower.lines(entries, lambda *done: told.append(done))
    assert [line["step"] for line in lines] == list(range(200))
    assert (told[0], told[-1], len(told)) == ((1, 200), (200, 200), 200)
    assert not follower.changed(entries)
    assert list(follower.lines(entries)) == []
    assert store.listed == 1
    assert follower.changed(entries[1:5])
    assert len(list(follower.lines())) == 200


@pytest.mark.s3
def test_a_log_on_s3_is_followed_by_its_parts(s3_url):
    store = open_store(s3_url)
    follower = LogFollower(store)
    assert list(follower.lines()) == []
    store.write("metrics/00000001.jsonl", b'{"step": 1}\n{"step": 2}\n')
    store.write("metrics/00000003.jsonl", b'{"step": 3}')
    assert [line["step"] for line in follower.lines()] == [1, 2, 3]
    store.write("metrics/00000005.jsonl", b'{"step": 5}\n')
    assert not follower.changed()
    assert [line["step"] for line in follower.lines()] == [5]
    store.write("metrics/00000003.jsonl", b'{"step": 3}\n{"step": 4}\n')
    assert follower.changed()
    assert [line["step"] for line in follower.lines()] == [1, 2, 3, 4, 5]
    assert find(s3_url).kind == "train"
    run = open_runs([find(s3_url)])[0]
    assert run.refresh()
    assert not run.refresh()
    assert run.numbers.last_step == 5


def test_a_run_as_it_stands(tmp_path):
    run = opened(write_training(tmp_path / "run", 60, target=100))
    assert (run.numbers.last_step, run.target) == (60, 100)
    assert list(run.checkpoints) == [20, 40, 60]
    assert [step for step, _ in run.sheets] == [10, 20, 30, 40, 50, 60]
    assert run.starts[0]["world_size"] == 2
    assert not run.problems


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:secret@host:9091", "http://***@host:9091"),
        ("http://user:sec@ret@host:9091/x", "http://***@host:9091/x"),
        ("HTTPS://user:sec/ret@host", "HTTPS://***@host"),
        ("see https://host/a?token=secret, or https://host/b", "see https://host/a or https://host/b"),
        ("s3://key:secret@bucket/a@b/c", "s3://***@b/c"),
        ("a@b s3://bucket/a@b?", "a@b s3://bucket/a@b?"),
    ],
)
def test_credentials_in_addresses_are_left_out(tmp_path, address, shown):
    folder = write_training(tmp_path / "run", metrics={"pushgateway": [address]})
    assert opened(folder).config["metrics"]["pushgateway"] == [shown]


@pytest.mark.parametrize("name", ["run.yaml", "starts.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"3", b"[[[", b"a: b: c"])
def test_damaged_records_are_told_and_left_out(tmp_path, name, content):
    folder = write_training(tmp_path / "run")
    (folder / name).write_bytes(content)
    run = opened(folder)
    assert run.problems == [f"{name} is damaged, and left out"]
    assert run.numbers.last_step == 60


def test_states(tmp_path):
    assert word(opened(write_training(tmp_path / "done", 60))) == "finished"
    folder = write_training(tmp_path / "run", 60, target=100)
    assert word(opened(folder)) == "stopped"
    with held(folder):
        assert word(opened(folder), NOW + 70) == "running"
        assert word(opened(folder), NOW + 2000) == "stalled"
    (folder / "lease.json").write_text('{"host": "elsewhere", "pid": 7, "counter": 3}')
    assert word(opened(folder), NOW + 70) == "running"
    write_log(tmp_path / "vae", [{"step": 1, "time": NOW, "loss": 1.0, "reconstruction_loss": 1.0}])
    assert word(opened(tmp_path / "vae"), NOW + 30) == "running"
    assert "or it was stopped" in state(opened(tmp_path / "vae"), NOW + 9e6).said
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.yaml").write_text("job: train\nsteps: 3\n")
    assert word(opened(tmp_path / "new")) == "waiting"


@pytest.mark.parametrize(("every", "count", "told"), [(20, 99, False), (60, 180, True)])
def test_a_run_has_not_stalled_for_as_long_as_pauses_take(tmp_path, every, count, told):
    """A line each ten seconds, and now and then 15 minutes without; they were among the last lines, or are told."""
    folder = write_training(tmp_path / "run", 60, target=1000)
    lines: list[dict[str, object]] = []
    for step in range(1, count + 1):
        now = NOW + 10 * step + (step - 1) // every * 900
        lines.append({"step": step, "time": now, "loss": 1.0})
        if told and step % every == 0 and step < count:
            lines.append({"step": step, "time": now + 900, "validation_seconds": 900})
    write_log(folder, lines)
    with held(folder):
        assert word(opened(folder), now + 1500) == "running"
        assert word(opened(folder), now + 2000) == "stalled"


def test_the_time_between_two_starts_is_no_pause(tmp_path):
    folder = write_training(tmp_path / "run", 60, target=100)
    lines = log_lines(60)
    for line in lines:
        line["time"] += 100_000 * (line["step"] > 40)
    write_log(folder, lines)
    with held(folder):
        assert word(opened(folder), NOW + 200_060) == "running"
        (folder / "starts.json").write_text('[{"step": 0}, {"step": 40}]')
        assert word(opened(folder), NOW + 200_060) == "stalled"
        assert opened(folder).pace == pytest.approx(1.0)


def test_a_run_that_was_just_started_again_has_not_stalled(tmp_path):
    folder, later = write_training(tmp_path / "run", 60, target=100), NOW + 90_000
    with held(folder):
        assert word(opened(folder), later) == "stalled"
        (folder / "starts.json").write_text(json.dumps([{"step": 0, "time": NOW}, {"step": 60, "time": later - 9}]))
        assert word(opened(folder), later) == "running"
        assert word(opened(folder), later + 2000) == "stalled"


def test_leases_elsewhere_are_watched_all_at_once(tmp_path):
    runs = [opened(write_training(tmp_path / name, 60, target=100)) for name in "abc"]
    for run, place in zip(runs, ("elsewhere", "elsewhere", None), strict=True):
        if place:
            (Path(run.found.store.url) / "lease.json").write_text(f'{{"host": "{place}", "pid": 7, "counter": 1}}')
    waits = []
    assert [one.word for one in states_of([look_at(run, NOW + 60) for run in runs], waits.append)] == [
        "running",
        "running",
        "stopped",
    ]
    assert len(waits) == 1


def test_a_killed_run_is_known_by_its_process(tmp_path):
    folder = write_training(tmp_path / "run", 60, target=100)
    lease = Lease(open_store(str(folder)))
    lease.take()
    content = json.loads((folder / "lease.json").read_text())
    lease.release()
    (folder / "lease.json").write_text(json.dumps({**content, "pid": 2**22 + 1}))
    assert word(opened(folder)) == "killed"


def test_an_encode_job_is_counted_by_receipts_until_there_is_a_manifest(tmp_path):
    folder = write_receipts(tmp_path / "latents", [0, 1])
    run = opened(folder)
    part = run.encoded[0]
    assert (part.tally.shards, part.samples, part.holdout, part.reasons) == (
        2,
        8,
        2,
        ({"no_caption": 4}, {"min_side": 2}),
    )
    assert str(state(run)) == "unfinished: 2 shards stored, no manifest yet: it goes on, or was stopped"
    write_receipts(folder, [2])
    assert run.refresh()
    assert part.samples == 12
    assert not run.refresh()
    write_encoded(folder)
    assert run.refresh()
    assert (part.samples, part.reasons, word(run)) == (12, ({"no_caption": 6}, {"min_side": 3}), "finished")
    assert len(part.examples) == 9
    write_receipts(folder, [7])  # more data since
    assert run.refresh()
    assert (run.encoded[0].samples, word(run)) == (16, "unfinished")


def test_a_damaged_receipt_or_manifest_is_told(tmp_path):
    folder = write_encoded(tmp_path / "latents")
    (folder / "manifest.json").write_text("{")
    (folder / "00001.tar.receipt.json").write_text("{")
    run = opened(folder)
    assert run.encoded[0].samples == 8
    assert [problem.rpartition("/")[2] for problem in run.problems] == [
        "manifest.json is not JSON",
        "00001.tar.receipt.json is not JSON",
    ]


def test_the_settings_of_latents_are_those_of_the_fingerprint(tmp_path):
    finished, begun = write_encoded(tmp_path / "a"), write_receipts(tmp_path / "b", [0])
    settings = [opened(folder).encoded[0].settings() for folder in (finished, begun)]
    assert all(one["resize_filter"] == "lanczos" for one in settings)
    (begun / "encoding.json").write_text("[")
    assert opened(begun).encoded[0].settings() == {}
