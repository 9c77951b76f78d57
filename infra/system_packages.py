"""Programs that tests talk to, from Debian's or Ubuntu's packages: `python3 infra/system_packages.py [GROUP ...]`.

Standard library only; `make test` runs it. Servers are unpacked into a folder of the clone, so that nothing of them is
installed or started; a browser, which needs its libraries, is installed. What is on the PATH is taken as it is. What
cannot be had is told, and tests that want it are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / ".pytest_cache" / "system"
LIBRARIES = FOLDER / "lib"
"""Of programs that were unpacked: LD_LIBRARY_PATH."""
TEMPLATES = Path("/usr/share/prometheus/alertmanager")
UPDATE_SECONDS, DOWNLOAD_SECONDS, INSTALL_SECONDS = 120, 300, 600


class Package(NamedTuple):
    """A package of Debian.

    Args:
        name: of the package.
        programs: as their projects call them.
        fixed: files that Debian's programs look for at these places alone, also where they are unpacked elsewhere.
        libraries: packages that it does not run without, unpacked with it.
    """

    name: str
    programs: tuple[str, ...]
    fixed: tuple[Path, ...] = ()
    libraries: tuple[str, ...] = ()


_OF_SLURM = ("slurm-wlm-basic-plugins", "libmunge2", "libhwloc15", "liblua5.1-0")
UNPACKED = {
    "prometheus": (
        Package("prometheus", ("prometheus", "promtool")),
        Package("prometheus-pushgateway", ("pushgateway",)),
        Package(
            "prometheus-alertmanager",
            ("alertmanager", "amtool"),
            (TEMPLATES / "default.tmpl", TEMPLATES / "email.tmpl"),
        ),
    ),
    "slurm": (
        Package("munge", ("munged",), libraries=("libmunge2",)),
        Package("slurmctld", ("slurmctld",), libraries=_OF_SLURM),
        Package("slurmd", ("slurmd", "slurmstepd"), libraries=_OF_SLURM),
        Package("slurm-client", ("sbatch", "srun", "scontrol", "scancel", "squeue"), libraries=_OF_SLURM),
    ),
}
INSTALLED = {"browser": (Package("chromium", ("chromium",)),)}
GROUPS = UNPACKED | INSTALLED
"""Packages by the mark of the tests that want them."""
_PLACES = {"usr/bin": "bin", "usr/sbin": "bin", "usr/lib/*-linux-gnu*": LIBRARIES.name}
_OTHER_NAMES = {
    "pushgateway": ("prometheus-pushgateway",),
    "alertmanager": ("prometheus-alertmanager",),
    "chromium": ("chromium-browser", "google-chrome"),
} | {name: (f"{name}-wlm",) for name in ("slurmctld", "slurmd", "slurmstepd")}


def main(groups: Sequence[str]) -> int:
    """Get what is missing of the groups, of all if none are given; 0 = told what is still missing, if anything."""
    if unknown := set(groups) - set(GROUPS):
        print(f"error: {', '.join(sorted(unknown))}: no such group\n  take {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    groups = groups or list(GROUPS)
    wanted = [package for group in groups for package in GROUPS[group] if _lacking(package)]
    if not wanted:
        return 0
    problem = _get(wanted)
    if left := [name for group in groups for name in missing(group)]:
        print(f"not to be had: {', '.join(left)} ({problem or 'not in the packages'}); tests with them are skipped")
    return 0


def program(name: str) -> str | None:
    """The path of a program, on the PATH or unpacked; None = it is not there."""
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), str(FOLDER / "bin")])
    found = (shutil.which(one, path=folders) for one in (name, *_OTHER_NAMES.get(name, ())))
    return next((path for path in found if path), None)


def missing(group: str) -> list[str]:
    """The programs of a group that are not there, and files without which they do not start."""
    return [what for package in GROUPS[group] for what in _lacking(package)]


def _lacking(package: Package) -> list[str]:
    found = {name: program(name) for name in package.programs}
    is_unpacked = any(path is not None and Path(path).is_relative_to(FOLDER) for path in found.values())
    files = [str(file) for file in package.fixed if is_unpacked and not file.exists()]
    return [name for name, path in found.items() if path is None] + files


def _get(packages: Sequence[Package]) -> str:
    """Fetch packages as far as that goes; returns what was in the way."""
    if shutil.which("apt-get") is None:
        return "no apt-get here"
    is_root = os.geteuid() == 0
    unpacked = {package for group in UNPACKED.values() for package in group}
    print(f"getting {', '.join(package.name for package in packages)}", flush=True)
    problem = _apt("update", "-qq", seconds=UPDATE_SECONDS) if is_root else ""
    for group in UNPACKED.values():  # each for itself: of what is asked for at once apt gets all or nothing
        if servers := [package for package in packages if package in group]:
            problem = _unpack(servers) or problem
    if names := [package.name for package in packages if package not in unpacked]:
        options = ("-qq", "--yes", "--no-install-recommends")
        why = _apt("install", *options, *names, seconds=INSTALL_SECONDS) if is_root else "only root installs packages"
        problem = why or problem
    return problem


def _unpack(packages: Sequence[Package]) -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=FOLDER) as place:
        names = sorted({name for package in packages for name in (package.name, *package.libraries)})
        if problem := _apt("download", "-qq", *names, seconds=DOWNLOAD_SECONDS, folder=place):
            return problem
        root = Path(place) / "root"
        for archive in sorted(Path(place).glob("*.deb")):
            if problem := _run(["dpkg-deb", "--extract", str(archive), str(root)], DOWNLOAD_SECONDS):
                return problem
        try:
            for file in (file for package in packages for file in package.fixed if not file.exists()):
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file.relative_to("/"), file)
        except OSError as error:
            return str(error)
        _put_in_place(root)
    return ""


def _put_in_place(root: Path) -> None:
    """Move programs and libraries from where they were unpacked to; those that are there, and may run, are replaced."""
    for pattern, where in _PLACES.items():
        for folder in root.glob(pattern):
            for file in folder.rglob("*"):
                if file.is_symlink() or not file.is_dir():
                    target = FOLDER / where / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)


def _apt(*arguments: str, seconds: int, folder: str | None = None) -> str:
    # without a user of its own apt can write into our folder; with a time limit it waits for another apt's lock
    options = ("-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=2")
    return _run(["apt-get", *options, *arguments], seconds, folder)


def _run(command: Sequence[str], seconds: int, folder: str | None = None) -> str:
    """Run a command; returns the last line of what it complained of if it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines() or [f"{command[0]} ended with exit code {done.returncode}"]
    return said[-1] if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
