"""Run by every rank of `test_ranks`: several checks in one pair of processes; rank r leaves `result-r.json`.

Usage: two_ranks.py FOLDER {write,read}
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import runfile
from pipeline.config import AverageConfig, EMAConfig, EngineConfig, OptimizerConfig, TrainConfig
from pipeline.errors import LatheError, SetupError, StorageError
from pipeline.runtime import engine, process, state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint, sharded, snapshots
from pipeline.train.ema_profiles import decay_at, power_decay
from pipeline.train.optimizer import AdamWithEMA, average_key, parameter_groups
from pipeline.train.snapshots import Snapshots

RATE, WEIGHT_DECAY, STEPS, MANY_STEPS = 1e-2, 0.1, 6, 50
AVERAGES = (
    AverageConfig(decay=0.5),
    AverageConfig(name="slow", decay=0.99),
    AverageConfig(name="power", sigma_rel=0.1),
)
OF_THE_LAST_RANK = "rank-00001-of-00002.safetensors"
KEYS = [average_key(average.name) for average in AVERAGES]


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


def inputs(steps: int = STEPS) -> Tensor:
    return torch.randn(steps, 4, 7, generator=torch.Generator().manual_seed(5))


def build(
    ranks: Process, stage: int, precision: str, *, fused: bool = True, ratios: Mapping[str, float] | None = None
) -> Engine:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one engine a process is the rule; here several are tried
    module = net()
    rates = OptimizerConfig(learning_rate=RATE)
    optimizer = AdamWithEMA(parameter_groups(module, WEIGHT_DECAY, ratios), rates, AVERAGES, fused=fused)
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


def reference(steps: int = STEPS) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The same steps by hand: torch's AdamW in one process, and averages beside it by key and parameter."""
    module = net()
    averages = {key: copy.deepcopy(dict(module.named_parameters())) for key in KEYS}
    optimizer = torch.optim.AdamW(parameter_groups(module, WEIGHT_DECAY), lr=RATE, betas=(0.9, 0.99))
    for step, x in enumerate(inputs(steps), start=1):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
        warm = (1 + step) / (10 + step)
        for key, decay in zip(KEYS, (min(0.5, warm), min(0.99, warm), power_decay(step, 0.1)), strict=True):
            for name, parameter in module.named_parameters():
                averages[key][name].data.lerp_(parameter.data, 1 - decay)
    return module, averages


def worst(found: Engine, expected: dict[str, Tensor], key: str) -> float:
    """Largest difference over this rank's fragments."""
    pairs = (
        (f, expected[f.parameter].detach().flatten()[f.offset : f.offset + f.length]) for f in state.fragments(found)
    )
    return max(float((f.tensors[key] - part).abs().max()) for f, part in pairs)


def same(first: Engine, second: Engine) -> bool:
    pairs = zip(state.fragments(first), state.fragments(second), strict=True)
    return all(torch.equal(a.tensors[k], b.tensors[k]) for a, b in pairs for k in a.tensors)


def against_reference(ranks: Process, stage: int, precision: str, steps: int = STEPS) -> dict[str, Any]:
    built = build(ranks, stage, precision, fused=False)
    train(built, inputs(steps))
    module, averages = reference(steps)
    return {
        "engine": str(built),
        "weight": worst(built, dict(module.named_parameters()), state.WEIGHT),
        "averages": {key: worst(built, averages[key], key) for key in KEYS},
        "dtypes": sorted({str(f.tensors[key].dtype) for f in state.fragments(built) for key in KEYS}),
        "fragments": [(f.parameter, f.offset, f.length) for f in state.fragments(built)],
    }


def against_own_masters(ranks: Process, precision: str) -> dict[str, Any]:
    """Averages by hand, of the float32 masters as they were after each step: this rank's part."""
    built = build(ranks, 2, precision, fused=False)
    of_masters = {(f.parameter, key): f.tensors[state.WEIGHT].clone() for f in state.fragments(built) for key in KEYS}
    of_working = {place: tensor.clone() for place, tensor in of_masters.items()}
    for step, x in enumerate(inputs(MANY_STEPS), start=1):
        train(built, x[None])
        for f in state.fragments(built):
            master = f.tensors[state.WEIGHT]
            for key, average in zip(KEYS, AVERAGES, strict=True):
                share = 1.0 - decay_at(average, step)
                of_masters[f.parameter, key].lerp_(master, share)
                of_working[f.parameter, key].lerp_(master.bfloat16().float(), share)
    found = {(f.parameter, key): f.tensors[key] for f in state.fragments(built) for key in KEYS}
    return {
        "off": max(float((found[place] - of_masters[place]).abs().max()) for place in found),
        "of_working": min(float((found[place] - of_working[place]).abs().max()) for place in found),
    }


