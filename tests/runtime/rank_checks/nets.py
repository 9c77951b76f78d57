"""A small network in any engine, its steps, and the same steps by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig
from pipeline.data.threads import WorkerThreads
from pipeline.runtime import deepspeed_config, engine, state
from pipeline.runtime.engine import Engine, Outcome
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train.ema_profiles import power_decay
from pipeline.train.optimizer import AdamWithEMA, average_key, parameter_groups
from pipeline.train.saver import Save, Saver
from pipeline.train.shelf import Shelf, newest_and_every

RATE, WEIGHT_DECAY, STEPS, MANY_STEPS, BATCH = 1e-2, 0.1, 6, 50, 8
AVERAGES = (
    AverageConfig(decay=0.5),
    AverageConfig(name="slow", decay=0.99),
    AverageConfig(name="power", sigma_rel=0.1),
)
KEYS = [average_key(average.name) for average in AVERAGES]
ENGINES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


class Net(nn.Module):
    """Odd sizes, so that parameters cross the border between ranks; a frozen table; norms; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 7).requires_grad_(False)
        self.inner = nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.SiLU(), nn.Linear(33, 7))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.table(torch.tensor(2)).to(x.dtype))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs(steps: int = STEPS) -> Tensor:
    return torch.randn(steps, BATCH, 7, generator=torch.Generator().manual_seed(5))


def prepare() -> None:
    """What small networks need: some of ZeRO-3's parameters kept whole, some not; float16 on any CPU."""
    from deepspeed.accelerator import get_accelerator

    deepspeed_config.PERSISTENT_ELEMENTS = 40
    get_accelerator().is_fp16_supported = lambda: True


def build(
    ranks: Process,
    stage: int,
    precision: str = "float32",
    *,
    fused: bool = True,
    clip: float = 0.0,
    ratios: Mapping[str, float] | None = None,
    **settings: Any,
) -> Engine:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one engine a process is the rule; here several are tried
    module = net()
    optimizer = AdamWithEMA(
        parameter_groups(module, WEIGHT_DECAY, ratios),
        OptimizerConfig(learning_rate=RATE),
        AVERAGES,
        fused=fused or stage == 0,
    )
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision, **settings})
    share = engine.micro_batch(config, BATCH, ranks.world_size)
    return engine.build(ranks, module, optimizer, config, micro_batch=share, gradient_clip=clip)


def backward(built: Engine, x: Tensor, *, add: float = 0.0, times: float = 1.0) -> list[float]:
    """The micro batches of a step; `add` goes to the loss of the first one, `times` to all."""
    losses = []
    for place, part in enumerate(x.chunk(built.accumulation)):
        dtype = next(p for p in built.module.parameters() if p.requires_grad).dtype
        loss = times * (built(part.to(dtype)).float() - part).square().mean()
        built.backward(loss + add if place == 0 and add else loss)
        losses.append(loss.item())
    return losses


def train(built: Engine, batches: Tensor, ranks: Process | None = None) -> list[float]:
    """Losses of these steps: of batches that all ranks have, or with `ranks` of each rank's own share, averaged."""
    losses = []
    for x in batches:
        own = x if ranks is None else x.chunk(ranks.world_size)[ranks.rank]
        parts = backward(built, own)
        built.step(RATE)
        losses.append(sum(parts) / len(parts))
    if ranks is None:
        return losses
    return [float(v) for v in ranks.sum(torch.tensor(losses, dtype=torch.float64)) / ranks.world_size]


def reference(steps: int = STEPS, *, flat: bool = False) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The same steps by hand: torch's AdamW in one process, and averages beside it by key and parameter.

    With `flat` the groups lie end to end and the fused AdamW goes through them: its last bits depend on that.
    """
    module = net()
    averages = {key: copy.deepcopy(dict(module.named_parameters())) for key in KEYS}
    groups = parameter_groups(module, WEIGHT_DECAY)
    wholes = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]])) for group in groups]
    settings = {"lr": RATE, "betas": (0.9, 0.99)}
    flats = [{**group, "params": [whole]} for group, whole in zip(groups, wholes, strict=True)]
    optimizer = torch.optim.AdamW(flats if flat else groups, fused=flat, **settings)
    for step, x in enumerate(inputs(steps), start=1):
        module.zero_grad()
        (module(x) - x).square().mean().backward()
        for group, whole in zip(groups, wholes, strict=True):
            whole.grad = torch.cat([p.grad.flatten() for p in group["params"]])
        optimizer.step()
        if flat:
            for group, whole in zip(groups, wholes, strict=True):
                parts = whole.detach().split([p.numel() for p in group["params"]])
                for parameter, part in zip(group["params"], parts, strict=True):
                    parameter.data.copy_(part.view_as(parameter))
        warm = (1 + step) / (10 + step)
        for key, decay in zip(KEYS, (min(0.5, warm), min(0.99, warm), power_decay(step, 0.1)), strict=True):
            for name, parameter in module.named_parameters():
                averages[key][name].data.lerp_(parameter.data, 1 - decay)
    return module, averages


def worst(found: Engine, expected: Mapping[str, Tensor], key: str) -> float:
    """Largest difference over this rank's fragments."""
    pairs = (
        (f, expected[f.parameter].detach().flatten()[f.offset : f.offset + f.length]) for f in state.fragments(found)
    )
    return max(float((f.tensors[key] - part).abs().max()) for f, part in pairs)


def same(first: Engine, second: Engine) -> bool:
    """Whether all state of two engines of one layout is the same to the bit."""
    pairs = list(zip(state.fragments(first), state.fragments(second), strict=True))
    return all(torch.equal(a.tensors[k], b.tensors[k]) for a, b in pairs for k in a.tensors)


def copied(found: Engine) -> dict[tuple[str, str], Tensor]:
    """This rank's state."""
    return {(f.parameter, key): t.clone() for f in state.fragments(found) for key, t in f.tensors.items()}


def unchanged(found: Engine, before: Mapping[tuple[str, str], Tensor]) -> bool:
    """Whether the state is what it was, to the bit."""
    return all(torch.equal(before[f.parameter, k], t) for f in state.fragments(found) for k, t in f.tensors.items())


def save(store: Store, ranks: Process, found: Engine, *, step: int, **given: Any) -> int:
    """A checkpoint that is waited for; bytes of all its files on rank 0."""
    done: list[Save] = []
    worker = WorkerThreads(1, "save")
    shelf, texts = Shelf(store, newest_and_every(None)), given.pop("texts", {})
    saver = Saver(store, ranks, found, worker, shelf, texts=texts, when_done=done.append)
    saver.begin(step, counters=given.get("counters", {}), notes=given.get("notes", {}))
    saver.settle(last=True)
    worker.close(5)
    return done[0].size


def outcomes(found: Engine) -> list[str]:
    """Of the steps since the last call, all of them."""
    return [Outcome(outcome).name for outcome in found.outcomes(wait=True)]
