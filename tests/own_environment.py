"""Virtual environments for other projects' programs, whose dependencies do not go together with ours."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PIP_SECONDS = 300


def own_environment(folder: Path, requirements: Path) -> Path:
    """A virtual environment with these packages, made at the first call; later ones find it ready.

    Args:
        folder: where it is kept.
        requirements: pip's file, all of it with bounds. A change of it, or of the interpreter, makes it anew.

    Returns:
        Its folder of programs.

    Raises:
        RuntimeError: pip cannot install them; the message has its last lines.
    """
    programs, stamp = folder / "venv" / "bin", folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + f"{sys.base_prefix} {sys.version}".encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once
        if stamp.is_file() and stamp.read_text() == wanted:
            return programs
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder / "venv", ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])  # ours does, which saves seconds
        pip = [sys.executable, "-m", "pip", f"--python={programs / 'python'}", "--disable-pip-version-check"]
        _run([*pip, "install", "-q", "--no-compile", "--timeout=30", "-r", str(requirements)])
        stamp.write_text(wanted)
    return programs


def _run(command: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command[1:4])} failed:\n{last}")