def own_rate(ranks: Process, folder: Path) -> dict[str, Any]:
    """A part of the model learns at a tenth of the rate; what is saved of it fits an engine with other groups."""
    ratios = {"inner.3.": 0.1}
    built, module = build(ranks, 2, "float32", fused=False, ratios=ratios), net()
    train(built, inputs()[:3])
    groups = [{**g, "lr": RATE * g["rate_ratio"]} for g in parameter_groups(module, WEIGHT_DECAY, ratios)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for x in inputs()[:3]:
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    store, plain = open_store(str(folder / "own-rate")), build(ranks, 1, "float32")
    sharded.save(store, ranks, built, step=3, texts={}, counters={}, notes={})
    (saved,) = checkpoint.find(store)
    sharded.restore(saved, ranks, plain, lambda _: None)
    expected = dict(module.named_parameters())
    groups_of = [len(one.zero_optimizer.param_groups) for one in (built, plain)]
    return {"groups": groups_of, "weight": [worst(one, expected, state.WEIGHT) for one in (built, plain)]}


class Watched:
    """A store that counts what is read, and on some ranks fails where it is told to."""

    def __init__(self, store: Store) -> None:
        self._store, self.url, self.markers_read, self.broken = store, store.url, 0, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, data: bytes) -> bool:
        if self.broken == "write":
            raise StorageError("cannot write", "make room")
        return self._store.write(name, data)

    def delete(self, names: Iterable[str]) -> None:
        if (names := list(names)) and self.broken == "delete":
            raise StorageError("cannot delete", "mend the store")
        self._store.delete(names)

    def read(self, name: str) -> bytes:
        self.markers_read += name.endswith(checkpoint.COMPLETE)
        return self._store.read(name)


def snapshotting(ranks: Process, folder: Path) -> dict[str, Any]:
    """Snapshots of the power function average alone, of one course, and what becomes of a failing store."""
    ema = EMAConfig(averages=AVERAGES, snapshot_every=2, snapshot_keep=3)
    config = TrainConfig(manifest="m", output=str(folder / "snapped"), steps=9, ema=ema)
    run, built = open_store(config.output), build(ranks, 2, "float32", fused=False)
    texts = {checkpoint.CONFIG: runfile.dump(config).encode()}
    store = Watched(snapshots.snapshot_store(run))
    snapshots.snapshot_store = lambda _: store  # type: ignore[assignment]

    def taken() -> list[int]:
        return [found.step for found in checkpoint.find(store)]

    def attempt(what: Callable[[], object]) -> str:
        try:
            what()
        except LatheError as error:
            return error.message
        return ""

    def resumed(step: int) -> Snapshots:
        found = Snapshots(run, ranks, built, config)
        gone.append(found.resume(step, texts))
        seen.append(taken())
        return found

    gone: list[list[str]] = []
    seen: list[list[int]] = []
    taker = resumed(0)
    taker.save(0, texts)
    for step, x in enumerate(inputs(9), start=1):
        train(built, x[None])
        if snapshots.due(config, step):
            taker.save(step, texts)
    if ranks.is_main:
        markers_read = store.markers_read
    seen.append(taken())
    (newest, *_) = checkpoint.find(store)
    refused = attempt(lambda: sharded.restore(newest, ranks, built, lambda _: None))
    missed = [snapshots.is_missing(run, config, step) for step in (6, 7, 4, 9)]
    ranks.agree()
    resumed(8)  # back by one: that of step 9 is of an abandoned course
    ranks.agree()
    if ranks.is_main:
        checkpoint.clear(store, checkpoint.step_name(8))
    ranks.agree()
    taker = resumed(8)  # as after a kill between checkpoint and snapshot
    taker.save(10, texts)
    store.broken = "delete" if ranks.is_main else ""
    failures = [attempt(lambda: taker.save(12, texts))]  # that of step 6 is too old then
    failures.append(attempt(lambda: Snapshots(run, ranks, built, config).resume(4, texts)))
    store.broken = "write" if not ranks.is_main else ""
    failures.append(attempt(lambda: taker.save(14, texts)))
    return {
        "taken": seen,
        "gone": gone,
        "markers_read": markers_read if ranks.is_main else 0,
        "refused": refused,
        "missed": missed,
        "failures": failures,
    }


