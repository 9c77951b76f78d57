"""What a benchmark ran on and with, so that its figures can be read later."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from pipeline.cores import available_cores
from pipeline.machine import processor, versions

PACKAGES = ("torch", "torchvision", "diffusers", "open-clip-torch", "webdataset", "pillow", "numpy", "s3fs")


def setting(wanted: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine, and versions of the packages that are installed."""
    packages = versions(wanted)
    return {
        "lathe": packages.pop("lathe"),
        "python": packages.pop("python"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": available_cores(),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute: what others did beside it
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "packages": packages,
    }
