"""What a benchmark ran on and with, so that its figures can be read later."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import __version__
from pipeline.cores import available_cores

PACKAGES = ("torch", "torchvision", "diffusers", "open-clip-torch", "webdataset", "pillow", "numpy", "s3fs")


def setting(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine, and versions of the packages that are installed."""
    return {
        "lathe": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": available_cores(),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute: what others did beside it
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "packages": {name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
