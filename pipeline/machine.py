"""What a program runs on and with, so that its figures can be read later: hardware, versions of packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import psutil

from pipeline import __version__
from pipeline.cores import available_cores


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Lathe and Python, and of the packages that are installed."""
    found = {name: version for name in packages if (version := _version(name))}
    return {"lathe": __version__, "python": platform.python_version(), **found}


def hardware() -> dict[str, str | int]:
    """The machine without its accelerators, which torch knows."""
    return {
        "processor": processor(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name, as its maker has it where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return installed(package)
    except PackageNotFoundError:
        return ""
