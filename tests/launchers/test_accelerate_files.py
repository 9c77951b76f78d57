"""The configuration files of accelerate, read by accelerate; one is started in tests/train/test_launchers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from pipeline.errors import SetupError
from pipeline.runtime import environment

FOLDER = Path(__file__).parents[2] / "launchers/accelerate"


def read(name: str, *arguments: str):
    """What accelerate would do."""
    words = ["--config_file", str(FOLDER / name), *arguments, "-m", "pipeline", "train", "run.yaml", "steps=5"]
    return launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize(("name", "ranks"), [("cpu.yaml", 2), ("gpus.yaml", 8)])
def test_one_machine(name, ranks):
    found = read(name)
    assert (found.use_deepspeed, found.num_machines, found.mixed_precision) == (True, 1, "no")
    found.deepspeed_fields_from_accelerate_config = ""
    command, variables = prepare_deepspeed_cmd_env(found)
    assert command is None  # no program on other machines
    assert found.nproc_per_node == str(ranks)
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (found.training_script, found.training_script_args) == ("pipeline", ["train", "run.yaml", "steps=5"])
    assert read(name, "--num_processes", "3").num_processes == 3


def test_several_machines():
    given = ["--num_machines", "4", "--num_processes", "32", "--machine_rank", "3"]
    found = read("several-machines.yaml", *given, "--main_process_ip", "node0", "--main_process_port", "29500")
    found.deepspeed_fields_from_accelerate_config = ""
    command, _ = prepare_deepspeed_cmd_env(found)
    assert command is None
    assert (found.nnodes, found.nproc_per_node, found.node_rank) == ("4", "8", 3)
    assert (found.rdzv_endpoint, found.rdzv_backend) == ("node0:29500", "static")


def test_several_machines_must_be_told():
    with pytest.raises(ValueError, match="num_processes"):
        read("several-machines.yaml")


def test_what_the_run_file_decides_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_multinode_launcher,zero_stage,mixed_precision")
    with pytest.raises(SetupError, match=r"^accelerate's .* sets zero_stage, mixed_precision, which the run file"):
        environment.refuse_settings()


def test_every_file_is_read_here():
    assert {file.name for file in FOLDER.iterdir()} == {"cpu.yaml", "gpus.yaml", "several-machines.yaml"}
