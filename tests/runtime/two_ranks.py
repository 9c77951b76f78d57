"""Run by every rank of `test_ranks`: several checks in one pair of processes; rank r leaves `result-r.json`.

Usage: two_ranks.py FOLDER {write,read}
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig, OptimizerConfig
from pipeline.errors import LatheError, SetupError, StorageError
from pipeline.runtime import engine, process, state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train import checkpoint, sharded
from pipeline.train.optimizer import STATE_KEYS, AdamWithEMA, parameter_groups

RATE, DECAY, WEIGHT_DECAY, STEPS = 1e-2, 0.5, 0.1, 6


class Net(nn.Module):
    """Odd sizes, so that parameters cross the border between ranks; a frozen table; norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 7).requires_grad_(False)
        self.inner = nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.SiLU(), nn.Linear(33, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.table(torch.tensor(2)).to(x.dtype))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs() -> Tensor:
    return torch.randn(STEPS, 4, 7, generator=torch.Generator().manual_seed(5))


def build(ranks: Process, stage: int, precision: str, *, fused: bool = True) -> Engine:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one engine a process is the rule; here several are tried
    module = net()
    rates = OptimizerConfig(learning_rate=RATE)
    optimizer = AdamWithEMA(parameter_groups(module, WEIGHT_DECAY), rates, DECAY, fused=fused)
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision})
    return engine.build(ranks, module, optimizer, config, micro_batch=4)


def train(built: Engine, batches: Tensor) -> list[float]:
    losses = []
    for x in batches:
        dtype = next(built.module.parameters()).dtype
        loss = (built(x.to(dtype)).float() - x).square().mean()
        built.backward(loss)
        built.step(RATE)
        losses.append(loss.item())
    return losses


def reference() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same steps by hand: torch's AdamW in one process, and an average beside it."""
    module = net()
    average = copy.deepcopy(dict(module.named_parameters()))
    optimizer = torch.optim.AdamW(parameter_groups(module, WEIGHT_DECAY), lr=RATE, betas=(0.9, 0.99))
    for step, x in enumerate(inputs(), start=1):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
        for name, parameter in module.named_parameters():
            average[name].data.lerp_(parameter.data, 1 - min(DECAY, (1 + step) / (10 + step)))
    return module, average


def worst(found: Engine, expected: dict[str, Tensor], key: str) -> float:
    """Largest difference over this rank's fragments."""
    pairs = ((f, expected[f.parameter].detach().flatten()[f.offset : f.offset + f.length]) for f in fragments(found))
    return max(float((f.tensors[key] - part).abs().max()) for f, part in pairs)


def fragments(built: Engine) -> list[state.Fragment]:
    return state.fragments(built, STATE_KEYS)


def same(first: Engine, second: Engine) -> bool:
    pairs = zip(fragments(first), fragments(second), strict=True)
    return all(torch.equal(a.tensors[k], b.tensors[k]) for a, b in pairs for k in a.tensors)


def against_reference(ranks: Process, stage: int, precision: str) -> dict[str, Any]:
    built = build(ranks, stage, precision, fused=False)
    train(built, inputs())
    module, average = reference()
    return {
        "engine": str(built),
        "weight": worst(built, dict(module.named_parameters()), state.WEIGHT),
        "ema": worst(built, average, "ema"),
        "ema_dtypes": sorted({str(f.tensors["ema"].dtype) for f in fragments(built)}),
        "fragments": [(f.parameter, f.offset, f.length) for f in fragments(built)],
    }


def non_finite(ranks: Process, precision: str) -> dict[str, Any]:
    """The last rank's loss is infinite once, with finite gradients: added, not multiplied."""
    built = build(ranks, 2, precision)
    train(built, inputs()[:2])
    before = {(f.parameter, k): t.clone() for f in fragments(built) for k, t in f.tensors.items()}
    x = inputs()[2]
    loss = (built(x.to(next(built.module.parameters()).dtype)).float() - x).square().mean()
    built.backward(loss + torch.inf if ranks.rank == ranks.world_size - 1 else loss)
    built.step(RATE)
    skipped, norm = built.skipped, built.gradient_norm()
    kept = all(torch.equal(before[f.parameter, k], t) for f in fragments(built) for k, t in f.tensors.items())
    train(built, inputs()[3:4])
    return {"skipped": skipped, "norm": norm, "kept": kept, "then": built.skipped, "steps": state.optimizer_step(built)}