def non_finite(ranks: Process, precision: str) -> dict[str, Any]:
    """The last rank's loss is infinite once, with finite gradients: added, not multiplied."""
    built = build(ranks, 2, precision)
    train(built, inputs()[:2])
    before = {(f.parameter, k): t.clone() for f in state.fragments(built) for k, t in f.tensors.items()}
    x = inputs()[2]
    loss = (built(x.to(next(built.module.parameters()).dtype)).float() - x).square().mean()
    built.backward(loss + torch.inf if ranks.rank == ranks.world_size - 1 else loss)
    built.step(RATE)
    skipped, norm = built.skipped, built.gradient_norm()
    kept = all(torch.equal(before[f.parameter, k], t) for f in state.fragments(built) for k, t in f.tensors.items())
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


def damaged(ranks: Process, folder: Path, name: str) -> dict[str, Any]:
    """One byte of a file is changed: no rank takes the checkpoint."""
    store = open_store(str(folder / "run"))
    (saved,) = checkpoint.find(store)
    file = folder / "run" / saved.name / name
    whole = file.read_bytes()
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ranks.agree()
    result = sharded.restore(saved, ranks, build(ranks, 2, "float32"), lambda _: None)
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole)
    ranks.agree()
    return {"restored": result is not None}


def flags(ranks: Process) -> list[int]:
    """Rank 1 asks to stop in the second step: all hear of it there."""
    found = []
    for step in range(3):
        ranks.post(15 if ranks.rank == 1 and step == 1 else 0)
        found.append(ranks.posted())
    return found


def differing(ranks: Process) -> list[list[str]]:
    """Values that the ranks compare: all alike, the second and the third other on each rank."""
    alike = {"a": 1, "b": (0.1, "x")}
    return [ranks.differing(alike), ranks.differing({**alike, "b": (0.1, ranks.rank), "c": -ranks.rank})]


def time_outs(ranks: Process) -> list[float]:
    """Seconds that each group waits for a rank: the side group, and the one that the engine reduces over."""
    groups = (ranks.side_group, build(ranks, 2, "float32").zero_optimizer.dp_process_group)
    return [group._get_backend(ranks.device).options._timeout.total_seconds() for group in groups]


def elsewhere(ranks: Process, folder: Path) -> dict[str, Any]:
    """What two ranks saved, restored by this many."""
    (saved,) = checkpoint.find(open_store(str(folder / "run")))
    built = build(ranks, 2, "float32")
    counters = sharded.restore(saved, ranks, built, lambda _: None)
    found = {key: checkpoint.load_weights(saved.store, saved.name, key.removeprefix("ema.")) for key in KEYS}
    return {
        "counters": counters,
        "ema": [worst(built, found[key], key) for key in KEYS],
        "losses": train(built, inputs()[3:]),
    }


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
        result["many steps"] = against_reference(ranks, 2, "float32", MANY_STEPS)
        result["own masters"] = against_own_masters(ranks, "bfloat16")
        result["own_rate"] = own_rate(ranks, folder)
        result["snapshotting"] = snapshotting(ranks, folder)
        result["non_finite"] = {precision: non_finite(ranks, precision) for precision in ("float32", "bfloat16")}
        result["saving"] = saving(ranks, folder)
        result["failing_save"] = failing_save(ranks, folder)
        result["damaged"] = [damaged(ranks, folder, file) for file in (checkpoint.RUN, OF_THE_LAST_RANK)]
        result["flags"] = flags(ranks)
        result["differing"] = differing(ranks)
        result["time_outs"] = time_outs(ranks)
    else:
        result["wrong_world"] = refused
        result["elsewhere"] = elsewhere(ranks, folder)
        result["many steps"] = against_reference(ranks, 2, "float32", MANY_STEPS)
    (folder / f"{what}-{ranks.rank}.json").write_text(json.dumps(result))
    ranks.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
