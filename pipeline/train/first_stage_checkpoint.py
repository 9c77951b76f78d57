"""The first stage's checkpoints: one file of tensors, then its facts as the marker that completes it.

checkpoints/step-00000200/state.safetensors, and state.json beside it with the tensors' SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from pipeline.storage import Store

FOLDER = "checkpoints/"
_TENSORS, _FACTS = "state.safetensors", "state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its name, its tensors on the CPU, its facts."""

    name: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save(store: Store, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> int:
    """Write a checkpoint of step `facts["step"]`, then delete all but the newest `keep`. Returns its bytes."""
    name = f"{FOLDER}step-{facts['step']:08d}"
    with tempfile.TemporaryDirectory(prefix="lathe-checkpoint-") as folder:
        local = Path(folder) / _TENSORS
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, local)
        with local.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = local.stat().st_size
        store.upload(local, f"{name}/{_TENSORS}")
    store.write(f"{name}/{_FACTS}", json.dumps({**facts, "sha256": digest}, indent=1).encode())
    for old in _complete(store)[:-keep]:
        _delete(store, old)
    return size


def restore(store: Store) -> Saved | None:
    """The newest checkpoint that is whole; None when there is none. A damaged one is passed over, and said so."""
    for name in reversed(_complete(store)):
        facts = json.loads(store.read(f"{name}/{_FACTS}"))
        data = store.read(f"{name}/{_TENSORS}")
        if hashlib.sha256(data).hexdigest() == facts.pop("sha256"):
            return Saved(name, load(data), facts)
        _log.warning("%s/%s is damaged; going on from the checkpoint before it", store.url, name)
    return None


def newest_step(store: Store) -> int:
    """Of the newest checkpoint that has both files; -1 = there is none."""
    names = _complete(store)
    return int(names[-1].rpartition("-")[2]) if names else -1


def clear(store: Store) -> None:
    """Delete all checkpoints, markers first."""
    for name in _complete(store):
        _delete(store, name)
    store.delete([entry.name for entry in store.list(FOLDER)])


def _complete(store: Store) -> list[str]:
    """Names of the checkpoints that have both files, oldest first."""
    files = {entry.name for entry in store.list(FOLDER)}
    names = (file.removesuffix(f"/{_FACTS}") for file in files if file.endswith(f"/{_FACTS}"))
    return sorted(name for name in names if f"{name}/{_TENSORS}" in files)


def _delete(store: Store, name: str) -> None:
    store.delete([f"{name}/{_FACTS}"])
    store.delete([f"{name}/{_TENSORS}"])
