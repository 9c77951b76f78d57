from __future__ import annotations

import json
import signal

import pytest

from pipeline.errors import StorageError
from pipeline.runtime import requeue


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(requeue.VARIABLE, str(tmp_path / "requeue.json"))
    return tmp_path / "requeue.json"


def test_it_is_written_whole_and_cleared_at_a_start(file):
    requeue.ask(stopped_by=signal.SIGUSR1, step=7, steps=30, checkpoint="s3://b/run/step-00000007")
    told = {"step": 7, "steps": 30, "signal": "SIGUSR1", "checkpoint": "s3://b/run/step-00000007"}
    assert json.loads(file.read_text()) == told
    assert requeue.is_asked()
    assert list(file.parent.iterdir()) == [file]
    requeue.clear()
    requeue.clear()
    assert not requeue.is_asked()


def test_rank_0_alone_writes_it_and_without_the_variable_nobody(file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    requeue.ask(stopped_by=15)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv(requeue.VARIABLE)
    requeue.ask(stopped_by=15)
    requeue.clear()
    assert not file.exists()


def test_where_it_cannot_be_written_the_variable_is_named(file, monkeypatch):
    monkeypatch.setenv(requeue.VARIABLE, str(file / "below" / "x"))
    with pytest.raises(StorageError, match=r"LATHE_REQUEUE_FILE=.*: No such file or directory"):
        requeue.ask(stopped_by=15)


def test_what_is_no_file_stays_what_it_is(file, monkeypatch):
    file.mkdir()
    with pytest.raises(StorageError, match=r"requeue\.json is no file, and would be replaced by one"):
        requeue.clear()
    assert file.is_dir()


def test_it_is_known_at_a_start_that_it_could_not_be_written(file, monkeypatch):
    monkeypatch.setenv(requeue.VARIABLE, str(file.parent / "missing" / "requeue.json"))
    with pytest.raises(StorageError, match=r"LATHE_REQUEUE_FILE=.*No such file or directory"):
        requeue.clear()
