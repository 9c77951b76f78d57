"""What a new engine has: rank 0's weights, unrounded; and how it refuses parameters that take no part."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import SetupError
from pipeline.runtime import state
from pipeline.runtime.base import DTYPES
from pipeline.runtime.process import Process
from rank_checks.nets import ENGINES, RATE, Net, backward, build, inputs, worst


def own_net(rank: int) -> Net:
    """Other weights and buffers on each rank; a buffer that no checkpoint holds."""
    torch.manual_seed(rank)
    module = Net()
    module.seen.fill_(0.1 + rank)
    module.register_buffer("there", torch.tensor(rank == 0), persistent=False)
    return module


def started(ranks: Process, stage: int, precision: str) -> dict[str, Any]:
    """How far from rank 0's float32 network all masters are, what is frozen is as it was given, and so are buffers."""
    built = build(ranks, stage, precision, module=own_net(ranks.rank))
    first = own_net(0)
    result: dict[str, Any] = {"masters": worst(built, dict(first.named_parameters()), state.WEIGHT)}
    low = built.module.inner[0].weight
    with torch.no_grad(), built.whole(low):
        result["working"] = torch.equal(low, first.inner[0].weight.to(DTYPES[precision]))
    result["buffers"] = torch.equal(built.module.seen, first.seen) and bool(built.module.there)
    frozen = state.frozen(built, keep=ranks.is_main)
    result["given"] = not ranks.is_main or torch.equal(frozen["table.weight"], first.table.weight)
    other = torch.full((5, 7), 0.1)
    state.set_frozen(built, {"table.weight": other, "seen": torch.ones(3)})
    frozen = state.frozen(built, keep=ranks.is_main)
    result["restored"] = not ranks.is_main or torch.equal(frozen["table.weight"], other)
    table = built.module.table.weight
    with torch.no_grad(), built.whole(table):
        result["used"] = torch.equal(table, other.to(table.dtype)) and table.dtype == DTYPES[precision]
    return result


def unused(ranks: Process, precision: str) -> str:
    """What is said of two parameters that the loss does not depend on, before anything is updated."""
    module = own_net(0)
    module.spare = torch.nn.Linear(2, 2)
    built = build(ranks, 0, precision, module=module)
    backward(built, inputs()[0])
    try:
        built.step(RATE)
    except SetupError as error:
        return str(error)
    return ""


def checks(ranks: Process) -> dict[str, Any]:
    result: dict[str, Any] = {"unused": [unused(ranks, precision) for precision in DTYPES]}
    for name, stage in ENGINES.items():
        for precision in DTYPES:
            result[f"{name} {precision}"] = started(ranks, stage, precision)
    return result
