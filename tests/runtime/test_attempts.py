"""Who may start again: not after mistakes, always when asked to stop, and else as long as starts bring it on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, StorageError
from pipeline.runtime.attempts import LONGEST_PAUSE, START_AGAIN, End, Notes, Record, decide, main
from pipeline.storage import open_store

ends = st.builds(
    End,
    job=st.just("7"),
    code=st.sampled_from([1, 3, 134, 137, 139, 143]),
    asked=st.booleans(),
    progress=st.none() | st.integers(-1, 4),
)


def ended(code: int, progress: int | None = -1, *, asked: bool = False, job: str = "7") -> End:
    return End(job, code, asked, progress)


@pytest.mark.parametrize("code", [0, 2, 4, 5])
@pytest.mark.parametrize("asked", [False, True])
def test_what_is_finished_or_has_to_be_mended_does_not_start_again(code, asked):
    assert not decide(ended(code, 100, asked=asked), Record("7", 3)).again


@pytest.mark.parametrize("code", [1, 3, 137])
def test_failures_are_tried_again_so_many_times_in_a_row(code):
    record, decisions = Record(), []
    for _ in range(5):
        decisions.append(decide(ended(code), record, retries=3))
        record = decisions[-1].record
    assert [decision.again for decision in decisions] == [True, True, True, False, False]
    assert [decision.pause for decision in decisions[:3]] == [1, 2, 3]
    assert decide(ended(code, 12), record).again
    assert decide(ended(code, 12), record).record == Record("7", 12, 0)


def test_no_retries():
    assert not decide(ended(137, 5), Record("7", 5), retries=0).again
    assert decide(ended(137, 6), Record("7", 5), retries=0).again
    assert decide(ended(138, 5, asked=True), Record("7", 5), retries=0).again


def test_another_job_begins_to_count_anew_and_knows_how_far_it_was():
    decision = decide(ended(1, 5, job="8"), Record("7", 5, fruitless=4))
    assert decision.again
    assert decision.record == Record("8", 5, fruitless=1)
    assert decide(ended(1, 2, job="8"), Record("7", 5)).record == Record("8", 2, fruitless=1)
    assert decide(ended(1, 6, job="8"), Record("7", 5)).record == Record("8", 6)


def test_going_back_and_forth_is_no_progress():
    record, agains = Record("7", 20), []
    for progress in (10, 20, 10, 20, 10):
        decision = decide(ended(1, progress), record)
        record = decision.record
        agains.append(decision.again)
    assert agains == [True, True, True, False, False]


def test_while_storage_does_not_tell_nothing_counts_as_progress():
    decision = decide(ended(3, None), Record("7", 5, fruitless=2))
    assert decision.record == Record("7", 5, fruitless=3)


@given(st.lists(ends, max_size=40), st.integers(0, 9))
def test_starts_that_lead_nowhere_are_bounded(history: list[End], retries: int):
    record, fruitless = Record(), 0
    for end in history:
        before, decision = record, decide(end, record, retries)
        record = decision.record
        came_on = end.progress is not None and end.progress > before.progress
        fruitless = 0 if came_on else fruitless + (not end.asked)
        assert decision.again == (end.asked or fruitless <= retries)
        assert decision.pause <= LONGEST_PAUSE
        assert (decision.pause > 0) == (decision.again and not end.asked and not came_on)
        assert record.progress == max(before.progress, -1 if end.progress is None else end.progress)
        assert record.fruitless == fruitless


def call(tmp_path: Path, code: int, progress: int | None = -1, *flags: str, asked: bool = False) -> int:
    def outcome(config: str, overrides: list[str], file: Path) -> tuple[bool, int | None, Notes]:
        assert (config, overrides) == ("my run.yaml", ["steps=-1"])
        return asked, progress, Notes(str(file.parent), file.name)

    record = str(tmp_path / "record.json")
    return main(["--code", str(code), "--job", "7", "--record", record, *flags, "my run.yaml", "steps=-1"], outcome)


def test_the_exit_code_says_whether_and_is_remembered(tmp_path, capsys):
    assert [call(tmp_path, 1, 3) for _ in range(3)] == [START_AGAIN, START_AGAIN + 1, START_AGAIN + 2]
    assert [call(tmp_path, 1, 3, "--retries", "1") for _ in range(2)] == [1, 1]
    assert call(tmp_path, 138, 3, asked=True) == START_AGAIN
    assert call(tmp_path, 138, 3, "--asked") == START_AGAIN
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "starting again: exit code 1, and it has come on since the last start"
    assert said[1] == "starting again: exit code 1, no progress: start 1 of 3 after that"
    assert said[3] == "not started again: exit code 1, and 3 starts in a row have not brought it on"
    assert said[-1] == "starting again: it was asked to stop"


def test_a_mistake_is_not_asked_about(tmp_path, capsys):
    def outcome(*_: object) -> tuple[bool, int | None, Notes]:
        raise ConfigError("told already")

    arguments = ["--job", "7", "--record", str(tmp_path / "r"), "run.yaml"]
    assert main(["--code", "2", *arguments], outcome) == 2
    assert capsys.readouterr().err == "not started again: exit code 2: the run file must be mended first\n"
    assert main(["--code", "137", *arguments], outcome) == 137
    assert capsys.readouterr().err == "not started again, since that cannot be decided: told already\n"


def test_a_record_that_cannot_be_kept_ends_the_job(tmp_path, capsys):
    (tmp_path / "record.json").mkdir()
    assert call(tmp_path, 137) == 137
    assert "cannot be decided" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"job": "7"}', b'{"job": "7", "progress": [], "fruitless": 0}']
)
def test_a_damaged_record_says_nothing(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    assert Notes(str(tmp_path), "r.json").read() == Record()


def test_a_record_is_kept_elsewhere_while_its_place_is_away(tmp_path, monkeypatch):
    usual, spare = tmp_path / "usual", tmp_path / "spare"
    notes = Notes(str(usual), "r.json", spare=Notes(str(spare), "s.json"))
    notes.write(Record("7", 3, 1))
    assert notes.read() == Record("7", 3, 1)
    usual.rename(tmp_path / "away")
    usual.write_text("where the folder was")
    assert notes.read() == Record()
    notes.write(Record("7", 3, 2))
    assert notes.read() == Record("7", 3, 2)
    usual.unlink()
    (tmp_path / "away").rename(usual)
    assert notes.read() == Record("7", 3, 2)
    notes.write(Record("7", 4, 0))
    assert notes.read() == Record("7", 4, 0)
    assert not list(spare.iterdir())
    spare.rename(tmp_path / "also")
    spare.write_text("")
    usual.rename(tmp_path / "away")
    usual.write_text("")
    with pytest.raises(StorageError):
        notes.write(Record("7", 4, 1))


def test_records_are_plain_json(tmp_path):
    Notes(str(tmp_path), "r.json").write(Record("12_3", 400, 1))
    assert open_store(str(tmp_path)).read("r.json") == b'{"job": "12_3", "progress": 400, "fruitless": 1}\n'
