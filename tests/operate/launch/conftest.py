"""Where pipelines are launched from, and one that was submitted to SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_files import write_run_files, written

from pipeline.operate.launch.submissions import Submission


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with run files and a pipeline, to be launched from."""
    write_run_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def submitted(place: Path) -> Submission:
    """The pipeline, as jobs 5, 6 and 7: an array of 8, a training of 4 nodes, an export."""
    submission = written("pipe line.yaml")
    for number, stage in enumerate(submission.record.stages, start=5):
        stage.id = str(number)
    submission.save()
    return submission
