"""Batch scripts for SLURM: what they ask for, and that no value of a run file is in them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch_files import site

from pipeline import runfile
from pipeline.config import ExportConfig, SampleConfig
from pipeline.errors import ConfigError
from pipeline.operate.launch import scripts, submissions
from pipeline.operate.launch.scripts import render
from pipeline.operate.launch.stages import Pipeline, Stage, read_pipeline

STEP = Path(__file__).parents[3] / "launchers/slurm_step.sh"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)

NASTY = st.one_of(
    TEXT, st.sampled_from(["a b", "it's", '"', "; rm -rf x", "$(touch y)", "`id`", "a\nb", "\\", "-n", "*"])
)

ANY_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def export_stage(**fields: Any) -> Stage:
    config = ExportConfig.model_validate({"run": "r", "autoencoder": "v", "output": "o", **fields})
    return Stage("export", config)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_what_stages_ask_of_slurm(place):
    cluster = site(
        slurm={
            "partition": "gpu", "gpus_per_node": 8, "cpus_per_task": 64, "time": "2-00:00:00",
            "extra": ["--comment=a b"],
        },
        slurm_by_command={"encode": {"cpus_per_task": 8}, "export": {"partition": "cpu", "extra": []}},
    )  # fmt: skip
    pipeline = read_pipeline(["pipe line.yaml", "stages.learn.slurm={time: '12:00:00', signal_seconds: 900}"])
    encode, learn, export = (
        directives(render(stage, cluster, name="n", folder=place, directory=place)) for stage in pipeline.stages
    )
    common = ["--requeue", "--open-mode=append"]
    assert encode == [
        "--job-name=n.encode", "--nodes=1", "--ntasks-per-node=1", "--array=0-7%3", "--partition=gpu",
        "--time=2-00:00:00", "--gpus-per-node=1", "--cpus-per-task=8", *common, "--signal=B:USR1@300",
        '--comment="a b"',
    ]  # fmt: skip
    assert learn == [
        "--job-name=n.learn", "--nodes=4", "--ntasks-per-node=1", "--partition=gpu", "--time=12:00:00",
        "--gpus-per-node=8", "--cpus-per-task=64", *common, "--signal=B:USR1@900", '--comment="a b"',
    ]  # fmt: skip
    assert export == [
        "--job-name=n.export", "--nodes=1", "--ntasks-per-node=1", "--partition=cpu", "--time=2-00:00:00",
        "--cpus-per-task=64", *common,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:00", 300), ("0:05:00", 300), ("0-0:05", 300), ("1-1", 90000), ("1-01:00:01", 90001)],
)
def test_a_job_has_time_to_save(place, time, seconds):
    (train,) = read_pipeline(["train.yaml"]).stages

    def rendered(signal_seconds: int) -> str:
        asked = site(slurm={"time": time, "signal_seconds": signal_seconds})
        return render(train, asked, name="n", folder=place, directory=place)

    if seconds < 65535:
        with pytest.raises(
            ConfigError, match=f"stage train: slurm.time: {time}, which is {seconds} s, is over within signal_sec"
        ):
            rendered(seconds)
    assert site(slurm={"time": time}).slurm.time_seconds == seconds
    assert f"--time={time}" in directives(rendered(min(seconds, 65535) - 1))


def test_modules_variables_and_containers(tmp_path):
    pyxis = {"image": "reg#lathe:1", "mounts": ["/data:/data"]}
    cluster = site(
        modules=["cuda/12.4"], container=pyxis, interface="ib0", scratch="/scratch", slurm={"cpus_per_task": 4}
    )
    script = render(export_stage(), cluster, name="n", folder=tmp_path / "f", directory=tmp_path)
    assert script.startswith("#!/bin/bash -l\n")
    assert "\nmodule load cuda/12.4 || exit 5\n" in script
    for name, value in {
        "PYTHON": "python",
        "LATHE_INTERFACE": "ib0",
        "TMPDIR": "/scratch",
        "SRUN_CPUS_PER_TASK": 4,
    }.items():
        assert f"\nexport {name}={value}\n" in script
    mounts = f"{tmp_path}/f:{tmp_path}/f,{tmp_path}:{tmp_path},/scratch:/scratch,/data:/data"
    options = f"--container-image=reg#lathe:1\n--container-mounts={mounts}\n--container-workdir={tmp_path}"
    assert f"export LATHE_SRUN_OPTIONS={shlex.quote(options)}\n" in script
    apptainer = site(container={**pyxis, "runtime": "apptainer"}, python="/opt/python")
    script = render(export_stage(), apptainer, name="n", folder=tmp_path / "f", directory=tmp_path)
    assert f"export PYTHON={tmp_path}/f/{scripts.PYTHON}\n" in script
    inside = scripts.python_in_container(apptainer, apptainer.container, tmp_path / "f", tmp_path)
    assert inside.splitlines()[1].endswith("--bind /data:/data 'reg#lathe:1' /opt/python \"$@\"")
    with pytest.raises(ConfigError, match="a container cannot mount a folder with a colon"):
        render(export_stage(), cluster, name="n", folder=tmp_path / "a:b", directory=tmp_path)


PROGRAM = '#!/bin/bash\nprintf "%s\\0" "$PWD" "$VALUE" "$PYTHON" "$@" >"$SEEN"\n'


def run(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {"SLURM_JOB_ID": "7", **environment}
    return subprocess.run(
        ["bash", "-s"], input=script.encode(), env=variables, capture_output=True, check=False, cwd="/"
    )


@ANY_FOLDER
@given(folder=NASTY, value=NASTY, python=NASTY, launcher=st.booleans())
def test_bash_gives_the_program_what_was_meant(tmp_path, monkeypatch, folder, value, python, launcher):
    """A rendered script, run by bash, with a program in the place of srun, or of a launcher."""
    here = tmp_path / "x" / ("".join(sign for sign in folder if sign != "/")[:20] or "f")
    if here.name in (".", "..") or not python.isprintable() or re.search(r"^~|\$[A-Za-z_{]", python):
        return
    here.mkdir(parents=True, exist_ok=True)
    for name in ("srun", "slurm_train.sh"):
        (here / name).write_text(PROGRAM)
        (here / name).chmod(0o755)
    shutil.copy(STEP, here)
    monkeypatch.setattr(scripts.runfile, "bundled", lambda name: here / Path(name).name)
    stage = Stage("train", runfile.load_any("configs/demo/train.yaml")) if launcher else export_stage()
    script = render(stage, site(environment={"VALUE": value}, python=python), name="n", folder=here, directory=here)
    assert all(line.startswith("#SBATCH --") for line in script.splitlines() if "SBATCH" in line)
    seen = tmp_path / "seen"
    path = f"{here}:{os.environ['PATH']}" if ":" not in str(here) else os.environ["PATH"]
    done = run(script, PATH=path, SEEN=str(seen))
    if ":" in str(here) and not launcher:  # srun cannot be put on the PATH there
        return
    assert done.returncode == 0, done.stderr
    run_file = str(here / f"{stage.name}.yaml")
    step = ["--kill-on-bad-exit=0", "--wait=1200", "--ntasks=1", python, "-m", "pipeline", "export", run_file]
    arguments = [run_file] if launcher else step
    assert seen.read_bytes().decode().split("\0")[:-1] == [str(here.resolve()), value, python, *arguments]


@ANY_FOLDER
@given(prompts=st.lists(NASTY, min_size=1, max_size=3), output=NASTY)
def test_values_reach_the_program_through_the_run_file(tmp_path, prompts, output):
    config = SampleConfig.model_validate({"run": "r", "autoencoder": "v", "prompts": prompts, "output": f"o/{output}"})
    pipeline = Pipeline("n", (Stage("sample", config),))
    submission = submissions.plan(pipeline, "slurm", tmp_path, tmp_path)
    if "${" in "".join((*prompts, output)):  # a reference: no run file has it left
        return
    submissions.write(submission, pipeline)
    assert runfile.load_any(str(submission.run_file(pipeline.stages[0]))) == config


@pytest.mark.parametrize("name", ["export", "train", "encode"])
def test_scripts_pass_shellcheck(tmp_path, place, name):
    (stage,) = read_pipeline([f"{name}.yaml"]).stages
    cluster = site(modules=["a"], environment={"A": "$(b) 'c'"}, container={"image": "x y"})
    script = tmp_path / "script"
    script.write_text(render(stage, cluster, name="n", folder=tmp_path / "a 'b'", directory=tmp_path))
    program = Path(sys.executable).with_name("shellcheck")
    command = [program, "--exclude=SC2016", "--external-sources", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.alone
@pytest.mark.parametrize(("verdict", "code"), [(75, 75), (138, 138)])
def test_train_vae_that_was_cut_off_is_asked_about(tmp_path, verdict, code):
    """It may start again as long as starts bring it on: nothing says that it was asked to stop."""
    says = {"srun": "exit 138", "python": f"exit {verdict}", "squeue": "echo RUNNING None", "scontrol": ""}
    for name, does in says.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"$SEEN"\n{does}\n')
        (tmp_path / name).chmod(0o755)
    stage = Stage("first", runfile.load_any("configs/demo/train-vae.yaml"))
    script = render(stage, site(python=str(tmp_path / "python")), name="n", folder=tmp_path, directory=tmp_path)
    assert "--signal=B:USR1@300" in directives(script)
    seen = tmp_path / "seen"
    assert run(script, PATH=f"{tmp_path}:{os.environ['PATH']}", SEEN=str(seen)).returncode == code
    step, decision, *rest = seen.read_text().splitlines()
    assert step.endswith(f"python -m pipeline train-vae {tmp_path}/first.yaml")
    record = f"{tmp_path}/lathe-7.attempts.json {tmp_path}/first.yaml"
    asked = "python -m pipeline.train.first_stage_attempts --code 138 --job 7 --retries 3 --record"
    assert decision == f"{asked} {record}"
    assert ("scontrol requeue 7" in rest) == (verdict == 75)
