"""Make the virtual environment of a clone, once: `python3 infra/install.py [EXTRA ...]`. Standard library only.

It is what `make install` runs. A second call with nothing to do takes a tenth of a second; two at once are told.
"""

from __future__ import annotations  # an older Python must get as far as to be told that it is too old

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BYTES_NEEDED = 8 * 2**30  # torch with its CUDA libraries


def main(extras: list[str]) -> int:
    """Install the package with `extras`, unless that has been done; 0 = the environment is ready."""
    if sys.version_info < (3, 11):  # noqa: UP036  the interpreter that runs this file is the user's choice
        found = ".".join(map(str, sys.version_info[:3]))
        return _refuse(f"Python {found} is too old, 3.11 or newer is needed", "make PYTHON=python3.11 ...")
    with (ROOT / ".install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _refuse("another make is installing into .venv", "wait until it has finished, then try again")
        return _install(extras)


def _install(extras: list[str]) -> int:
    stamp = VENV / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    before = stamp.read_text().split() if stamp.is_file() else []
    if before[:1] == [wanted] and set(extras) <= set(before[1:]):
        return 0
    if not before and shutil.disk_usage(ROOT).free < BYTES_NEEDED:
        return _refuse(f"less than {BYTES_NEEDED >> 30} GiB of free disk", "free some space: torch alone takes 6")
    python = VENV / "bin" / "python"
    if not python.is_file() and subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        return _refuse("this Python cannot make virtual environments", "on Debian: apt-get install python3-venv")
    extras = sorted({*extras, *before[1:]})
    print(f"installing lathe-ldm[{','.join(extras)}] into .venv (a few minutes the first time)", flush=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "-e",
        f"{ROOT}[{','.join(extras)}]",
    ]
    if subprocess.run(pip, check=False).returncode:
        return _refuse("pip could not install the packages", "its lines above say why; `make install` tries again")
    stamp.write_text(" ".join([wanted, *extras]))
    return 0


def _refuse(message: str, remedy: str) -> int:
    print(f"error: {message}\n  {remedy}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
