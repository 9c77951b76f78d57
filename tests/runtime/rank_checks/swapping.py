"""Forward passes with an average for weights, in the midst of a training that must not notice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.runtime import state
from pipeline.runtime.base import DTYPES
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from rank_checks.memory import tensors
from rank_checks.nets import BATCH, ENGINES, KEYS, build, copied, inputs, net, train, unchanged

WAYS = {name: (stage, {}) for name, stage in ENGINES.items()} | {
    "offloaded": (3, {"offload_optimizer": True, "offload_parameters": True})
}


@torch.no_grad()
def said(built: Engine, x: Tensor) -> Tensor:
    built.module.eval()
    output: Tensor = built.module(x)
    built.module.train()
    return output.clone()


def by_hand(ranks: Process, built: Engine, key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a network says that has the average's numbers, put together from all ranks' fragments."""
    whole = {name: torch.zeros(p).flatten() for name, p in state.shapes(built).items()}
    for f in state.fragments(built):
        whole[f.parameter][f.offset : f.offset + f.length] = f.tensors[key]
    plain = net()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in whole:
                parameter.copy_(ranks.sum(whole[name]).view(parameter.shape))
        return plain.to(dtype)(x)


def held(built: Engine) -> int:
    """Bytes of all that is held, averages included."""
    found = [tensor for _, kind in tensors(built) for tensor in kind]
    found += [built.optimizer.state[piece.flat][key] for piece in built.pieces() for key in KEYS]
    storages = (tensor.untyped_storage() for tensor in found)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def swapped(ranks: Process, stage: int, precision: str, **settings: Any) -> dict[str, Any]:
    dtype, batches = DTYPES[precision], inputs(6)
    x = batches[5].to(dtype)[: BATCH // ranks.world_size]
    plain = build(ranks, stage, precision, **settings)
    undisturbed = train(plain, batches[:4], ranks)
    built = build(ranks, stage, precision, **settings)
    losses = train(built, batches[:2], ranks)
    before, raw, memory, scale = copied(built), said(built, x), held(built), built.loss_scale
    seen = {}
    for key in KEYS:
        with built.using(key):
            seen[key] = torch.equal(said(built, x), by_hand(ranks, built, key, x, dtype))
            seen["memory"] = held(built) == memory > 0
    try:
        with built.using(KEYS[0]):
            raise InterruptedError
    except InterruptedError:
        seen["back"] = torch.equal(said(built, x), raw)
    seen["other"] = not torch.equal(by_hand(ranks, built, KEYS[0], x, dtype), raw)
    seen["state"] = unchanged(built, before) and built.loss_scale == scale
    losses += train(built, batches[2:4], ranks)
    seen["training"] = losses == undisturbed and unchanged(plain, copied(built))
    return seen


def checks(ranks: Process) -> dict[str, dict[str, Any]]:
    return {
        f"{name} {precision}": swapped(ranks, stage, precision, **settings)
        for name, (stage, settings) in WAYS.items()
        for precision in DTYPES
        if precision != "float16" or name in ("ddp", "zero2")
    }
