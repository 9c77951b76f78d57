"""Bytes per parameter and rank, of the tensors that really are there between backward and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig
from pipeline.runtime import engine
from pipeline.runtime.base import DTYPES, Engine
from pipeline.runtime.process import Process
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from rank_checks.nets import ENGINES, RATE

SIDE, LAYERS = 256, 8
PARAMETERS = LAYERS * SIDE * (SIDE + 1)


def watch_buckets(built: Engine) -> list[Tensor]:
    """DDP's own buckets, once it has reduced them; they are not to be had but from within."""
    found: list[Tensor] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, and takes no strings
        found.append(bucket.buffer())
        reduced = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return reduced.then(lambda done: done.value()[0])

    wrapped = getattr(built, "_wrapped", None)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.register_comm_hook(None, hook)
    return found


def tensors(built: Engine, buckets: Iterable[Tensor] = ()) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """What is held, by kind; of two kinds that share memory the first one counts."""
    parameters = list(built.module.parameters())
    zero = getattr(built, "_zero", None)
    yield "weights", [getattr(p, "ds_tensor", p) for p in parameters] + [p.data for p in parameters]
    gradients = [*buckets, *(p.grad for p in parameters if p.grad is not None)]
    if zero is None:
        gradients += [group.gradient for group in built._groups]
    elif hasattr(zero, "grad_partitions_flat_buffer"):
        gradients.append(zero.grad_partitions_flat_buffer)
    else:
        gradients += [t for part in zero.averaged_gradients.values() for t in part or ()]
    yield "gradients", gradients
    flats = {id(piece.flat): piece.flat for piece in built.pieces()}.values()
    yield "masters", flats
    for kind, keys in (("moments", ("exp_avg", "exp_avg_sq")), ("average", ("ema.main",))):
        yield kind, [built.optimizer.state[flat][key] for flat in flats for key in keys]


def measured(ranks: Process, stage: int, precision: str) -> dict[str, float]:
    """The most that is held after a micro batch; with two of them gradients must be kept in between."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    module = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS)))
    optimizer = AdamWithEMA(parameter_groups(module, 0.0), OptimizerConfig(), [AverageConfig(decay=0.9)])
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision, "accumulation": 2})
    built = engine.build(ranks, module, optimizer, config, micro_batch=4)
    x, most = torch.randn(4, SIDE, dtype=DTYPES[precision]), {}
    buckets = watch_buckets(built)
    for step in range(2):  # in the second one the optimizer has its state
        for _ in range(2):
            built.backward(built(x).float().square().mean())
            if step:
                most = {kind: max(size, most.get(kind, 0.0)) for kind, size in held(built, buckets).items()}
        built.step(RATE)
    return most


def held(built: Engine, buckets: Iterable[Tensor] = ()) -> dict[str, float]:
    sizes, seen = {}, set()
    for kind, found in tensors(built, buckets):
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found) if s.data_ptr()}
        sizes[kind] = round(sum(size for address, size in storages.items() if address not in seen) / PARAMETERS, 2)
        seen |= storages.keys()
    return sizes


def checks(ranks: Process) -> dict[str, dict[str, float]]:
    return {
        f"{name} {precision}": measured(ranks, stage, precision)
        for precision in ("float32", "bfloat16")
        for name, stage in ENGINES.items()
    }
