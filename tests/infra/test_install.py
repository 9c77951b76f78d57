"""`make install`: what it refuses, and that nothing is done twice. The real installation is what runs these tests."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "infra" / "install.py"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, at work in a folder with a pyproject.toml and no environment yet."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    return module


class Commands:
    """Stands for pip and venv, which take minutes and a network; keeps what was asked of them."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.seen = code, list[list[str]]()

    def __call__(self, command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        self.seen.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)
            return subprocess.CompletedProcess(command, 0)
        return subprocess.CompletedProcess(command, self.code)


def test_an_old_python_is_told(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    assert install.main(["demo"]) == 1
    assert "Python 3.9.2 is too old, 3.11 or newer is needed" in capsys.readouterr().err


def test_two_at_once_are_told(install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".install.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert install.main(["demo"]) == 1
    assert "another make is installing" in capsys.readouterr().err


def test_too_little_disk_is_told(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "BYTES_NEEDED", 2**60)
    assert install.main(["demo"]) == 1
    assert "free disk" in capsys.readouterr().err


def test_nothing_is_installed_twice_and_extras_add_up(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "BYTES_NEEDED", 0)
    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    assert [install.main(extras) for extras in (["demo"], ["demo"], ["demo", "dev"], ["dev"])] == [0, 0, 0, 0]
    asked = [command[-1].partition("[")[2] for command in commands.seen if "pip" in command]
    assert asked == ["demo]", "demo,dev]"]
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert install.main(["demo"]) == 0
    assert commands.seen[-1][-1].endswith("[demo,dev]")


def test_an_installation_that_fails_is_tried_again(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "BYTES_NEEDED", 0)
    monkeypatch.setattr(install.subprocess, "run", Commands(code=1))
    assert install.main(["demo"]) == 1
    assert "tries again" in capsys.readouterr().err
    monkeypatch.setattr(install.subprocess, "run", Commands())
    assert install.main(["demo"]) == 0
