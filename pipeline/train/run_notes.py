"""What a run notes of each of its starts, for those who look at it later: its run file, and what it ran on and with.

`run.yaml` is the resolved run file of the last start; `starts.json` has a line of facts for each of them. Nothing reads
them to train.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from pipeline import runfile
from pipeline.config import RunConfig
from pipeline.console import tell
from pipeline.errors import StorageError
from pipeline.machine import hardware, versions
from pipeline.storage import Store

RUN_FILE, STARTS = "run.yaml", "starts.json"
_KEPT = 1000  # of a run that is requeued again and again
_PACKAGES = ("torch", "deepspeed", "accelerate", "diffusers", "transformers", "open-clip-torch", "numpy", "safetensors")


def note_start(store: Store, config: RunConfig, device: torch.device, *, step: int, **facts: Any) -> None:
    """Note a start in the run's output, by one process. A store that does not take it is no reason not to train.

    Args:
        store: the run's output.
        config: the resolved run file.
        device: that is trained on.
        step: steps done before.
        facts: others, for JSON.
    """
    cuda = device.type == "cuda"
    start = {
        "time": round(time.time(), 3),
        "step": step,
        **facts,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "versions": {**versions(_PACKAGES), **({"cuda": torch.version.cuda or ""} if cuda else {})},
        "hardware": hardware(),
    }
    try:
        before = _parsed(store.read(STARTS)) if store.exists(STARTS) else []
        if before is None:
            tell(f"{store.url}/{STARTS} is damaged: the starts before this one are lost")
        lines = ",\n".join(json.dumps(one) for one in [*(before or [])[1 - _KEPT :], start])
        store.write(STARTS, f"[\n{lines}\n]\n".encode())
        store.write(RUN_FILE, runfile.dump(config).encode())
    except StorageError as error:
        tell(f"this start could not be noted: {error.message}")


def read_starts(store: Store) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where they cannot be understood. Raises StorageError."""
    return (_parsed(store.read(STARTS)) if store.exists(STARTS) else None) or []


def _parsed(content: bytes) -> list[dict[str, Any]] | None:
    """The starts that are noted; None where the notes are damaged."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else None
