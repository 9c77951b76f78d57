"""Checkpoints as several ranks write them, without an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from safetensors.torch import save as tensor_bytes
from torch import Tensor

from pipeline.storage import Store
from pipeline.train.checkpoint import COMPLETE, DONE, FORMAT_VERSION, FROZEN, RUN, noted, step_name


def write_checkpoint(
    store: Store,
    step: int,
    contents: Mapping[str, Mapping[str, Tensor]],
    *,
    cuts: list[int] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    texts: Mapping[str, bytes] | None = None,
    counters: Mapping[str, int] | None = None,
) -> str:
    """Tensors by key and parameter, the parameters end to end, cut at `cuts` into one file a rank."""
    name, (shapes, *_) = step_name(step), list(contents.values())
    order = [(n, i) for n, w in shapes.items() for i in range(w.numel())]
    bounds = [0, *sorted(cuts or []), len(order)]
    run: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "counters": {"step": step, "optimizer_step": step, **(counters or {})},
        "parameters": {n: list(w.shape) for n, w in shapes.items()},
        "keys": list(contents),
    }
    files = {RUN: json.dumps(run).encode(), FROZEN: tensor_bytes(dict(frozen or {})), **(texts or {})}
    for rank, (start, end) in enumerate(pairwise(bounds)):
        index, tensors = [], {}
        for parameter in shapes:
            owned = [i for n, i in order[start:end] if n == parameter]
            if owned:
                index.append((parameter, owned[0], len(owned)))
                for key, weights in contents.items():
                    part = weights[parameter].flatten()[owned[0] : owned[-1] + 1]
                    tensors[f"{parameter}:{owned[0]}:{key}"] = part.clone()
        stem = f"rank-{rank:05d}-of-{len(bounds) - 1:05d}"
        files[f"{stem}.safetensors"] = tensor_bytes(tensors)
        files[f"{stem}{DONE}"] = json.dumps({"file": f"{stem}.safetensors", "fragments": index, "notes": {}}).encode()
    for file, data in files.items():
        store.write(f"{name}/{file}", data)
    store.write(f"{name}/{COMPLETE}", json.dumps({"files": {f: noted(d) for f, d in files.items()}}).encode())
    return name
