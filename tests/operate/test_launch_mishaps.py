"""`lathe launch` where names are odd, records damaged, launches interrupted, and whoever watched has left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import runfile
from pipeline.cli import launching
from pipeline.config import SiteConfig
from pipeline.errors import ConfigError, SetupError, StorageError
from pipeline.operate.launch import local, sequence, slurm, submissions
from pipeline.operate.launch.logs import show
from pipeline.operate.launch.sites import find_site
from pipeline.operate.launch.stages import read_pipeline
from pipeline.operate.launch.states import states

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
EXPORT = {"job": "export", "run": "run", "autoencoder": "vae", "output": "export"}
ENCODE = {"job": "encode", "images": {"shards": "images", "resolution": 64}, "autoencoder": "vae", "output": "latents"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for fields in (EXPORT, ENCODE):
        (tmp_path / f"{fields['job']}.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(folder: Path, *files: str) -> submissions.Submission:
    pipeline = read_pipeline(files or ["export.yaml"])
    submission = submissions.plan(pipeline, "slurm", None, folder)
    submissions.write(submission, pipeline)
    return submission


# names


def test_a_value_may_be_longer_than_names_of_files_are(place):
    (stage,) = read_pipeline(["export.yaml", f"output={'x' * 300}"]).stages
    assert stage.config.output == "x" * 300  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no such submission"):
        submissions.find("x" * 300)
    (place / "pipeline.yaml").write_text(yaml.safe_dump({"job": "launch", "stages": {"a": {"config": "y" * 300}}}))
    with pytest.raises(ConfigError, match="yyy"):
        read_pipeline(["pipeline.yaml"])


@pytest.mark.parametrize("name", ["submission", "a-finalize"])
def test_stages_have_no_names_of_files_that_are_there_already(place, name):
    tree = {"job": "launch", "stages": {"a": {"config": "encode.yaml", "tasks": 2}, name: {"config": "export.yaml"}}}
    (place / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=f"{name} is a name that lathe launch uses itself"):
        read_pipeline(["pipeline.yaml"])


def test_a_tasks_log_is_no_other_stages(place):
    submission = submitted(place, "encode.yaml", "encode.yaml", "encode-2.output=other")
    first, second = submission.record.stages
    assert submission.log(first, 2) != submission.log(second)


@pytest.mark.parametrize("given", ["~/python", "$HOME/python", "/opt/${VERSION}/python"])
def test_what_a_shell_would_replace_is_no_interpreter(given):
    with pytest.raises(ValueError, match="write the whole path out"):
        SiteConfig.model_validate({"python": given})


@pytest.mark.parametrize("value", ["2026-11-31", "0b_", "[" * 2000])
def test_what_is_no_yaml_after_all(place, value):
    with pytest.raises(ConfigError):
        runfile.load_any("export.yaml", [f"output={value}"])
    (place / "export.yaml").write_text(f"job: export\noutput: {value}\n")
    with pytest.raises(ConfigError):
        runfile.load_any("export.yaml")


def test_a_home_that_cannot_be_looked_into_has_no_site():
    assert find_site(None, {"XDG_CONFIG_HOME": "x" * 300}) == SiteConfig()


# folders and records


def test_two_launches_at_the_same_instant_have_folders_of_their_own(place):
    pipeline = read_pipeline(["export.yaml"])
    first, second = (submissions.plan(pipeline, "local", None, place) for _ in range(2))
    assert first.folder == second.folder
    assert submissions.claim(first)
    assert not submissions.claim(second)
    assert sequence.begin(pipeline, "local", None, place).folder != first.folder


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
        ("(?s).*", "[" * 2000),
        ("(?s).*", ""),
    ],
)
def test_a_damaged_record_is_told_and_no_other_is_taken_for_it(place, before, after):
    import re

    submitted(place)
    newest = submitted(place)
    file = newest.folder / submissions.RECORD
    file.write_text(re.sub(before, after, file.read_text(), count=1))
    for address in (newest.name, None):
        with pytest.raises(ConfigError, match=f"{newest.name}/submission.yaml is no record that this version"):
            submissions.find(address)


def test_a_record_that_was_damaged_long_ago_is_in_nobodys_way(place):
    old, newest = submitted(place), submitted(place)
    (old.folder / submissions.RECORD).write_text("?")
    os.utime(old.folder / submissions.RECORD, (0, 0))
    assert submissions.find(None).name == newest.name


def test_the_folder_that_one_is_in_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SetupError, match="the current folder is not there any more"):
        launching._here()


# submitting


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, ...]]:
    """What SLURM was asked; it takes one job, and is interrupted at the second."""
    calls: list[tuple[str, ...]] = []

    def ask(program: str, *arguments: str, **_: Any) -> str:
        calls.append((program, *arguments))
        if program == "sbatch" and len(calls) > 1:
            raise KeyboardInterrupt
        return "71\n"

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.programs, "found", lambda program, _: program)
    return calls


def test_a_launch_that_is_interrupted_leaves_no_job(place, asked, capsys):
    pipeline = read_pipeline(["encode.yaml", "export.yaml", "export.autoencoder=vae"])
    with pytest.raises(KeyboardInterrupt):
        slurm.launch(pipeline, SiteConfig(), None, place)
    name = submissions.find(None).name
    assert asked[-2] == ("scancel", f"--name={name}.encode", "71")
    assert asked[-1][:2] == ("scancel", f"--name={name}.export")
    assert capsys.readouterr().err == f"{name}: stopped while it was submitted; the 1 submitted before were cancelled\n"


def test_a_job_that_was_not_noted_is_found_by_its_name(place, monkeypatch):
    submission = submitted(place)
    line = f"JobId=9 JobName={submission.name}.export JobState=PENDING Reason=Priority\n"
    said = {"squeue": "9\n", "scontrol": line}
    monkeypatch.setattr(slurm, "ask", lambda program, *_, **__: said[program])
    assert [(one.record.id, one.state) for one in states(submission)] == [("9", "waiting")]
    said["squeue"] = ""
    assert [(one.record.id, one.state) for one in states(submissions.find(None))] == [("", "cancelled")]


def test_variables_of_sbatch_overrule_no_script(monkeypatch):
    for name in ("JOB_NAME", "ARRAY_INX", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    assert {name for name in slurm._outside_of_jobs() if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


# on this machine

WATCHED = """
import sys
from pathlib import Path
from pipeline.operate.launch import local
from pipeline.operate.launch.stages import read_pipeline

code = "import time\\nfor n in range(20): print(n, flush=True); time.sleep(0.1)"
local._commands = lambda submission, stage: [[sys.executable, "-c", code]]
local.launch(read_pipeline(["export.yaml"]), None, Path.cwd())
"""


@pytest.mark.alone
def test_a_stage_goes_on_where_whoever_watched_has_left(place):
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHED], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "0\n"
    child.stdout.close()
    assert child.wait(60) == 0
    submission = submissions.find(None)
    assert [one.state for one in states(submission)] == ["finished"]
    assert submission.log(submission.record.stages[0]).read_text().endswith("\n19\n")


def test_one_worker_is_told_that_it_is_alone(place):
    (command,) = local.dry_run(read_pipeline(["encode.yaml"]).on_one_machine(None), None, place).splitlines()
    assert " encode --task 0/1 " in command


@pytest.mark.parametrize(("lines", "shown"), [(0, []), (1, ["b"]), (9, ["a", "b"])])
def test_a_line_without_an_end_is_a_line(tmp_path, capsys, lines, shown):
    log = tmp_path / "x.log"
    log.write_text("a\nb")
    show(lambda: {"": log}, lines)
    assert capsys.readouterr().out.splitlines() == shown
