"""`lathe launch` without a scheduler: stages, addresses, sites, scripts, records, the sequence on one machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import picture_files
import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import runfile
from pipeline.config import ExportConfig, SampleConfig, SiteConfig
from pipeline.errors import ConfigError, LatheError, SetupError, StorageError
from pipeline.operate.launch import local, scripts, sequence, slurm, submissions
from pipeline.operate.launch import states as states_module
from pipeline.operate.launch.cancelling import cancel
from pipeline.operate.launch.logs import Follower, ending, show
from pipeline.operate.launch.reading import read
from pipeline.operate.launch.scripts import job_name, render
from pipeline.operate.launch.sites import find_site
from pipeline.operate.launch.stages import Pipeline, Stage, read_pipeline
from pipeline.operate.launch.states import is_well, page, states

ROOT = Path(__file__).parents[2]
FILES: dict[str, dict[str, Any]] = {
    "encode": {
        "images": {"shards": "${root}/images", "resolution": 64},
        "autoencoder": "${root}/vae",
        "output": "${root}/latents",
    },
    "train": {"manifest": "${root}/latents/manifest.json", "output": "${root}/run"},
    "export": {"run": "${root}/run", "autoencoder": "${root}/vae", "output": "${root}/export"},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
NASTY = st.one_of(
    TEXT, st.sampled_from(["a b", "it's", '"', "; rm -rf x", "$(touch y)", "`id`", "a\nb", "\\", "-n", "*"])
)
ANY_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with run files and a pipeline, to be launched from."""
    for job, fields in FILES.items():
        (tmp_path / f"{job}.yaml").write_text(yaml.safe_dump({"job": job, "root": "r", **fields}))
    write_pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_pipeline(folder: Path, root: str = "s3://bucket/run", **stages: dict[str, Any]) -> None:
    chosen = stages or {
        "encode": {"tasks": 8, "at_once": 3},
        "learn": {"config": "train.yaml", "nodes": 4, "set": {"steps": 7, "optimizer": {"learning_rate": 0.5}}},
        "export": {},
    }
    tree = {"job": "launch", "root": root, "stages": {n: {"config": f"{n}.yaml", **s} for n, s in chosen.items()}}
    (folder / "pipe line.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def problem(*arguments: str, **sizes: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_pipeline(arguments, **sizes)
    return caught.value


# stages


def test_a_pipeline_gives_each_stage_its_run_file_with_root_and_fields(place):
    pipeline = read_pipeline(
        ["pipe line.yaml", "root=s3://b/x", "learn.seed=3", "export.guidance=5", "stages.learn.nodes=2"]
    )
    encode, learn, export = pipeline.stages
    assert (encode.name, encode.command, encode.tasks, encode.at_once) == ("encode", "encode", 8, 3)
    assert (learn.name, learn.command, learn.nodes) == ("learn", "train", 2)
    assert encode.config.output == "s3://b/x/latents"
    assert (learn.config.steps, learn.config.seed, learn.config.optimizer.learning_rate) == (7, 3, 0.5)
    assert export.config.guidance == 5
    assert pipeline.name == "pipe-line"
    assert [(one.name, one.tasks, one.finalizes) for one in pipeline.with_finalizers().stages] == [
        ("encode", 8, False),
        ("encode-finalize", 1, True),
        ("learn", 1, False),
        ("export", 1, False),
    ]
    assert [(one.nodes, one.tasks, one.at_once) for one in pipeline.on_one_machine(2).stages] == [
        (1, 2, 2),
        (1, 1, 1),
        (1, 1, 1),
    ]


def test_run_files_in_a_row_are_a_pipeline_and_one_alone_too(place):
    encode, train = read_pipeline(
        ["encode.yaml", "train.yaml", "root=x", "train.steps=3"], tasks=4, at_once=9, nodes=2
    ).stages
    assert (encode.config.output, train.config.output, train.config.steps) == ("x/latents", "x/run", 3)
    assert (encode.tasks, encode.at_once, train.nodes) == (4, 4, 2)
    (alone,) = read_pipeline(["train.yaml", "unet.norm_num_groups=8", "train.steps=5"]).stages
    assert (alone.config.unet.norm_num_groups, alone.config.steps) == (8, 5)
    again = read_pipeline(["export.yaml", "export.yaml", "export-2.output=other"])
    assert [(one.name, one.config.output) for one in again.stages] == [("export", "r/export"), ("export-2", "other")]


@pytest.mark.parametrize(
    ("arguments", "sizes", "said"),
    [
        (["root=x"], {}, "no run file is given"),
        (["nix.yaml"], {}, "nix.yaml: no such file"),
        (["pipe line.yaml", "train.steps=1"], {}, "train.steps=1: pipe line.yaml has no stage train"),
        (["pipe line.yaml", "learn.stesp=1"], {}, "stesp: unknown field"),
        (["pipe line.yaml", "export.yaml"], {}, "a pipeline beside other files"),
        (["pipe line.yaml", "stages.learn.config=pipe line.yaml"], {}, "stage learn: pipe line.yaml is a pipeline"),
        (["pipe line.yaml", "stages.export.nodes=2"], {}, "stage export: nodes: 2, but lathe export runs alone"),
        (["pipe line.yaml", "stages.learn.tasks=2"], {}, "stage learn: tasks: 2, but lathe train runs alone"),
        (["pipe line.yaml", "stages.learn.at_once=2"], {}, "stage learn: at_once: 2, but lathe train runs alone"),
        (["pipe line.yaml", "stages.learn.nodse=2"], {}, "stages.learn.nodse: unknown field"),
        (["pipe line.yaml", "stages.learn.slurm={partitoin: x}"], {}, "stages.learn.slurm.partitoin: unknown field"),
        (["pipe line.yaml", "stages.Learn={config: x}"], {}, "stages.Learn"),
        (["export.yaml"], {"nodes": 2}, "--nodes: there is no stage that it is of"),
        (
            ["encode.yaml", "train.yaml", "train.root=y"],
            {},
            "stage train: manifest: y/latents/manifest.json, but stage encode writes r/latents/manifest.json",
        ),
        (["train.yaml", "export.yaml", "export.run=x"], {}, "stage export: run: x, but stage train writes r/run"),
        (["encode.yaml", "encode.yaml"], {}, "stages encode and encode-2 both write to"),
        (
            ["encode.yaml", "train.yaml", "encode.text.context_length=9"],
            {},
            "stage train: text.context_length: 77, but stage encode stores captions with text.context_length=9",
        ),
        (
            ["encode.yaml", "train.yaml", "encode.text.mode=online", "encode.text.towers=[{name: a, model: ViT-B-32}]"],
            {},
            "stage train: text.mode: joint, but stage encode stores captions with text.mode=online",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_starts(place, arguments, sizes, said):
    assert said in problem(*arguments, **sizes).message


def test_an_override_may_be_longer_than_the_name_of_a_file(place):
    (train,) = read_pipeline(["train.yaml", f"manifest={'m' * 900}"]).stages
    assert train.config.manifest == "m" * 900


def test_names_begin_with_a_letter_whatever_the_file_is_called(place):
    for name, tidy in (("512px", "run-512px"), ("_a B", "a-b"), ("-", "run"), ("a" * 30, "a" * 14)):
        (place / f"{name}.yaml").write_bytes((place / "train.yaml").read_bytes())
        assert read_pipeline([f"./{name}.yaml"]).name == tidy


def test_typos_are_told_with_the_right_name(place):
    assert problem("pipe line.yaml", "stages.learn.slurm={partitoin: x}").remedy == "did you mean 'partition'?"
    assert "encode, learn, export" in problem("pipe line.yaml", "train.steps=1").remedy


def test_a_checkpoint_and_a_resolution_of_what_is_written_are_read_too(place):
    read_pipeline(["train.yaml", "export.yaml", "export.run=r/run/step-00000100"])
    read_pipeline(["train.yaml", "export.yaml", f"export.run={place}/r/run/"])
    several = "encode.images.resolution=[32, 64]"
    read_pipeline(["encode.yaml", "train.yaml", several, "train.manifest=r/latents/64/manifest.json"])
    assert "writes r/latents/64/manifest.json" in problem("encode.yaml", "train.yaml", several).message


# sites


def site(**fields: Any) -> SiteConfig:
    return SiteConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm: {partiton: x}", "slurm.partiton: unknown field"),
        ("slurm: {time: 12:00:00}", "slurm.time: write it in quotes"),
        ('slurm: {time: "1h"}', "slurm.time: no time of SLURM"),
        ('slurm: {partition: "a\\n#SBATCH --uid=0"}', "slurm.partition: Input should be one word"),
        ('slurm: {constraint: "a b"}', "slurm.constraint: Input should be one word"),
        ("slurm: {memory: lots}", "slurm.memory: no memory"),
        ("slurm: {signal_seconds: 0}", "slurm.signal_seconds"),
        ('slurm: {extra: ["--x\\n--y"]}', "slurm.extra.0: write --NAME"),
        ("slurm: {extra: [--array=1-2]}", "slurm.extra.0: --array is set by lathe launch itself"),
        ("slurm: {extra: [exclusive]}", "slurm.extra.0: write --NAME"),
        ("slurm_by_command: {encode: {qso: x}}", "slurm_by_command.encode.qso: unknown field"),
        ("environment: {AWS_SECRET_ACCESS_KEY: x}", "AWS_SECRET_ACCESS_KEY: scripts that hold it are kept"),
        ("environment: {A-B: x}", "'A-B' is no name of a variable"),
        ("environment: {DEBUG: yes}", "environment.DEBUG"),
        ("environment: {NODE_RANK: 1}", "NODE_RANK: the launchers set it"),
        ("environment: {PYTHON: x}", "PYTHON: set the field python instead"),
        ("container: {runtime: pyxis}", "container.image: missing"),
        ("modules: [a b]", "modules.0"),
        ("kubernetes: {memory: 16GB}", "kubernetes.memory"),
        ("kubernetes_by_command: {export: {cache_size: lots}}", "kubernetes_by_command.export.cache_size"),
    ],
)
def test_a_sites_mistakes_are_told_with_their_field(tmp_path, text, said):
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_site(file)
    assert said in caught.value.message
    assert str(file) in caught.value.message


def test_where_a_site_is_found(tmp_path):
    assert find_site(None, {"XDG_CONFIG_HOME": str(tmp_path)}) == SiteConfig()
    (tmp_path / "lathe").mkdir()
    for name, partition in (("lathe/site.yaml", "usual"), ("b.yaml", "named"), ("c.yaml", "given")):
        (tmp_path / name).write_text(f"slurm: {{partition: {partition}}}")
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find_site(None, environment).slurm.partition == "usual"
    environment["LATHE_SITE"] = str(tmp_path / "b.yaml")
    assert find_site(None, environment).slurm.partition == "named"
    assert find_site(tmp_path / "c.yaml", environment).slurm.partition == "given"
    with pytest.raises(ConfigError, match="LATHE_SITE: nix: no such file"):
        find_site(None, {"LATHE_SITE": "nix"})


def test_the_example_site_is_valid():
    example = runfile.load_settings(SiteConfig, "configs/site.example.yaml")
    assert set(example.model_fields_set) == set(SiteConfig.model_fields)


# scripts


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
    monkeypatch.setattr(scripts.runfile, "bundled", lambda name: here / Path(name).name)
    stage = Stage("train", runfile.load_any("configs/demo/train.yaml")) if launcher else export_stage()
    script = render(stage, site(environment={"VALUE": value}, python=python), name="n", folder=here, directory=here)
    assert all(line.startswith("#SBATCH --") for line in script.splitlines() if "SBATCH" in line)
    seen = tmp_path / "seen"
    done = subprocess.run(
        ["bash", "-s"],
        input=script.encode(),
        env={"PATH": f"{here}:{os.environ['PATH']}" if ":" not in str(here) else os.environ["PATH"], "SEEN": str(seen)},
        capture_output=True,
        check=False,
        cwd="/",
    )
    if ":" in str(here) and not launcher:  # srun cannot be put on the PATH there
        return
    assert done.returncode == 0, done.stderr
    run_file = str(here / f"{stage.name}.yaml")
    arguments = [run_file] if launcher else ["--ntasks=1", python, "-m", "pipeline", "export", run_file]
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
    done = subprocess.run([program, "--exclude=SC2016", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_command_line_of_sbatch(place):
    pipeline = read_pipeline(["pipe line.yaml"]).with_finalizers()
    printed, _ = slurm.dry_run(pipeline, site(), place / "50%", place)
    commands = [shlex.split(line) for line in printed.partition("==> commands <==\n")[2].splitlines()]
    assert [command[3:-1] for command in commands] == [
        [],
        ["--dependency=afterany:JOB-OF-encode", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:JOB-OF-encode-finalize", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:JOB-OF-learn", "--kill-on-invalid-dep=yes"],
    ]
    assert commands[0][:2] == ["sbatch", "--parsable"]
    assert commands[0][2].startswith(f"--output={place}/50%%/pipe-line-")
    assert commands[0][2].endswith("/encode.%a.log")
    with pytest.raises(ConfigError, match="backslash"):
        slurm.dry_run(pipeline, site(), place / "a\\b", place)
    assert not (place / "50%").exists()


def test_a_checkpoint_that_takes_longer_than_the_signal_gives(place):
    (place / "r/run").mkdir(parents=True)
    lines = ['{"step": 1, "checkpoint_seconds": 400.2}', '{"step": 2}', '{"step": 3, "checkpoint_seconds": 200}']
    (place / "r/run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    pipeline = read_pipeline(["train.yaml", "export.yaml"])
    (warning,) = slurm.signal_warnings(pipeline, site())
    assert "a checkpoint of r/run has taken 400 s, but the run is asked to save only 300 s before" in warning
    assert not slurm.signal_warnings(pipeline, site(slurm={"signal_seconds": 401}))


def test_a_store_that_is_away_does_not_hold_up_a_launch(place, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("pipeline.operate.runs.find._GIVE_UP_SECONDS", "0")
    begun = time.monotonic()
    assert slurm.signal_warnings(read_pipeline(["train.yaml", "root=s3://bucket/run"]), site()) == []
    assert time.monotonic() - begun < 20


def test_jobs_are_cancelled_where_the_record_cannot_be_written(place, monkeypatch):
    """At the last stage too, when none is left that could not be submitted."""
    asked: list[tuple[str, ...]] = []

    def ask(*arguments: str, **_: Any) -> str:
        asked.append(arguments)
        return f"{len(asked)}\n"

    saved = submissions.Submission.save

    def save(submission: submissions.Submission) -> None:
        if all(stage.id for stage in submission.record.stages):
            raise StorageError("the disk is full")
        saved(submission)

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.programs, "found", lambda program, remedy: program)
    monkeypatch.setattr(submissions.Submission, "save", save)
    with pytest.raises(StorageError, match=r"^the disk is full; the 3 submitted before were cancelled$"):
        slurm.launch(read_pipeline(["pipe line.yaml"]), site(), None, place)
    assert [(arguments[0], arguments[-1]) for arguments in asked[3:]] == [("scancel", str(job)) for job in (1, 2, 3)]


def test_jobs_know_nothing_of_the_job_that_they_are_submitted_from(tmp_path, monkeypatch):
    """Another array's task id, or the CPUs that srun has bound a shell to, would be taken for their own."""
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\nexec env\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SLURM_CPU_BIND", "OTHERS"):
        monkeypatch.setenv(name, "x")

    def handed_on() -> set[str]:
        names = {line.partition("=")[0] for line in slurm.ask("sbatch").splitlines()}
        return {name for name in names if name.startswith(("SLURM_", "OTHERS"))}

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert handed_on() == {"SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SLURM_CPU_BIND", "OTHERS"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert handed_on() == {"SLURM_CONF", "OTHERS"}


def test_a_job_whose_number_was_lost_is_cancelled_by_its_name(place, monkeypatch):
    asked: list[tuple[str, ...]] = []

    def ask(*arguments: str, **_: Any) -> str:
        asked.append(arguments)
        if arguments[0] == "sbatch":
            raise slurm.SlurmError("SLURM does not answer: Socket timed out on send/recv operation")
        return ""

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.programs, "found", lambda program, remedy: program)
    with pytest.raises(slurm.SlurmError, match=r"^stage encode was not submitted: SLURM does not answer"):
        slurm.launch(read_pipeline(["pipe line.yaml"]), site(), None, place)
    name = job_name(submissions.find(None).name, "encode")
    assert asked[-1] == ("scancel", f"--name={name}", f"--user={os.getuid()}")


# what SLURM says

JOB = "JobId={} ArrayJobId=5 JobName={} UserId=me(1) JobState={} Reason={} Restarts={} RunTime=00:01:02 NodeList=n[1-2] ExitCode={} Comment=JobState=RUNNING\n"  # noqa: E501


@pytest.fixture
def submitted(place) -> submissions.Submission:
    pipeline = read_pipeline(["pipe line.yaml"])
    submission = submissions.plan(pipeline, "slurm", None, place)
    submissions.write(submission, pipeline)
    for number, stage in enumerate(submission.record.stages, start=5):
        stage.id = str(number)
    submission.save()
    return submission


def test_states_of_slurm(submitted, monkeypatch):
    name = {stage.id: job_name(submitted.name, stage.name) for stage in submitted.record.stages}
    array = [(5, "0", "COMPLETED"), (6, "1", "RUNNING"), (7, "2", "PENDING")]
    lines = [JOB.format(job, f"{name['5']} ArrayTaskId={task}", word, "None", 1, "0:0") for job, task, word in array]
    lines.append(JOB.format(5, f"{name['5']} ArrayTaskId=3-7%3", "PENDING", "JobArrayTaskLimit", 0, "0:0"))
    said = {
        "5": "".join(lines),
        "6": JOB.format(6, name["6"], "OUT_OF_MEMORY", "OutOfMemory", 0, "0:125"),
        "7": JOB.format(7, "somebody-else", "RUNNING", "None", 0, "0:0"),
    }

    def ask(program: str, *arguments: str, **_: Any) -> str:
        if program == "sacct":
            raise slurm.SlurmError("Slurm accounting storage is disabled")
        return said[arguments[-1]]

    monkeypatch.setattr(slurm, "ask", ask)
    submitted.log(submitted.record.stages[1]).write_text("step 5\nkilled for memory\n\n")
    submitted.log(submitted.record.stages[2]).write_text("written to x\n")
    encode, learn, export = states(submitted)
    assert (encode.state, encode.said) == (
        "running", "1 of 8 finished, 6 of 8 waiting, 1 of 8 running, for 00:01:02 on n[1-2], 3 restarts")  # fmt: skip
    assert (learn.state, learn.said) == ("failed", "out of memory, signal 125, OutOfMemory")
    assert (export.state, export.said) == (
        "forgotten", "SLURM has no record of it any more; its log ends with: written to x")  # fmt: skip
    told = page(submitted, [encode, learn, export])
    assert f"    step 5\n    killed for memory\n    lathe launch logs {submitted.name} --stage learn\n" in told
    assert not is_well([encode, learn, export])


def test_tasks_that_slurm_forgets_while_others_run(submitted, monkeypatch):
    name = job_name(submitted.name, "encode")
    words = {"6": "RUNNING", "7": "COMPLETED"}
    lines = [JOB.format(5, f"{name} ArrayTaskId={task}", word, "None", 0, "0:0") for task, word in words.items()]
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "".join(lines))
    encode = states(submitted)[0]
    assert (encode.state, encode.said) == (
        "running", "1 of 8 finished, 6 of 8 forgotten, 1 of 8 running, for 00:01:02 on n[1-2]")  # fmt: skip
    del lines[0]
    assert states(submitted)[0].state == "forgotten"


@pytest.mark.parametrize(("told", "tasks"), [("5", 1), ("3-7%3", 5), ("0,2,5-6", 4), ("0,2,...", 3)])
def test_tasks_of_a_line(told, tasks):
    assert states_module._tasks_in(told) == tasks


def test_what_slurm_has_forgotten_its_accounting_knows(submitted, monkeypatch):
    def ask(program: str, *arguments: str, **_: Any) -> str:
        if program == "scontrol":
            raise slurm.SlurmError("scontrol: slurm_load_jobs error: Invalid job id specified")
        stage = next(stage for stage in submitted.record.stages if stage.id == arguments[-1])
        word = "CANCELLED by 0" if stage.name == "export" else "COMPLETED"
        return f"{job_name(submitted.name, stage.name)}|{word}|00:00:09\nother|FAILED|1\n" * stage.tasks

    monkeypatch.setattr(slurm, "ask", ask)
    assert [one.state for one in states(submitted)] == ["finished", "finished", "cancelled"]


# records


def test_submissions_are_found_by_name_folder_and_as_the_newest(submitted, place):
    assert submissions.find(None).name == submitted.name
    assert submissions.find(submitted.name).record == submitted.record
    assert submissions.find(str(submitted.folder)).folder == submitted.folder
    with pytest.raises(ConfigError, match="nix: no such submission") as caught:
        submissions.find("nix")
    assert submitted.name in caught.value.remedy
    (submitted.folder / "submission.yaml").write_text("version: [")
    with pytest.raises(ConfigError, match="is no record that this version of Lathe reads"):
        submissions.find(submitted.name)


def test_nothing_was_launched_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nothing was launched from here"):
        submissions.find(None)


def test_two_submissions_within_a_second_have_folders_of_their_own(place):
    pipeline = read_pipeline(["export.yaml"])
    made = [submissions.plan(pipeline, "slurm", None, place) for _ in range(2)]
    submissions.write(made[0], pipeline)
    again = submissions.plan(pipeline, "slurm", None, place)
    submissions.write(again, pipeline)
    assert again.folder != made[0].folder


# logs


@pytest.mark.alone
def test_logs_show_the_last_lines_then_what_comes_each_line_once(tmp_path, capsys):
    first, second = tmp_path / "encode-0.log", tmp_path / "encode-1.log"
    first.write_text("".join(f"line {i}\n" for i in range(50)))
    answers = iter([False, True])

    def is_over() -> bool:
        over = next(answers)
        if not over:
            with first.open("a") as file:
                file.write("more\nhalf")
            second.write_text("\x1b[31mred\n")
        return over

    import pipeline.operate.launch.logs as module

    pause, module._STATE_SECONDS = module._STATE_SECONDS, 0.7
    try:
        show(lambda: {str(i): path for i, path in enumerate((first, second)) if path.exists()}, 2, is_over)
    finally:
        module._STATE_SECONDS = pause
    assert capsys.readouterr().out.splitlines() == [
        "[0] line 48",
        "[0] line 49",
        "[0] more",
        "[1] \\x1b[31mred",
        "[0] half",
    ]
    assert ending(first) == ["half"]


@pytest.mark.parametrize("lines", [0, 1, 3, 99])
@pytest.mark.parametrize("text", ["", "a\n", "a\nb\nc\nd\n", "a\nb\nno end"])
def test_the_last_lines_of_a_log(tmp_path, capsys, lines, text):
    log = tmp_path / "x.log"
    log.write_text(text)
    show(lambda: {"": log}, lines)
    assert capsys.readouterr().out.splitlines() == text.splitlines()[max(0, len(text.splitlines()) - lines) :]


def test_a_log_that_was_begun_anew_is_shown_from_its_start(tmp_path, capsys):
    log = tmp_path / "x.log"
    log.write_text("one\ntwo\n")
    follower = Follower(lambda: {"": log})
    follower.show()
    log.write_text("new\n")
    follower.show()
    assert capsys.readouterr().out.splitlines() == ["one", "two", "new"]


def test_a_stage_without_a_log(submitted, monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    with pytest.raises(ConfigError, match=r"stage learn of .* has no log yet: it is forgotten"):
        read(submitted, "learn", None, 5, follow=False)
    with pytest.raises(ConfigError, match="has no stage lern"):
        read(submitted, "lern", None, 5, follow=False)
    with pytest.raises(ConfigError, match="--task 8: stage encode has 8"):
        read(submitted, "encode", 8, 5, follow=False)


def test_a_scheduler_that_is_away_for_a_moment_ends_no_watching(submitted, monkeypatch, capsys):
    """And of other stages than the one that is followed nobody is asked."""
    name = job_name(submitted.name, "learn")
    answers = iter(["RUNNING", None, "COMPLETED", "COMPLETED"])
    asked = set()

    def ask(program: str, *arguments: str, **_: Any) -> str:
        asked.add(arguments[-1])
        if (word := next(answers)) is None:
            raise slurm.SlurmError("SLURM does not answer: Unable to contact slurm controller")
        return JOB.format(6, name, word, "None", 0, "0:0")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr("pipeline.operate.launch.logs._STATE_SECONDS", 0.0)
    submitted.log(submitted.record.stages[1]).write_text("step 5\n")
    read(submitted, "learn", None, 5, follow=True)
    said = capsys.readouterr()
    assert said.out == "step 5\n"
    assert said.err == "stage learn: finished, took 00:01:02\n"
    assert asked == {"6"}


# on this machine


@pytest.fixture
def stand_ins(place, monkeypatch) -> dict[str, str]:
    """Python code by stage, which runs instead of the stages' own commands."""
    code = {name: f"print('hello from {name}')" for name in ("encode", "learn", "export")}
    monkeypatch.setattr(
        local,
        "_commands",
        lambda submission, stage: [[sys.executable, "-c", code[stage.name]] for _ in range(stage.tasks)],
    )
    return code


def here(tasks: int = 2) -> Pipeline:
    return read_pipeline(["pipe line.yaml"]).on_one_machine(tasks)


@pytest.mark.alone
def test_stages_on_this_machine_go_on_where_one_has_failed(stand_ins, place, capsys):
    stand_ins["learn"] = "print('out of luck'); raise SystemExit(4)"
    with pytest.raises(LatheError, match=r"stage learn ended with exit code 4; its output is in .*learn.log") as caught:
        local.launch(here(), None, place)
    assert caught.value.exit_code == 4
    said = capsys.readouterr()
    assert said.out.splitlines() == ["[0] hello from encode", "[1] hello from encode", "out of luck"]
    assert said.err.splitlines()[-1] == "[2/3] learn: lathe train"
    failed = submissions.find(None)
    assert [one.state for one in states(failed)] == ["finished", "failed", "waiting"]
    assert "exit code 4 after" in states(failed)[1].said

    stand_ins["learn"] = "print('luck')"
    done = local.launch(here(), None, place)
    assert done.folder == failed.folder
    said = capsys.readouterr()
    assert said.out.splitlines() == ["luck", "hello from export"]
    assert "[1/3] encode: lathe encode  (finished earlier)\n" in said.err
    assert is_well(states(done))
    assert local.launch(here(), None, place).folder != failed.folder  # all is finished: begun anew


@pytest.mark.alone
def test_other_settings_are_another_submission(stand_ins, place):
    stand_ins["export"] = "raise SystemExit(1)"
    folders = set()
    for arguments in (["pipe line.yaml"], ["pipe line.yaml", "learn.seed=9"], ["pipe line.yaml"]):
        with pytest.raises(LatheError):
            local.launch(read_pipeline(arguments).on_one_machine(1), None, place)
        folders.add(submissions.find(None).folder)
    assert len(folders) == 2


@pytest.mark.alone
def test_one_that_is_under_way_is_not_begun_twice_and_can_be_cancelled(stand_ins, place):
    stand_ins["export"] = "raise SystemExit(1)"
    with pytest.raises(LatheError):
        local.launch(here(), None, place)
    submission = submissions.find(None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        submission.record.process = (child.pid, psutil.Process(child.pid).create_time())
        submission.stage("export").exit_code = submission.stage("export").ended = None
        submission.save()
        assert [one.state for one in states(submission)] == ["finished", "finished", "running"]
        with pytest.raises(SetupError, match="is under way already"):
            local.launch(here(), None, place)
        submission.stage("learn").exit_code = submission.stage("learn").ended = None
        submission.stage("export").started = None
        with pytest.raises(ConfigError, match="stage learn is under way, and on this machine one process runs all"):
            cancel(submission, "export")
        assert child.poll() is None
        submission = submissions.find(None)
        assert cancel(submission, None) == ["export"]
        assert child.wait(10) == -15
    finally:
        child.kill()
        child.wait()
    assert states(submission)[2].state == "stopped"
    assert cancel(submission, None) == []
    submission.record.process = (os.getpid(), 1.0)  # an id that another process has got since
    assert not sequence.is_under_way(submission)
    submission.record.machine = "elsewhere"
    with pytest.raises(SetupError, match="is started by a process on elsewhere"):
        cancel(submission, None)


@pytest.mark.alone
def test_the_command_line_ends_with_the_code_of_the_stage_that_failed(tmp_path):
    """Real commands: pack, and an export of a run that is not there."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture_files.file(picture_files.quarters()))
    (tmp_path / "photos" / "a.txt").write_text("four quarters")
    (tmp_path / "pack.yaml").write_text("job: pack\nsource: photos\noutput: images; $(touch owned)\n")
    (tmp_path / "export.yaml").write_text("job: export\nrun: run\nautoencoder: vae\noutput: export\n")

    def lathe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", "launch", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = lathe("local", "pack.yaml", "export.yaml")
    assert done.returncode in (3, 4), done.stderr
    assert f"error: stage export ended with exit code {done.returncode}; its output is in " in done.stderr
    assert "1 pictures in 1 shards" in done.stdout
    assert "error: " in done.stdout  # the stage's own
    assert (tmp_path / "images; $(touch owned)" / "00000.tar").exists()
    status = lathe("status")
    assert status.returncode == 1
    assert re.search(r"\n  pack +finished +took .*\n  export +failed +exit code", status.stdout)
    assert "\n    error: " in status.stdout
    assert "(finished earlier)" in lathe("local", "pack.yaml", "export.yaml").stderr
    assert lathe("logs", "nix").stderr.startswith("error: nix: no such submission\n")


INTERRUPTED = """
import sys
from pathlib import Path
from pipeline.operate.launch import local
from pipeline.operate.launch.stages import read_pipeline

code = "import time; print('under way', flush=True); time.sleep(100)"
local._commands = lambda submission, stage: [[sys.executable, "-c", code]]
local.launch(read_pipeline(["export.yaml"]), None, Path.cwd())
"""


@pytest.mark.alone
def test_a_launch_that_is_asked_to_end_ends_its_stage(place):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "under way\n"
    (stage,) = psutil.Process(child.pid).children()
    submission = submissions.find(None)
    assert states(submission)[0].state == "running"
    assert cancel(submission, None) == ["export"]
    child.wait(60)
    stage.wait(10)
    assert [one.state for one in states(submissions.find(None))] == ["stopped"]


def test_the_commands_of_stages_on_this_machine(place):
    printed = [shlex.split(line) for line in local.dry_run(here(), None, place).splitlines()]
    assert [Path(command[-1]).name for command in printed] == [
        "encode.yaml",
        "encode.yaml",
        "learn.yaml",
        "export.yaml",
    ]
    assert printed[1][:-1] == [sys.executable, "-m", "pipeline", "encode", "--task", "1/2"]
    assert printed[2][:-1] == ["bash", str(runfile.bundled("launchers/local.sh"))]
    assert not (place / "lathe-launches").exists()


def test_states_are_told_by_scontrol_words_that_slurm_has():
    assert states_module._state("NODE_FAIL") == "failed"
    assert states_module._state("REQUEUED") == "waiting"
    assert states_module._state("SIGNALING") == "running"
    assert states_module._state("PREEMPTED") == "failed"  # for good: one that is queued again is PENDING


def test_a_submission_elsewhere_is_told_by_its_folder(place):
    pipeline = read_pipeline(["export.yaml"])
    submission = submissions.plan(pipeline, "local", place / "else where", place)
    submissions.write(submission, pipeline)
    stage = submission.stage("export")
    told = page(submission, [states_module.StageState(stage, "failed", "exit code 1")])
    *words, option, name = shlex.split(told.splitlines()[-1])
    assert words[:-1] == ["lathe", "launch", "logs"]
    assert submissions.find(words[-1]).folder == submission.folder
    assert (option, name) == ("--stage", "export")
