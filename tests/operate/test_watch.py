"""Runs in a terminal: what is told of them, in a log and on a screen, and when it ends."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from run_folders import NOW, log_lines, write_encoded, write_log, write_receipts, write_training

from pipeline.errors import StorageError
from pipeline.operate.runs.find import find
from pipeline.operate.runs.numbers import Numbers
from pipeline.operate.runs.run import open_runs
from pipeline.operate.watch import figures, job
from pipeline.operate.watch import watched as watching
from pipeline.operate.watch.figures import ASCII, percent, seconds_left, sparkline
from pipeline.operate.watch.job import watch
from pipeline.operate.watch.keys import Keys
from pipeline.operate.watch.screen import Screen
from pipeline.operate.watch.watched import Watched, line
from pipeline.storage import Lease, open_store

HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"  # the cursor


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a minute after the first line of every log."""
    monkeypatch.setattr(time, "time", lambda: NOW + 60)


def watched(folder: Path, clock: Clock | None = None, every: float = 2.0) -> Watched:
    return Watched(open_runs([find(str(folder))])[0], every, clock or Clock())


def drawn(
    *ones: Watched, width: int = 100, height: int = 40, encoding: str = "utf-8", news: Sequence[str] = ()
) -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, height=height, color_system=None, legacy_windows=False)
    shown = Screen(ones, keys=True)
    shown.news += news
    console.print(shown)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


def sparks(*values: float, width: int = 60, levels: str = "01234567") -> str:
    numbers = Numbers()
    for step, value in enumerate(values):
        numbers.add({"step": step, "time": 0.0, "x": value})
    return sparkline(numbers.get("x"), width, levels)


def test_sparklines_fit_and_show_gaps():
    assert sparks(0, 1, 2, 3, 4, 5, 6, 7) == "01234567"
    assert sparks(1.0, 1.0) == "00"
    assert sparks(0, float("nan"), 7) == "0 7"
    assert sparks(float("nan")) == ""
    assert len(sparks(*range(1000), width=50)) == 50
    assert sparks(*([1.0] * 98 + [2.0, 1e9]))[-1] == "7"


def test_a_line_tells_the_figures(tmp_path):
    one = watched(write_training(tmp_path / "run", 60, target=120))
    assert one.look() == ["stopped: at step 60 of 120; the same command goes on"]
    loss = one.run.numbers.last("loss")
    assert line(one) == f"step 60/120 (50%), loss {loss:.4f}, norm 0.0167, rate 1.00e-03, images/s 160, wait 10%"
    assert seconds_left(one.run) == pytest.approx(60.0)


