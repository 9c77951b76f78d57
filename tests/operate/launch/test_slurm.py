"""`lathe launch slurm` on a real SLURM of two nodes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from latent_set import save_autoencoder, write_pictures
from monitoring import wait_until
from slurm import HOST, Slurm
from training_run import ROOT, SMALL

from pipeline import runfile
from pipeline.config import SiteConfig
from pipeline.errors import SetupError, StorageError
from pipeline.metrics import read_log
from pipeline.operate.launch import local
from pipeline.operate.launch import slurm as submitting
from pipeline.operate.launch.cancelling import cancel
from pipeline.operate.launch.stages import Pipeline, read_pipeline
from pipeline.operate.launch.states import StageState, states
from pipeline.operate.launch.submissions import Submission, load
from pipeline.storage import open_store

pytestmark = pytest.mark.slurm
ODD = 'it\'s; a "run" $(touch owned) 100%j\nof two lines'
FAST = """#!/bin/sh
# Stands in for the interpreter, and takes no time to start.
printf '%s\\n' "$*" >>{seen}
case "$* task=$SLURM_ARRAY_TASK_ID" in *{failing}*) echo "it went wrong" >&2; exit 7 ;; esac
"""


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return slurm


def write_run_files(place: Path, root: str) -> Path:
    files: dict[str, dict[str, Any]] = {
        "encode": {
            "images": {"shards": str(place / "images"), "resolution": 32},
            "autoencoder": str(place / "vae"),
            "output": "${root}/latents",
            "max_reject_rate": 0.5,
            "threads": 1,
            "text": {"context_length": 8},
        },
        "train": {"manifest": "${root}/latents/manifest.json", "output": "${root}/run", **SMALL, "steps": 4},
        "export": {"run": "${root}/run", "autoencoder": str(place / "vae"), "output": "${root}/export"},
    }
    for job, fields in files.items():
        (place / f"{job}.yaml").write_text(yaml.safe_dump({"job": job, "root": "unset", **fields}))
    stages = {name: {"config": f"{name}.yaml"} for name in files}
    stages["encode"] |= {"tasks": 2, "at_once": 2}
    stages["train"] |= {"nodes": 2}
    pipeline = place / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"job": "launch", "root": root, "stages": stages}, sort_keys=False))
    return pipeline


def state_of(submission: Submission) -> dict[str, str]:
    return {one.record.name: one.state for one in states(submission)}


def wait_for(submission: Submission, wanted: Callable[[list[StageState]], bool], seconds: float = 60) -> None:
    wait_until(lambda: wanted(states(submission)), seconds, f"{submission.name}: {state_of(submission)}")


def are_over(found: list[StageState]) -> bool:
    return not any(one.state in ("waiting", "running") for one in found)


def logs(submission: Submission) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(submission.folder.glob("*.log")))


NODES = {"interface": "lo", "environment": {"MASTER_ADDR": HOST, "NPROC": 1}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    write_pictures(folder / "images")
    save_autoencoder(folder / "vae")
    return folder


@pytest.mark.ranks
@pytest.mark.long
def test_a_pipeline_whose_training_is_preempted_ends_like_another(cluster, place, monkeypatch):
    monkeypatch.chdir(place)
    pipeline = read_pipeline([str(write_run_files(place, "out")), "train.steps=60"]).with_finalizers()
    submission = submitting.launch(pipeline, SiteConfig.model_validate(NODES), None, place)

    def losses(run: str) -> list[float]:
        try:
            return [line["loss"] for line in read_log(open_store(run)) if "loss" in line]
        except StorageError:
            return []

    wait_until(lambda: len(losses("out/run")) >= 5, 400, "five steps")
    cluster.run("scancel", "--batch", "--signal=USR1", submission.stage("train").id)
    wait_until(lambda: are_over(states(submission)), 400, "the pipeline to be over")
    assert set(state_of(submission).values()) == {"finished"}, logs(submission)
    assert "1 restart" in states(submission)[2].said

    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    undisturbed = ["train.steps=60", "train.output=undisturbed", "export.run=undisturbed", "export.output=other"]
    here = read_pipeline(["train.yaml", "export.yaml", "root=out", *undisturbed])
    local.launch(here.on_one_machine(None), None, place)
    assert len(losses("out/run")) == 60
    assert losses("out/run") == losses("undisturbed")
    weights = {file.relative_to("out/export") for file in Path("out/export").rglob("*.safetensors")}
    assert weights
    for file in weights:
        assert Path("out/export", file).read_bytes() == Path("other", file).read_bytes(), file


@pytest.mark.ranks
def test_a_pipeline_runs_to_an_export_on_two_nodes(cluster, tmp_path, place):
    pipeline = write_run_files(place, "out; $(touch owned)")
    site = place / "site.yaml"
    site.write_text(yaml.safe_dump(NODES))

    def lathe(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "launch", *arguments],
            env={**os.environ, "LATHE_SITE": str(site), "OMP_NUM_THREADS": "1"},
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    before = set(place.iterdir())
    dry = lathe("slurm", str(pipeline), "train.seed=3", "--dry-run")
    assert set(place.iterdir()) == before
    assert dry.stderr.count(" to start at ") == 4, dry.stderr  # SLURM took each of them
    lathe("slurm", str(pipeline), "train.seed=3")
    (folder,) = (place / "lathe-launches").iterdir()
    submission = load(folder)
    assert [stage.name for stage in submission.record.stages] == ["encode", "encode-finalize", "train", "export"]
    assert "waiting" in lathe("status").stdout
    wait_until(lambda: are_over(states(submission)), 400, "the pipeline to be over")
    assert set(state_of(submission).values()) == {"finished"}, logs(submission)

    output = place / "out; $(touch owned)"
    assert json.loads((output / "export" / "model_index.json").read_text())["_class_name"]
    assert runfile.load_any(str(output / "run" / "run.yaml")).model_dump()["seed"] == 3
    assert "2 of 2 finished" in lathe("status").stdout
    assert "export opens with diffusers" in lathe("logs", "--follow", "--stage", "export").stdout
    assert "ranks       2 on cpu" in (folder / "train.log").read_text()
    assert (folder / "encode.1.log").exists()
    assert not list(tmp_path.rglob("owned"))


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Callable[..., tuple[Pipeline, SiteConfig]]:
    """A pipeline whose interpreter does nothing but note its arguments, and fail where they hold a word."""
    monkeypatch.chdir(tmp_path)

    def make(failing: str = "nothing", extra: tuple[str, ...] = (), **site: Any) -> tuple[Pipeline, SiteConfig]:
        python = tmp_path / "a python"
        python.write_text(FAST.format(seen=shlex.quote(str(tmp_path / "seen")), failing=failing))
        python.chmod(0o755)
        files = {
            "pack": {"source": "photos", "output": "images"},
            "sample": {"run": "run", "autoencoder": "vae", "prompts": ["a; $(b)"], "output": "pictures"},
            "export": {"run": "run", "autoencoder": "vae", "output": "export"},
        }
        for job, fields in files.items():
            (tmp_path / f"{job}.yaml").write_text(yaml.safe_dump({"job": job, **fields}))
        pipeline = read_pipeline([f"{job}.yaml" for job in files])
        return pipeline, SiteConfig.model_validate({"python": str(python), "slurm": {"extra": extra}, **site})

    return make


def test_a_stage_that_fails_ends_what_waits_for_it(cluster, tmp_path, quick):
    submission = submitting.launch(*quick(failing="sample"), None, tmp_path)
    wait_for(submission, are_over)
    assert state_of(submission) == {"pack": "finished", "sample": "failed", "export": "cancelled"}, logs(submission)
    failed = states(submission)[1]
    assert failed.said == "exit code 7"
    folder = submission.folder
    assert (tmp_path / "seen").read_text().splitlines() == [
        f"-m pipeline pack {folder}/pack.yaml",
        f"-m pipeline sample {folder}/sample.yaml",
    ]


def test_a_task_that_fails_leaves_the_rest_to_the_last_worker(cluster, tmp_path, quick):
    _, site = quick(failing="task=1")
    write_run_files(tmp_path, "out")
    pipeline = read_pipeline(["pack.yaml", "encode.yaml", "export.yaml", "encode.images.shards=images"], tasks=2)
    submission = submitting.launch(pipeline.with_finalizers(), site, None, tmp_path)
    wait_for(submission, are_over)
    found = {one.record.name: one for one in states(submission)}
    assert {one.state for one in found.values()} == {"finished"}, logs(submission)
    assert found["encode"].said.startswith("1 of 2 finished, 1 of 2 failed, ")
    assert found["encode"].said.endswith("; encode-finalize did the rest")


def test_the_last_worker_does_not_begin_where_the_array_could_not(cluster, tmp_path, quick):
    _, site = quick(failing="pack")
    write_run_files(tmp_path, "out")
    pipeline = read_pipeline(["pack.yaml", "encode.yaml", "encode.images.shards=images"], tasks=2)
    submission = submitting.launch(pipeline.with_finalizers(), site, None, tmp_path)
    wait_for(submission, are_over)
    assert state_of(submission) == {"pack": "failed", "encode": "cancelled", "encode-finalize": "cancelled"}


def test_what_waits_is_cancelled_and_nothing_of_others(cluster, tmp_path, quick):
    submission = submitting.launch(*quick(extra=["--hold"]), None, tmp_path)
    other = submitting.launch(*quick(extra=["--hold"]), None, tmp_path)
    assert set(state_of(submission).values()) == {"waiting"}
    assert cancel(submission, "sample") == ["sample", "export"]
    wait_for(submission, lambda found: [one.state for one in found] == ["waiting", "cancelled", "cancelled"])
    submission.stage("pack").id = other.stage("pack").id  # as in a cluster whose ids have begun anew
    assert state_of(submission)["pack"] == "forgotten"
    submitting.cancel(submission, "pack", other.stage("pack").id)
    assert set(state_of(other).values()) == {"waiting"}
    assert cancel(other, None) == ["pack", "sample", "export"]
    assert cancel(other, None) == []


def test_a_job_that_slurm_refuses_takes_those_before_with_it(cluster, tmp_path, quick):
    pipeline, site = quick(extra=["--hold"], slurm_by_command={"export": {"partition": "nix"}})
    with pytest.raises(submitting.SlurmError) as caught:
        submitting.dry_run(pipeline, site, None, tmp_path)
    assert caught.value.message.startswith("stage export: sbatch: ")
    assert "Invalid partition name" in caught.value.message
    with pytest.raises(submitting.SlurmError) as caught:
        submitting.launch(pipeline, site, None, tmp_path)
    assert caught.value.message.startswith("stage export was not submitted: ")
    assert caught.value.message.endswith("; the 2 submitted before were cancelled")
    (folder,) = (tmp_path / "lathe-launches").iterdir()
    wait_for(load(folder), lambda found: [one.state for one in found] == ["cancelled"] * 3)


def test_slurm_that_does_not_answer_and_none_at_all(cluster, tmp_path, quick, monkeypatch):
    submission = submitting.launch(*quick(extra=["--hold"]), None, tmp_path)
    configuration = Path(os.environ["SLURM_CONF"])
    dead = configuration.with_name("dead.conf")
    text = configuration.read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    dead.write_text(text.replace("MessageTimeout=30", "MessageTimeout=2"))
    cancel(submission, None)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(dead))
        with pytest.raises(submitting.SlurmError, match="SLURM does not answer: "):
            states(submission)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="sbatch is not on the PATH"):
        submitting.launch(*quick(), None, tmp_path)
    assert submitting.dry_run(*quick(), None, tmp_path)[1] == ["there is no sbatch here: the scripts were not tried"]
