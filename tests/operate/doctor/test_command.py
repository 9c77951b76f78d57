"""`lathe doctor`: its exit codes, its table, its JSON; checks that fail themselves or hang."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest

from pipeline.cli import main
from pipeline.errors import DataError
from pipeline.operate.doctor import page, versions
from pipeline.operate.doctor.finding import Check, Doubt, Finding, examine


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lathe", "doctor", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_a_healthy_run(monkeypatch, capsys, train_file):
    assert run(monkeypatch, str(train_file), "--strict") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("pass  ") for line in lines[:-1])
    assert lines[-1] == f"{len(lines) - 1} pass, 0 warn, 0 fail"


def test_a_warning_counts_where_one_is_strict(monkeypatch, capsys, train_file):
    warned = "checkpoint.keep=1000000"
    assert run(monkeypatch, str(train_file), warned) == 0
    assert run(monkeypatch, str(train_file), warned, "--strict") == 5
    assert capsys.readouterr().out.count("\nwarn  disk ") == 2


def test_a_failure_has_a_code_of_its_own(monkeypatch, capsys, train_file):
    assert run(monkeypatch, str(train_file), "--ranks", "3") == 5
    output = capsys.readouterr()
    lines = output.out.splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("fail  batch "))
    assert lines[number + 1].strip() == "set global_batch to 6 or 9, or start another number of ranks"
    assert output.err == ""
    assert run(monkeypatch, "nowhere.yaml") == 5
    assert "fail  config " in capsys.readouterr().out


def test_json_for_programs(monkeypatch, capsys, train_file):
    assert run(monkeypatch, str(train_file), "--json", "--ranks", "3") == 5
    tree = json.loads(capsys.readouterr().out)
    assert tree["well"] is False
    (batch,) = (finding for finding in tree["findings"] if finding["verdict"] == "fail")
    assert (batch["check"], batch["ranks"]) == ("batch", "")
    assert batch["remedy"].startswith("set global_batch")


def test_on_a_terminal_it_is_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    page.show([Finding("disk", "fail", "no room " * 20, "free some", "rank 1"), Finding("python", "pass", "3.11")])
    lines = [re.sub("\x1b\\[[\\d;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 60
    assert lines[1].split()[:4] == ["fail", "disk", "rank", "1:"]
    assert any(line.strip() == "free some" for line in lines)
    assert lines[-1] == "1 pass, 0 warn, 1 fail"


def test_what_others_say_commands_no_terminal_and_tells_no_password(capsys):
    page.show([Finding("disk", "fail", "a\x1b[2Jb\nok  all", "see http://me:pw1@host/x")])
    said = capsys.readouterr().out
    assert r"a\x1b[2Jb\nok  all" in said
    assert "pw1" not in said


class TestChecks:
    def test_each_way_that_they_end(self):
        def refuse() -> str:
            raise DataError("it is damaged", "copy it again")

        def break_down() -> str:
            raise ZeroDivisionError("by zero\nand more")

        found = examine(
            [
                Check("fine", lambda: "all is well"),
                Check("doubtful", lambda: Doubt("it may be", "look at it")),
                Check("refused", refuse),
                Check("broken", break_down),
                Check("behind", lambda: "never looked at", after=("refused",)),
                Check("behind that", lambda: "never looked at", after=("fine", "behind")),
                Check("beside", lambda: "well", after=("fine", "doubtful", "not asked about")),
            ]
        )
        assert found == [
            Finding("fine", "pass", "all is well"),
            Finding("doubtful", "warn", "it may be", "look at it"),
            Finding("refused", "fail", "it is damaged", "copy it again"),
            Finding(
                "broken",
                "fail",
                "the check itself failed: ZeroDivisionError: by zero",
                "mend what it names, or report it if there is nothing to mend",
            ),
            Finding("behind", "warn", "not looked at, since refused failed", "mend refused first"),
            Finding("behind that", "warn", "not looked at, since refused failed", "mend refused first"),
            Finding("beside", "pass", "well"),
        ]

    def test_one_that_hangs_is_left_behind(self):
        began = time.monotonic()
        slow = Check("slow", lambda: time.sleep(5) or "", seconds=0.05, if_late="look at the network")
        found = examine([slow, Check("next", lambda: "well")])
        assert time.monotonic() - began < 2
        assert found[0] == Finding("slow", "fail", "no answer within 0 s", "look at the network")
        assert found[1].verdict == "pass"

    def test_one_that_breaks_in_a_run_is_no_stack(self, training, monkeypatch):
        def surprise(name: str) -> str:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(versions, "version", surprise)
        found = training()["packages"]
        assert found.verdict == "fail"
        assert "OSError: [Errno 5] Input/output error" in found.said
