"""Virtual environments for other projects' programs, whose dependencies do not go together with ours."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import SetupError

PIP_SECONDS = 600
_REQUIRED = re.compile(r"[A-Za-z0-9._-]+")


def own_environment(folder: Path, requirements: Path, linked: Iterable[str] = ()) -> Path:
    """A virtual environment with these packages, made at the first call; later ones find it ready.

    Args:
        folder: where it is kept.
        requirements: pip's file, all of it with bounds. A change of it, of the interpreter or of what is linked makes
            the environment anew.
        linked: names of packages of the running environment that appear in it as links, in place of a copy of each.

    Returns:
        Its folder of programs.

    Raises:
        SetupError: pip cannot install them, or the folder cannot be written.
    """
    links = [distribution(name) for name in linked]
    pins = "".join(f"{one.metadata['Name']}=={one.version}\n" for one in links)
    places = "".join(f"{one.locate_file('')}\n" for one in links)
    wanted = _digest(requirements.read_bytes(), pins, places, f"{sys.base_prefix} {sys.version}")
    programs, stamp = folder / "venv" / "bin", folder / "installed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once
            if stamp.is_file() and stamp.read_text() == wanted:
                return programs
            stamp.unlink(missing_ok=True)
            shutil.rmtree(folder / "venv", ignore_errors=True)
            (folder / "pins.txt").write_text(pins)  # pip would mend what is linked in the place that the links lead to
            _make(folder / "venv", links, ["-r", str(requirements), "-c", str(folder / "pins.txt")])
            stamp.write_text(wanted)
    except OSError as error:
        raise SetupError(f"{folder}: {error.strerror or error}", "choose a folder you may write to") from error
    return programs


def with_requirements(*names: str) -> list[str]:
    """The installed packages that these need, themselves included, in order of name; extras are left out."""
    found: dict[str, Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another system, or not needed here
            continue
        needed = (line for line in found[name].requires or () if "extra ==" not in line)
        left += [match[0] for line in needed if (match := _REQUIRED.match(line))]
    return sorted(found)


def _digest(requirements: bytes, *more: str) -> str:
    return hashlib.sha256(requirements + "\0".join(more).encode()).hexdigest()


def _make(venv: Path, links: Iterable[Distribution], install: list[str]) -> None:
    has_pip = find_spec("pip") is not None  # then ours does, which saves seconds
    _run([sys.executable, "-m", "venv", *(["--without-pip"] if has_pip else []), str(venv)])
    python = venv / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for one in links:
        _link(one, venv / "lib" / version / "site-packages")
    pip = [sys.executable, "-m", "pip", f"--python={python}"] if has_pip else [str(python), "-m", "pip"]
    options = ["-q", "--disable-pip-version-check", "--no-compile", "--timeout=30", "--retries=2"]
    _run([*pip, "install", *options, *install])


def _link(package: Distribution, site: Path) -> None:
    """Links to what a package has in its own site-packages; its programs are left out."""
    tops = {Path(file).parts[0] for file in package.files or ()}
    for top in tops - {"..", "__pycache__"}:
        there = site / top
        if not there.exists():
            there.symlink_to(Path(str(package.locate_file(top))).resolve())


def _run(command: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"{' '.join(command[1:4])} took longer than {PIP_SECONDS} s", "try again on a better line"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "")
        raise SetupError(
            f"{' '.join(command[1:4])} failed: {last.removeprefix('ERROR: ')}",
            "is a package index within reach? See what pip says",
        )