def saving(ranks: Process, folder: Path) -> dict[str, Any]:
    """Save after three steps; a second engine, restored, goes on as the first does."""
    store = open_store(str(folder / "run"))
    first = build(ranks, 2, "float32")
    train(first, inputs()[:3])
    size = sharded.save(
        store, ranks, first, step=3, texts={"note.txt": b"x"}, counters={"skipped": 2}, notes={"rank": ranks.rank}
    )
    second = build(ranks, 1, "float32")
    (saved,) = checkpoint.find(store)
    assert size == (sum(f["size"] for f in saved.files.values()) if ranks.is_main else 0)
    counters = sharded.restore(saved, ranks, second, lambda _: None)
    restored = same(first, second)
    losses = [train(built, inputs()[3:]) for built in (first, second)]
    after = same(first, second)
    if ranks.is_main:
        (folder / "losses.json").write_text(json.dumps(losses[0]))
    noted = saved.notes()
    return {"counters": counters, "notes": noted, "restored": restored, "losses": losses, "after": after}


def failing_save(ranks: Process, folder: Path) -> dict[str, Any]:
    """The last rank cannot write: all ranks are told, and the checkpoint before is still the newest."""

    class Full:
        url = str(folder / "run")

        def __getattr__(self, name: str) -> Any:
            return getattr(open_store(self.url), name)

        def write(self, name: str, data: bytes) -> bool:
            if ranks.rank == ranks.world_size - 1:
                raise StorageError("no space left", "make room")
            return open_store(self.url).write(name, data)

    try:
        sharded.save(Full(), ranks, build(ranks, 2, "float32"), step=4, texts={}, counters={}, notes={})  # type: ignore[arg-type]
    except LatheError as error:
        return {"error": error.message, "exit_code": error.exit_code, "latest": checkpoint.latest(open_store(Full.url))}
    return {}


def damaged(ranks: Process, folder: Path) -> dict[str, Any]:
    """One byte of one rank's file is changed: no rank takes the checkpoint."""
    store = open_store(str(folder / "run"))
    (saved,) = checkpoint.find(store)
    file = folder / "run" / saved.name / "rank-00001-of-00002.safetensors"
    whole = file.read_bytes()
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ranks.agree()
    result = sharded.restore(saved, ranks, build(ranks, 2, "float32"), lambda _: None)
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole)
    return {"restored": result is not None}


def flags(ranks: Process) -> list[int]:
    """Rank 1 asks to stop in the second step; all hear of it in the third."""
    return [ranks.exchange(15 if ranks.rank == 1 and step == 1 else 0) for step in range(4)]


def elsewhere(ranks: Process, folder: Path) -> dict[str, Any]:
    """What two ranks saved, restored by this many."""
    (saved,) = checkpoint.find(open_store(str(folder / "run")))
    built = build(ranks, 2, "float32")
    counters = sharded.restore(saved, ranks, built, lambda _: None)
    averages = checkpoint.load_weights(saved.store, saved.name, "ema")
    return {"counters": counters, "ema": worst(built, averages, "ema"), "losses": train(built, inputs()[3:])}


def wrong_world() -> str:
    from accelerate.state import PartialState

    try:
        process.start(EngineConfig(world_size=3))
    except SetupError as error:
        PartialState._reset_state()  # a second try in one process; users start a new one
        return str(error)
    return ""


def main(folder: Path, what: str) -> None:
    refused = wrong_world() if what == "read" else ""
    ranks = process.start(EngineConfig(threads_per_rank=1, timeout_seconds=60))
    result: dict[str, Any] = {"world_size": ranks.world_size}
    if what == "write":
        for stage, precision in ((1, "float32"), (2, "float32"), (2, "bfloat16")):
            result[f"{stage} {precision}"] = against_reference(ranks, stage, precision)
        result["non_finite"] = {precision: non_finite(ranks, precision) for precision in ("float32", "bfloat16")}
        result["saving"] = saving(ranks, folder)
        result["failing_save"] = failing_save(ranks, folder)
        result["damaged"] = damaged(ranks, folder)
        result["flags"] = flags(ranks)
    else:
        result["wrong_world"] = refused
        result["elsewhere"] = elsewhere(ranks, folder)
    (folder / f"{what}-{ranks.rank}.json").write_text(json.dumps(result))
    ranks.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
