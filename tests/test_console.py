"""The progress line: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import console
from pipeline.console import ProgressLine, ProgressTable, duration, printable, say, tell, without_logins
from pipeline.errors import SetupError
from pipeline.train.reporting import COLUMNS

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, line by line, without colours and without what was drawn over in the same way."""
        seen = [ESCAPES.sub("", line).rstrip() for line in re.split(r"[\r\n]", self.getvalue())]
        return [line for i, line in enumerate(seen) if line and line not in seen[:i]]


def terminal(patch: pytest.MonkeyPatch, columns: int = 120) -> Terminal:
    """Take the place of stderr; to be called by the test itself, since pytest sets stderr anew for it."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        patch.delenv(name, raising=False)
    patch.setenv("TERM", "xterm-256color")
    patch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    patch.setattr(sys, "stderr", screen)
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.6, "1 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (3569, "59 min"),
        (3599, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (48 * 3600 - 60, "47 h 59 min"),
        (52 * 3600, "2 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_log_gets_a_line_every_quarter_of_a_minute_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("encode", "shards") as line:
        line.update(0, 12)
        for second in range(1, 32):
            clock[0] += 1
            line.update(second / 3, 12, f"{second} images/s", eta_seconds=400 - second)
        line.update(12, 12, "7 images/s", eta_seconds=0.0)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 5/12 shards after 15 s, 6 min left  15 images/s",
        "encode: 10/12 shards after 30 s, 6 min left  30 images/s",
        "encode: 12/12 shards after 31 s  7 images/s",
    ]


def test_without_an_estimate_a_log_says_none(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("train", "steps") as line:
        clock[0] += 20
        line.update(3, 12)
    assert capsys.readouterr().err.splitlines() == ["train: 3/12 steps after 20 s"]


def test_figures_are_part_of_a_log_s_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressTable("train", "steps", {"loss": 8, "wait": 4}) as line:
        for step in range(1, 31):
            clock[0] += 1
            line.move(step, 30)
            line.row(step, 30, {"loss": f"{1 / step:.4f}", "wait": "3%"}, 120.0 - step)
    assert capsys.readouterr().err.splitlines() == [
        "train: 15/30 steps after 15 s, 105 s left  loss 0.0667  wait 3%",
        "train: 30/30 steps after 30 s  loss 0.0333  wait 3%",
    ]


def test_a_terminal_gets_a_table_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, columns=80)
    figures = {"loss": "0.1234", "rate": "1.50e-03", "norm": "0.812", "images/s": "1234", "wait": "2%", "epoch": "3.25"}
    with ProgressTable("train", "steps", COLUMNS) as line:
        for step in range(1, 24):
            line.row(step, 23, figures, eta_seconds=82_800.0)
        line.row(23, 23, figures, eta_seconds=0.0)
    drawn = [ESCAPES.sub("", text).rstrip() for text in re.split(r"[\r\n]", screen.getvalue())]
    header = "   steps      loss      rate      norm  images/s  wait    epoch         left"
    assert drawn.count(header) == 2
    row = "       1    0.1234  1.50e-03     0.812      1234    2%     3.25  23 h 00 min"
    assert row in drawn
    assert len(row) < 80
    assert "      23    0.1234  1.50e-03     0.812      1234    2%     3.25" in drawn
    assert any(re.fullmatch(r"train ━+ 23/23 steps 0:00:00", text) for text in drawn)


def test_a_failure_is_not_followed_by_progress(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with ProgressLine("train", "steps") as line:
            line.update(3, 12)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err == ""


def test_other_ranks_say_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("train", "steps", visible=False) as line:
        clock[0] += 20
        line.update(3, 12)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_what_is_done_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with ProgressLine("encode", "shards") as line:
        line.update(3.5, 12, "412 images/s, 1.2 % rejected, waiting for decode", eta_seconds=754)
        line._bar.refresh()  # type: ignore[union-attr]
        line.update(12, 12, "400 images/s", eta_seconds=0.0)
    drawn = screen.lines()
    assert any(re.search(r"^encode ━.* +3/12 shards 0:00:00 13 min left$", x) for x in drawn), drawn
    assert "  412 images/s, 1.2 % rejected, waiting for decode" in drawn
    assert re.search(r"^encode ━+ 12/12 shards 0:00:00$", drawn[-2])
    assert drawn[-1] == "  400 images/s"


def test_a_bar_that_nothing_moved_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with ProgressLine("data", "receipts"):
        pass
    assert screen.getvalue().endswith("\r\x1b[2K\x1b[?25h")  # its line is wiped


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_bar_and_note_keep_to_a_line_each_of_any_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    screen = terminal(monkeypatch, columns)
    with ProgressLine("encode", "shards") as line:
        line.update(
            3.5, 12_000, "412 images/s, 1.2 % rejected, 30.1 % filtered, waiting for decode", eta_seconds=11_100
        )
    drawn = screen.lines()
    assert any(re.search(r"^encode .*3/12000 shards 0:00:00 3 h 05 min left$", x) for x in drawn), drawn
    assert all(len(x) <= columns for x in drawn)
    assert any(x.endswith("waiting for decode" if columns >= 80 else "…") for x in drawn)


def test_lines_for_a_person_go_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with ProgressLine("encode", "shards") as line:
        line.update(3, 12, "note")
        console.tell("a [bold]warning[/]")
    assert "a [bold]warning[/]" in screen.lines()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07\r", r"a\x1b[31mb\x07\r"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("gpj.\u202etxt", r"gpj.\u202etxt"),
        ("one\u2028two", r"one\u2028two"),
        ("\udce9.tar", r"\udce9.tar"),
        ("one\ntwo\tthree", "one\ntwo\tthree"),
        ("naïve 猫 🧑\u200d🎤 \u00a0\u3000", "naïve 猫 🧑\u200d🎤 \u00a0\u3000"),
    ],
)
def test_what_would_command_the_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text, one_line=True) == shown.replace("\n", r"\n").replace("\t", r"\t")


def test_nothing_that_is_told_commands_the_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.tell("warning: \x1b[2J.tar\nsecond line")
    with ProgressLine("encode", "shards") as line:
        line.update(1, 1, "at \x1b[2J\nencode: 9/9")
    assert capsys.readouterr().err.splitlines() == [
        r"warning: \x1b[2J.tar",
        "second line",
        r"encode: 1/1 shards after 0 s  at \x1b[2J\nencode: 9/9",
    ]
    screen = terminal(monkeypatch)
    with ProgressLine("encode", "shards") as line:
        line.update(1, 2, "at \x1b[2J")
    assert r"  at \x1b[2J" in screen.lines()


@pytest.mark.parametrize(("stream", "said"), [(None, "is closed"), ("full", "takes nothing: No space left on device")])
def test_what_was_asked_for_and_nobody_gets_is_an_error(
    monkeypatch: pytest.MonkeyPatch, stream: str | None, said: str
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full if stream else None)
        with pytest.raises(SetupError, match=f"standard output {said}") as refused:
            say("words")
    assert refused.value.remedy  # and closing it, with the words still in it, complains no more


@pytest.mark.parametrize("stream", [None, "full"])
def test_nobody_to_tell_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, stream: str | None) -> None:
    with suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails too
        monkeypatch.setattr("sys.stderr", full if stream else None)
        tell("words")
        with ProgressLine("encode", "shards") as line:
            line.update(1, 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@ss@h:9091/x", "http://***@h:9091/x"),
        ("'https://u:pa/ss@h'", "'https://***@h'"),
        ("s3://key:sec/ret@b/0?.tar, s3://b/a@b.tar", "s3://***@b/0?.tar, s3://b/a@b.tar"),
        ("http://token@h/x?sig=1 is away", "http://***@h/x is away"),
        ("http://h:9000/a", "http://h:9000/a"),
        ('"http://127.0.0.1:9000/bucket/a@b.tar"', '"http://127.0.0.1:9000/bucket/a@b.tar"'),
        ("http://minio:9000/data@v2/x, http://[::1]:90/a@b", "http://minio:9000/data@v2/x, http://[::1]:90/a@b"),
        ("https://u:p'w@h/x", "https://***@h/x"),
    ],
)
def test_addresses_are_shown_without_logins(text: str, shown: str) -> None:
    assert without_logins(text) == shown


def test_a_closed_or_full_output_changes_no_exit_code(monkeypatch):
    with Path("/dev/full").open("w") as full:
        full.write("lost")
        for stream in (full, None):
            monkeypatch.setattr("sys.stdout", stream)
            console.flush()
            console.forget_output()
