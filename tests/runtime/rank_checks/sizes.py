"""Parameters that are very large, and groups so small that a rank has nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train import checkpoint, sharded
from rank_checks.nets import ENGINES, RATE, build, save

ELEMENTS = 3_000_001


class Field(nn.Module):
    """One parameter, whose gradient is what the module is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def norm(ranks: Process, stage: int, gradient: Tensor) -> float:
    """How far, of itself, the norm that an engine tells is from that of the gradient."""
    built = build(ranks, stage, module=Field())
    built.backward(built(gradient))
    built.step(RATE)
    return abs(built.gradient_norm() / float(gradient.double().norm()) - 1)


def step(built: Engine, x: Tensor) -> float:
    loss = built(x).square().mean()
    built.backward(loss)
    built.step(RATE)
    return loss.item()


def without_a_piece(ranks: Process, folder: Path, source: int, target: int) -> dict[str, Any]:
    """Bias of one element: a group of its own, of which the second of two ranks has nothing."""
    torch.manual_seed(1)
    batches, plain = torch.randn(5, 3, 4), nn.Linear(4, 1)
    first = build(ranks, source, module=nn.Linear(4, 1))
    store = open_store(str(folder / f"tiny-{source}"))
    for x in batches[:2]:
        step(first, x)
    first.outcomes(wait=True)
    save(store, ranks, first, step=2)
    (saved,) = checkpoint.find(store)
    second = build(ranks, target, module=plain)
    counters = sharded.restore(saved, ranks, second, lambda _: None)
    return {
        "pieces": [f.parameter for f in state.fragments(second)],
        "steps": counters["optimizer_step"],
        "off": max(abs(step(first, x) - step(second, x)) for x in batches[2:]),
    }


def checks(ranks: Process, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    gradients = {"alike": torch.full((ELEMENTS,), 0.1), "random": torch.randn(ELEMENTS)}
    stages = list(ENGINES.items())
    return {
        "norms": {f"{n} {how}": norm(ranks, stage, g) for n, stage in stages for how, g in gradients.items()},
        "tiny": {
            f"{n} to {m}": without_a_piece(ranks, folder, stage, other)
            for (n, stage), (m, other) in zip(stages, [*stages[1:], stages[0]], strict=True)
        },
    }