def test_the_time_left_has_validations_in_it(tmp_path):
    folder = write_training(tmp_path / "run", 60, target=120)
    write_log(folder, [{"step": s, "time": NOW + s + 100 * (s // 20), "loss": 1.0} for s in range(20, 61)])
    one = watched(folder)
    one.look()
    assert seconds_left(one.run) == pytest.approx(60 * 240 / 40)


def test_a_run_that_goes_on_stalls_and_is_started_again(tmp_path):
    folder, clock = write_training(tmp_path / "run", 60, target=120), Clock()
    lease = Lease(open_store(str(folder)))
    lease.take()
    try:
        one = watched(folder, clock)
        assert one.look() == []
        assert one.state.word == "running"
        assert "60 s left" in line(one)
        assert one.look() == []  # not before its time
        clock.now += 30
        assert one.look() == []
        clock.now += 600
        assert one.look() == ["stalled: no new line for 10 min, at step 60 of 120"]
        (folder / "starts.json").write_text(f'[{{"step": 0}}, {{"step": 40, "time": {NOW}}}]')
        clock.now += 3
        assert one.look() == ["started again, from step 40"]
        assert one.state.word == "running"  # though no line has come yet
        write_log(folder, log_lines(40))
        clock.now += 3
        assert one.look() == []
        assert (one.run.numbers.last_step, one.state.word) == (40, "running")
    finally:
        lease.release()
    write_log(folder, log_lines(120))
    (folder / "step-00000120").mkdir()
    (folder / "step-00000120" / "complete.json").write_text("{}")
    clock.now += 3
    assert one.look() == ["finished: all 120 steps"]


def test_a_lease_elsewhere_lives_while_it_moves(tmp_path):
    folder, clock = write_training(tmp_path / "run", 60, target=120), Clock()
    one = watched(folder, clock)
    for counter, seconds, word in ((1, 0, "running"), (2, 5, "running"), (2, 5, "running"), (2, 60, "killed")):
        (folder / "lease.json").write_text(f'{{"host": "elsewhere", "pid": 7, "counter": {counter}}}')
        clock.now += seconds
        one.look()
        assert one.state.word == word


def test_a_store_that_fails_is_told_and_asked_again(tmp_path, monkeypatch):
    folder, clock = write_training(tmp_path / "run", 60, target=120), Clock()
    one = watched(folder, clock)
    one.look()

    def fail(*_: object, **__: object) -> None:
        raise StorageError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(one.run.found.store, "list", fail)
        clock.now += 3
        assert one.look() == ["not read now: it is away"]
        clock.now += 3
        assert one.look() == []
    assert any("not read now: it is away" in text for text in drawn(one))
    write_log(folder, log_lines(61))
    clock.now += 3
    assert one.look() == ["read again"]
    assert (one.problem, one.run.numbers.last_step) == ("", 61)


def test_slow_looks_are_rare_ones(tmp_path):
    clock = Clock()
    one = watched(write_training(tmp_path / "run"), clock)
    refresh = one.run.refresh

    def slowly() -> bool:
        clock.now += 3
        return refresh()

    one.run.refresh = slowly
    one.look()
    assert one.seconds_left == pytest.approx(2.0)  # the first one reads all there is
    clock.now += 3
    one.look()
    assert one.seconds_left == pytest.approx(30.0)


def test_a_screen_has_a_block_for_each_run(tmp_path):
    ones = [watched(write_training(tmp_path / "a")), watched(write_encoded(tmp_path / "latents"))]
    for one in ones:
        one.look()
    shown = drawn(*ones)
    assert shown[0] == "a  finished: all 60 steps"
    text = "\n".join(shown)
    for said in ("100%", "held out", "main 0.4", "images/s", "checkpoint step 60", "latents  finished: 3 shards"):
        assert said in text, said
    assert "samples   12" in text
    assert "no_caption 6" in text
    assert any("\u2588" in row for row in shown)
    assert max(map(len, shown)) <= 100


def test_a_small_terminal_has_a_row_for_each_run(tmp_path):
    ones = [watched(write_training(tmp_path / name)) for name in "ab"]
    for one in ones:
        one.look()
    shown = drawn(*ones, width=50, height=10)
    assert shown[0].startswith("a finished step 60/60")
    assert shown[1].startswith("b finished step 60/60")
    assert max(map(len, shown)) <= 50
    assert len(shown) <= 10


def test_news_and_runs_fit_a_small_terminal(tmp_path):
    ones = [watched(write_training(tmp_path / f"run-{number}")) for number in range(6)]
    for one in ones:
        one.look()
    shown = drawn(*ones, width=50, height=9, news=["earlier", "b: one", "b: two", "b: three"])
    assert [row.split()[0] for row in shown[:3]] == ["run-0", "run-1", "run-2"]
    assert shown[3:] == ["and 3 more", "b: one", "b: two", "b: three", "q or Ctrl-C leaves; the runs go on"]
    block = len(drawn(ones[0])) - 1  # without the line on keys
    assert len(drawn(ones[0], height=block + 2)) == block + 1
    assert len(drawn(ones[0], height=block + 2, news=["a: one"])) == 3


@pytest.mark.parametrize("width", [1, 2, 20])
def test_the_smallest_terminals_show_what_fits(tmp_path, width):
    ones = [watched(write_training(tmp_path / name, target=120)) for name in "ab"]
    for one in ones:
        one.look()
    for height in (1, 2, 3, 4, 5, 12, 40):
        shown = drawn(*ones, width=width, height=height, news=["a: one", "b: two", "b: three"])
        assert len(shown) <= height
        assert max(map(len, shown)) <= width
        assert shown[0].startswith("a" if width > 1 else "\u2026")


def test_what_has_not_changed_is_not_made_again(tmp_path, monkeypatch):
    one = watched(write_training(tmp_path / "a"))
    one.look()
    made, counted = [], []
    monkeypatch.setattr(figures, "sparkline", lambda *about: made.append(about) or "")
    monkeypatch.setattr(watching, "figures", lambda *about: counted.append(about) or figures.figures(*about))
    console, shown = Console(file=io.StringIO(), width=100, height=40), Screen([one], keys=True)
    console.print(shown)
    count = len(made)
    console.print(shown)
    assert count == len(made) > 0
    small = Console(file=io.StringIO(), width=100, height=4)
    for _ in range(2):
        small.print(shown)
        line(one)
    assert len(counted) == 1


def test_all_is_said_of_all_alone():
    assert [percent(share) for share in (0.0, 0.29, 10_000 / 10_030, 1.0)] == ["0%", "29%", "99%", "100%"]


def test_keys_are_those_of_a_pager_that_reads_along(monkeypatch):
    main, other = pty.openpty()
    before = termios.tcgetattr(other)
    with os.fdopen(other) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp())
        for is_terminal in (True, False):
            monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda answer=is_terminal: answer))
            with Keys() as keys:
                assert keys.there == is_terminal
                assert (termios.tcgetattr(other) == before) != is_terminal
            assert termios.tcgetattr(other) == before
    os.close(main)


def test_a_terminal_without_unicode_has_plain_sparklines(tmp_path):
    one = watched(write_training(tmp_path / "a"))
    one.look()
    assert any(set(row[24:].strip()) <= set(ASCII) and row[24:].strip() for row in drawn(one, encoding="ascii"))


def test_nothing_commands_the_terminal(tmp_path):
    folder = write_training(tmp_path / "a\x1b[31mb")
    log = log_lines(20)
    for one in log:
        one |= {"validation_loss": {"\x1b[2J": 1.0}}
    write_log(folder, log)
    one = watched(folder)
    one.look()
    assert not any("\x1b" in row for row in drawn(one))


def test_in_a_log_it_tells_each_news_once_and_ends(tmp_path, capsys):
    watch([str(write_training(tmp_path / "a")), str(write_encoded(tmp_path / "latents"))], 0.1)
    said = capsys.readouterr().out.splitlines()
    assert [text.split(" ", 1)[1].split(",")[0] for text in said] == [
        "a: finished: all 60 steps",
        "a: step 60/60 (100%)",
        "latents: finished: 3 shards",
        "latents: shards 3",
    ]


def test_an_encode_job_is_followed(tmp_path):
    folder, clock = write_receipts(tmp_path / "latents", [0]), Clock()
    one = watched(folder, clock)
    assert one.look() == ["unfinished: 1 shard stored, no manifest yet: it goes on, or was stopped"]
    write_receipts(folder, [1, 2])
    clock.now += 60
    assert one.look() == []
    assert one.state.word == "running"
    assert line(one) == "shards 3, samples 12, rejected 33.33%, size 3.0 MiB, pace 2.0 shards/min"
    clock.now += 700
    assert one.look() == ["stalled: no new shard for 12 min: 3 shards stored, no manifest yet; or it was stopped"]
    write_encoded(folder)
    clock.now += 60
    assert one.look() == ["finished: 3 shards"]


def test_ctrl_c_leaves_quietly(tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_watch_plainly", stopped)
    watch([str(write_training(tmp_path / "a"))])


def test_what_is_ignored_in_the_background_stays_so(tmp_path, monkeypatch):
    numbers, seen = (signal.SIGQUIT, signal.SIGTSTP), []
    monkeypatch.setattr(job, "_watch_plainly", lambda *_: seen.extend(map(signal.getsignal, numbers)))
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        watch([str(write_training(tmp_path / "run"))])
    finally:
        after = [signal.signal(number, handler) for number, handler in zip(numbers, before, strict=True)]
    assert seen == after == [signal.SIG_IGN] * 2


@pytest.mark.parametrize("number", [*["HUP", "QUIT", "ABRT", "USR1", "USR2", "ALRM", "XCPU", "TERM"]])
def test_who_ends_it_finds_the_terminal_as_it_was(tmp_path, monkeypatch, number):
    ours = signal.Signals[f"SIG{number}"]
    before = signal.getsignal(ours)
    monkeypatch.setattr(job, "_watch_plainly", lambda *_: signal.raise_signal(ours))
    signal.signal(ours, lambda *_: None)  # else this process would end
    try:
        with pytest.raises(SystemExit) as left:
            watch([str(write_training(tmp_path / "run"))])
    finally:
        signal.signal(ours, before)
    assert left.value.code == 128 + ours


@pytest.mark.alone
@pytest.mark.parametrize(("command", "stream"), [("report", "full"), ("watch", "full"), ("watch", "closed")])
def test_an_output_that_takes_nothing_ends_it_in_a_line(tmp_path, command, stream):
    folder = write_training(tmp_path / "run", 60, target=120)
    where = ">/dev/full" if stream == "full" else ">&-"
    line = [sys.executable, "-m", "pipeline", command, str(folder)]
    child = subprocess.run(
        ["bash", "-c", f'"$@" {where}', "bash", *line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    said = "takes nothing: No space left on device" if stream == "full" else "is closed"
    assert child.stderr.splitlines() == [
        f"error: standard output {said}",
        "  send it elsewhere, or make room where it goes",
    ]
    assert child.returncode == 5


@pytest.mark.alone
@pytest.mark.parametrize(
    ("keys", "terminal", "code"),
    [
        ([b"\x1a", b"q"], "xterm-256color", 0),  # Ctrl-Z, which stops no process that has no shell
        ([b"\x03"], "xterm-256color", 0),
        ([b"\x1c"], "xterm-256color", 128 + signal.SIGQUIT),
        ([b"q"], "dumb", 0),
        ([signal.SIGUSR1], "xterm-256color", 128 + signal.SIGUSR1),
        ([signal.SIGHUP], "dumb", 128 + signal.SIGHUP),
    ],
)
def test_in_a_terminal(tmp_path, keys, terminal, code):
    folder = write_training(tmp_path / "run", 60, target=120)
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": terminal, "COLUMNS": "90", "LINES": "30"}
    command = [sys.executable, "-m", "pipeline", "watch", str(folder), "--every", "0.2"]
    child = subprocess.Popen(
        command,
        stdin=other,
        stdout=other,
        stderr=other,
        env=environment,
        start_new_session=True,
        preexec_fn=_own,  # noqa: PLW1509  there is one thread
    )
    before = termios.tcgetattr(other)
    shown = _read_until(main, b"stopped")
    assert termios.tcgetattr(other) != before
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "time": 0, "loss": 0.125}\n')
    shown += _read_until(main, b"0.1250")
    for key in keys:
        if isinstance(key, signal.Signals):
            child.send_signal(key)
        else:
            os.write(main, key)
        if key == b"\x1a" and HIDDEN not in _read_until(main, SHOWN).partition(SHOWN)[2]:
            _read_until(main, HIDDEN)
    assert child.wait(20) == code
    assert termios.tcgetattr(other) == before
    assert (b"\x1b[" in shown) == (terminal != "dumb")
    os.close(other)
    os.close(main)


def _own() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # ignored in what a shell starts in the background
        signal.signal(number, signal.SIG_DFL)


def _read_until(descriptor: int, wanted: bytes) -> bytes:
    shown, deadline = b"", time.monotonic() + 30
    while wanted not in shown:
        assert select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], shown
        shown += os.read(descriptor, 65536)
    return shown


@pytest.mark.alone
def test_whoever_reads_may_leave(tmp_path):
    folder = write_training(tmp_path / "run", 60, target=120)
    command = [sys.executable, "-m", "pipeline", "watch", str(folder), "--every", "0.1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    for step in range(61, 100):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "time": 0, "loss": 0.5}}\n')
        time.sleep(0.1)
        if child.poll() is not None:
            break
    else:
        child.send_signal(signal.SIGKILL)
    assert child.wait(20) == 0
    assert child.stderr is not None
    assert child.stderr.read() == b""
