"""The launcher scripts, as far as they go before ranks start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cores import available_cores

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
SCRIPTS = ["accelerate", "torchrun"]
TWO = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}

INTERPRETER = """#!/bin/sh
# Stands in for python: passes on what the script asks before the launch, and tells what it would launch.
case "$2" in
  pipeline.runtime.launch | deepspeed.launcher.runner)
    echo "OMP_NUM_THREADS=$OMP_NUM_THREADS DS_ACCELERATOR=$DS_ACCELERATOR NODES=$NODES NODE_RANK=$NODE_RANK $*" ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def config(tmp_path) -> Path:
    file = tmp_path / "my run.yaml"
    file.write_text("job: train\nmanifest: m\noutput: o\n")
    return file


def launch(
    tmp_path: Path, *arguments: str, script: str | Path = "accelerate", **environment: str
) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable))
    python.chmod(0o755)
    taken = ("NPROC", "OMP_NUM_THREADS", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in taken}
    return subprocess.run(
        ["bash", str(script if isinstance(script, Path) else ROOT / f"launchers/{script}.sh"), *arguments],
        env={**kept, "PYTHON": str(python), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_folder_that_it_is_started_in_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    start = 'cd "$1" && rmdir "$1" && exec bash "$2" run.yaml'
    words = ["bash", "-c", start, "bash", str(tmp_path / "gone"), str(ROOT / "launchers/local.sh")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "\nerror: the current folder is not there any more\n" in done.stderr


@pytest.mark.parametrize("ranks", ["0", "-1", "x", "1.5", " ", "99999999999999999999"])
def test_a_number_of_ranks_that_is_none(tmp_path, config, ranks):
    done = launch(tmp_path, str(config), NPROC=ranks)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: NPROC={ranks} is not a number of ranks\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"NODES": "0"}, "NODES=0 is not a number of machines"),
        ({"NODES": "two"}, "NODES=two is not a number of machines"),
        ({"NODES": "99999999999999999999"}, "NODES=99999999999999999999 is not a number of machines"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1 is not the number of a machine"),
        ({"NODE_RANK": "08"}, "NODE_RANK=08 is not the number of a machine"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2, but machines are counted from 0 to NODES - 1 = 1"),
        ({"NODES": "", "NODE_RANK": "1"}, "NODE_RANK=1, but machines are counted from 0 to NODES - 1 = 0"),
        ({"MASTER_ADDR": ""}, "NODES=2 needs MASTER_ADDR"),
        ({"MASTER_ADDR": "node0 node1"}, "MASTER_ADDR=node0 node1 is no name or address of a machine"),
        ({"MASTER_ADDR": "--help"}, "MASTER_ADDR=--help is no name or address of a machine"),
        ({"MASTER_PORT": ""}, "NODES=2 needs MASTER_PORT"),
        ({"MASTER_PORT": "ssh"}, "MASTER_PORT=ssh is no port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
    ],
)
def test_places_among_machines_that_are_none(tmp_path, config, changes, said):
    done = launch(tmp_path, str(config), **{**TWO, **changes})
    assert (done.returncode, done.stdout) == (2, "")
    message, remedy = done.stderr.splitlines()
    assert message == f"error: {said}"
    assert remedy.startswith("  ")


def test_environment_becomes_arguments(tmp_path, config):
    done = launch(tmp_path, str(config), "steps=5", NPROC="3", MASTER_PORT="1234", OMP_NUM_THREADS="7")
    assert done.returncode == 0, done.stderr
    assert "--num_processes 3 --num_machines 1 --machine_rank 0" in done.stdout
    assert "--main_process_ip 127.0.0.1 --main_process_port 1234" in done.stdout
    assert "OMP_NUM_THREADS=7" in done.stdout
    assert done.stdout.rstrip().endswith(f"-m pipeline train {config} steps=5")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="what cores a process may use is Linux's")
def test_threads_are_those_of_the_cores_that_a_job_has(tmp_path, config):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # as a scheduler does on a machine that others use too
    try:
        done = launch(tmp_path, str(config), NPROC="1")
    finally:
        os.sched_setaffinity(0, before)
    assert "OMP_NUM_THREADS=1 " in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "accelerate",
            "--num_processes 6 --num_machines 2 --machine_rank 1 --main_process_ip node0 --main_process_port 29501",
        ),
        (
            "torchrun",
            "--nnodes 2 --node-rank 1 --nproc-per-node 3 --rdzv-backend static --master-addr node0 --master-port 29501",
        ),
    ],
)
def test_one_of_several_machines(tmp_path, config, script, told):
    done = launch(tmp_path, str(config), "steps=5", script=script, NPROC="3", **TWO)
    assert f"pipeline.runtime.launch {script} " in done.stdout
    assert told in done.stdout
    assert "NODES=2 NODE_RANK=1" in done.stdout
    assert done.stdout.rstrip().endswith(f"-m pipeline train {config} steps=5")


def test_an_address_of_ipv6_may_stand_in_brackets(tmp_path, config):
    done = launch(tmp_path, str(config), **{**TWO, "MASTER_ADDR": "[fd00::1]"})
    assert "--main_process_ip fd00::1 " in done.stdout, done.stderr


