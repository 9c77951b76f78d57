"""Submissions: their folders and records, found, damaged, and made at the same instant."""

from __future__ import annotations

import os
import re

import pytest
from launch_files import written

from pipeline.errors import ConfigError, StorageError
from pipeline.operate.launch import sequence, submissions
from pipeline.operate.launch.stages import read_pipeline


def test_submissions_are_found_by_name_folder_and_as_the_newest(submitted, place):
    assert submissions.find(None).name == submitted.name
    assert submissions.find(submitted.name).record == submitted.record
    assert submissions.find(str(submitted.folder)).folder == submitted.folder
    with pytest.raises(ConfigError, match="nix: no such submission") as caught:
        submissions.find("nix")
    assert submitted.name in caught.value.remedy


def test_nothing_was_launched_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nothing was launched from here"):
        submissions.find(None)


def test_two_launches_at_the_same_instant_have_folders_of_their_own(place):
    pipeline = read_pipeline(["export.yaml"])
    first, second = (submissions.plan(pipeline, "local", None, place) for _ in range(2))
    assert first.folder == second.folder
    assert submissions.claim(first)
    assert not submissions.claim(second)
    assert sequence.begin(pipeline, "local", None, place).folder != first.folder


def test_a_tasks_log_is_no_other_stages(place):
    submission = written("encode.yaml", "encode.yaml", "encode-2.output=other")
    first, second = submission.record.stages
    assert submission.log(first, 2) != submission.log(second)


def test_a_folder_of_submissions_that_is_gone(place):
    (place / "lathe-launches").symlink_to(place / "purged")
    with pytest.raises(StorageError, match="cannot be written: File exists"):
        sequence.begin(read_pipeline(["export.yaml"]), "local", None, place)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("created: .*", "created: 2026-13-41 00:00:00"),
        ("created: .*", "created: 2026-11-23 00:00:00"),
        ("stages:", "stages: []\nother:"),
        ("place: slurm", "place: slurm\nprocess: [-1, 0.0]"),
        ("place: slurm", "place: moon"),
        ("version:", "novelty: 1\nversion:"),
        ("(?s).*", "[" * 500),
        ("(?s).*", ""),
    ],
)
def test_a_damaged_record_is_told_and_no_other_is_taken_for_it(place, before, after):
    written("export.yaml")
    newest = written("export.yaml")
    file = newest.folder / submissions.RECORD
    file.write_text(re.sub(before, after, file.read_text(), count=1))
    for address in (newest.name, None):
        with pytest.raises(ConfigError, match=f"{newest.name}/submission.yaml is no record that this version"):
            submissions.find(address)


def test_a_record_that_was_damaged_long_ago_is_in_nobodys_way(place):
    old, newest = written("export.yaml"), written("export.yaml")
    (old.folder / submissions.RECORD).write_text("?")
    os.utime(old.folder / submissions.RECORD, (0, 0))
    assert submissions.find(None).name == newest.name


def test_a_submission_that_cannot_be_noted_leaves_no_folder(place, monkeypatch):
    monkeypatch.setattr(
        submissions, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        written("export.yaml")
    assert list(submissions.FOLDER.iterdir()) == []
