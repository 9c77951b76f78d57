"""How far a training has come, as the decision about another start sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from training_run import Run

from pipeline.runtime import requeue
from pipeline.runtime.attempts import Notes, Record
from pipeline.storage import open_store
from pipeline.train import attempts, first_stage_attempts, first_stage_checkpoint
from pipeline.train.checkpoint import COMPLETE, step_name


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(requeue.VARIABLE, str(tmp_path / "requeue.json"))
    return Run(tmp_path, "nowhere/manifest.json")


def outcome(run: Run) -> tuple[bool, int | None, Notes]:
    return attempts.outcome(str(run.file), ["seed=1"], run.file.with_name("record.json"))


def test_progress_is_the_step_of_the_newest_complete_checkpoint(run):
    assert outcome(run)[:2] == (False, -1)
    for step in (20, 40):
        write_checkpoint(run.store, step, {"weight": {"a": torch.zeros(2)}})
    assert outcome(run)[1] == 40
    run.store.delete([f"{step_name(40)}/{COMPLETE}"])
    assert outcome(run)[1] == 20


def test_the_requeue_file_says_that_it_was_asked_to_stop(run):
    requeue.ask(stopped_by=10)
    assert outcome(run)[0]


def test_the_record_is_in_the_output(run):
    notes = outcome(run)[2]
    notes.write(Record("7", 20))
    assert (run.output / attempts.RECORD).exists()
    assert not run.file.with_name("record.json").exists()


def test_while_the_output_is_away_the_record_is_in_a_file_of_the_job(tmp_path, monkeypatch):
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**away, "LATHE_STORAGE_RETRY_SECONDS": "0"}.items():
        monkeypatch.setenv(name, value)
    run = Run(tmp_path, "nowhere/manifest.json", "s3://bucket/run")
    asked, progress, notes = outcome(run)
    assert (asked, progress) == (False, None)
    notes.write(Record("7", 20, 1))
    assert run.file.with_name("record.json").exists()
    assert notes.read() == Record("7", 20, 1)


def test_train_vae_has_come_as_far_as_its_newest_checkpoint(tmp_path):
    """It saves by schedule alone: nothing says that it was asked to stop, and nothing is left beside its weights."""
    file, output = tmp_path / "train-vae.yaml", tmp_path / "vae"
    file.write_text("job: train-vae\nimages: {shards: images, resolution: 64}\noutput: unset\n")

    def outcome() -> tuple[bool, int | None, Notes]:
        return first_stage_attempts.outcome(str(file), [f"output={output}"], tmp_path / "record.json")

    assert outcome()[:2] == (False, -1)
    for step in (200, 400):
        first_stage_checkpoint.save(open_store(str(output)), {"a": torch.zeros(2)}, {"step": step}, keep=2)
    asked, progress, notes = outcome()
    assert (asked, progress) == (False, 400)
    notes.write(Record("7", 400))
    assert (tmp_path / "record.json").exists()