def test_local_forgets_other_machines(tmp_path, config):
    done = launch(tmp_path, str(config), "a=$(b); 'c'", script="local", **TWO)
    assert done.returncode == 2  # the run file has no such field
    assert "a: unknown field" in done.stderr
    done = launch(tmp_path, str(config), "text.towers=[]", script="local", **TWO)
    assert "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1" in done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_shell_would_take_for_its_own_arrives(tmp_path, config, script):
    output = 'output=it\'s $(date); "a b" *'
    done = launch(tmp_path, str(config), output, script=script)
    assert done.stdout.rstrip().endswith(f"-m pipeline train {config} {output}"), done.stderr


@pytest.fixture
def hostfile(tmp_path) -> str:
    file = tmp_path / "hosts"
    file.write_text("# ours\n\nnode0 slots=4 # the first\n  node1\tslots=1\n")
    return str(file)


def test_a_hostfile_that_is_none(tmp_path, config):
    for given in ("", str(tmp_path), str(tmp_path / "absent")):
        done = launch(tmp_path, str(config), script="deepspeed", HOSTFILE=given)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: HOSTFILE={given} is no file that can be read\n")


def test_one_machine_of_a_hostfile(tmp_path, config, hostfile):
    done = launch(tmp_path, str(config), "steps=5", script="deepspeed", HOSTFILE=hostfile, NODE_RANK="1")
    assert "NODES=2 NODE_RANK=1 -m pipeline.runtime.launch deepspeed" in done.stdout, done.stderr
    assert f"OMP_NUM_THREADS={available_cores()} " in done.stdout  # it has one rank
    assert done.stdout.rstrip().endswith(f" deepspeed {hostfile} pipeline train {config} steps=5")
    done = launch(tmp_path, str(config), script="deepspeed", HOSTFILE=hostfile, NODE_RANK="2")
    assert done.stderr.startswith("error: NODE_RANK=2, but machines are counted from 0 to NODES - 1 = 1")


def test_all_machines_of_a_hostfile(tmp_path, config, hostfile):
    plain = config.rename(tmp_path / "run.yaml")
    done = launch(tmp_path, str(plain), "steps=5", script="deepspeed", HOSTFILE=hostfile)
    assert f"-m deepspeed.launcher.runner --hostfile {hostfile} --launcher pdsh" in done.stdout, done.stderr
    assert "--master_addr node0 --master_port 29500 --no_local_rank" in done.stdout
    assert done.stdout.rstrip().endswith(f"--module pipeline train {plain} steps=5")


@pytest.mark.parametrize("value", ["a b", "$(date)", "a;b", "a\nb", "it's", "[1,2]", "~"])
def test_what_the_shells_of_other_machines_would_change_is_refused(tmp_path, config, hostfile, value):
    plain = config.rename(tmp_path / "run.yaml")
    word = f"metrics.run=x{value}"
    done = launch(tmp_path, str(plain), word, script="deepspeed", HOSTFILE=hostfile)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {word}: DeepSpeed gives it to a shell on each machine")


def test_defaults(tmp_path, config):
    done = launch(tmp_path, str(config))
    words = done.stdout.split()
    assert int(words[words.index("--num_processes") + 1]) >= 1
    assert int(words[words.index("--main_process_port") + 1]) > 1023


def test_a_mistake_in_the_run_file_ends_it_before_any_rank_starts(tmp_path, config):
    done = launch(tmp_path, str(config), "stps=5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {config}: stps: unknown field\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage(tmp_path, script):
    assert launch(tmp_path, script=script).returncode == 2
    shown = launch(tmp_path, "--help", script=script)
    assert shown.returncode == 0
    assert f"launchers/{script}.sh CONFIG" in shown.stdout
    assert "NPROC" in shown.stdout
    assert "#" not in shown.stdout
    assert "shellcheck" not in shown.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "local", "deepspeed"])
def test_a_link_to_a_launcher_is_the_launcher(tmp_path, config, hostfile, script):
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "train it"
    link.symlink_to(ROOT / f"launchers/{script}.sh")
    done = launch(tmp_path, str(config), script=link, HOSTFILE=hostfile, NODE_RANK="0")
    assert f" train {config}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("python", "said"),
    [("nix", "PYTHON=nix is no program here"), (sys.executable + " -u", "is no program here"), ("sh", "has no Lathe")],
)
def test_an_interpreter_that_is_none(tmp_path, config, python, said):
    done = launch(tmp_path, str(config), PYTHON=python)
    assert (done.returncode, done.stdout) == (5, "")
    message, remedy = done.stderr.splitlines()
    assert message.startswith("error: PYTHON=")
    assert message.endswith(said)
    assert remedy.startswith("  set PYTHON to ")


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_hostfile_without_machines(tmp_path, config, text):
    (tmp_path / "hosts").write_text(text)
    done = launch(tmp_path, str(config), script="deepspeed", HOSTFILE=str(tmp_path / "hosts"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: HOSTFILE={tmp_path}/hosts names no machine\n")


def test_a_hostfile_of_a_whole_cluster(tmp_path, config):
    (tmp_path / "hosts").write_text("".join(f"node{number} slots=8\n" for number in range(20_000)))
    done = launch(tmp_path, str(config), script="deepspeed", HOSTFILE=str(tmp_path / "hosts"), NODE_RANK="7")
    assert "NODES=20000 NODE_RANK=7 -m pipeline.runtime.launch deepspeed" in done.stdout, done.stderr
