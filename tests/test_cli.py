"""The command line: help that reads well, errors of one line with a remedy and an exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import cli

COMMANDS = ("demo", "pack", "train-vae", "encode", "train", "sample", "evaluate", "export", "config")


def lathe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def test_help_names_every_command() -> None:
    text = lathe("--help").stdout
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = lathe(command, "--help")
    assert result.returncode == 0
    assert f"lathe {command}" in result.stdout
    assert result.stderr == ""


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, pipeline.cli; print(sorted(m for m in ('torch', 'deepspeed', 'diffusers') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "nowhere.yaml"), 2, "nowhere.yaml: no such file"),
        (("train", "configs/demo/train.yaml", "stesp=3"), 2, "did you mean 'steps'?"),
        (("train", "configs/demo/encode.yaml"), 2, "is for `lathe encode`"),
        (("encode", "configs/demo/encode.yaml", "--task", "2/2"), 2, "--task 2/2"),
        (("encode", "configs/demo/encode.yaml", "--task", "x"), 2, "--task x"),
        (("config", "configs/demo/train.yaml", "steps=0"), 2, "steps:"),
    ],
)
def test_a_mistake_ends_with_one_line_and_its_remedy(arguments: tuple[str, ...], code: int, said: str) -> None:
    result = lathe(*arguments)
    assert result.returncode == code
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 2
    assert "Traceback" not in result.stderr


def test_config_prints_what_runs() -> None:
    text = lathe("config", "configs/demo/train.yaml", "root=s3://mine").stdout
    assert "manifest: s3://mine/latents/manifest.json" in text
    assert "configs/demo/train.yaml" in lathe("config").stdout


def test_version() -> None:
    assert lathe("--version").stdout.strip().count(".") == 2


def test_an_interrupt_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runfile.load_any", interrupt)
    monkeypatch.setattr("sys.argv", ["lathe", "config", "run.yaml"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on where it was\n"
