"""Plain data parallelism as an engine: every rank holds all of weights and optimizer. No DeepSpeed.

Parameters of a group lie end to end in one flat float32 tensor, the master weights, and so do their gradients and the
optimizer's state: few large tensors, that few kernels go through. In float32 the parameters are views of it; in lower
precision they are views of a flat copy. Nothing waits for the device: a gradient that is not finite is found there, and
held back there by `found_inf` of torch's fused AdamW; the host reads the flag one step later.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import EngineConfig
from pipeline.runtime.base import (
    DTYPES,
    AveragingOptimizer,
    Engine,
    LossScale,
    Outcome,
    Piece,
    finite_or_nan,
    set_learning_rate,
)
from pipeline.runtime.flat_group import FlatGroup
from pipeline.runtime.process import Process

_CLIP_EPSILON = 1e-6  # DeepSpeed's and torch's


class DataParallelEngine(Engine):
    """torch's DistributedDataParallel; for a world of one the module itself.

    Args:
        process: this rank.
        module: the whole of what is trained; weights become equal to rank 0's.
        optimizer: over the module's trainable parameters, fused.
        config: precision, accumulation, loss scale.
        gradient_clip: largest gradient norm; 0 = no clipping.
    """

    def __init__(
        self,
        process: Process,
        module: nn.Module,
        optimizer: AveragingOptimizer,
        config: EngineConfig,
        *,
        gradient_clip: float,
    ) -> None:
        self._process, self._config, self._clip = process, config, gradient_clip
        self.module, self.optimizer, self.accumulation = module.to(process.device), optimizer, config.accumulation
        dtype = DTYPES[config.precision]
        self._groups = [FlatGroup(g["params"], dtype, process.world_size) for g in optimizer.param_groups]
        for group, own in zip(self._groups, optimizer.param_groups, strict=True):
            own["params"] = [group.master]
            if process.world_size > 1:
                dist.broadcast(group.master, 0)
            group.refresh()
            group.clear()
        module.to(dtype)  # what is frozen
        self._wrapped: nn.Module = module
        if process.world_size > 1:
            in_buckets = dtype != torch.float32
            whole = _Module(module)
            self._wrapped = DistributedDataParallel(whole, gradient_as_bucket_view=in_buckets, **_no_buffers())
            if process.device.type == "cpu":
                self._settle_buckets()
        device = process.device
        self._scale = torch.ones((), device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        if config.precision == "float16":
            self._scale.fill_(2.0**config.loss_scale.initial_power)
        self._norm = torch.zeros((), device=device)
        self._micro_batches = 0  # of this step, done
        self._flag: _Flag | None = None
        self._outcomes: list[Outcome] = []

    def _settle_buckets(self) -> None:
        """Have DDP sort its buckets now and not after the first step of each start.

        With more than two ranks a sum's last bit depends on where in a bucket it is. On GPUs, where such bits are not
        promised, DDP sorts them by the real backward pass, which hides more of the communication.
        """
        torch.autograd.backward(self._wrapped())
        for group in self._groups:
            group.clear()

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """See Engine.__call__."""
        last = self._micro_batches == self.accumulation - 1
        wrapped = self._wrapped
        alone = nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()
        with alone:
            output: Tensor = wrapped(*inputs)
        return output

    def __str__(self) -> str:
        name = "DistributedDataParallel" if self._wrapped is not self.module else "one rank, no DDP"
        return f"{name}, {self._config.precision}"

    def backward(self, loss: Tensor) -> None:
        """See Engine.backward."""
        torch.autograd.backward(finite_or_nan(loss) * (self._scale / self.accumulation))
        self._micro_batches += 1

    def step(self, learning_rate: float) -> None:
        """See Engine.step."""
        self._learn_of_flag()
        for group in self._groups:
            group.collect()
        # by parameter: over tens of millions of elements a CPU's float32 sum is off by percents
        norms = [norm for group in self._groups for norm in torch._foreach_norm(group.gradients)]
        self._norm = torch.stack(norms).norm() / self._scale
        broken = (~self._norm.isfinite()).float()
        self._update(learning_rate, broken)
        self._flag = _Flag(broken * (1 + (self._scale <= 1)))
        if self._config.precision == "float16":
            interval = self._config.loss_scale.growth_interval
            torch._amp_update_scale_(self._scale, self._good_steps, broken, 2.0, 0.5, interval)
            self._scale.clamp_(min=1.0)
        for group in self._groups:
            group.refresh()
            group.clear()
        self._micro_batches = 0

    def _update(self, learning_rate: float, broken: Tensor) -> None:
        """AdamW, which divides gradients by `grad_scale` as it goes, and does nothing where `found_inf` is 1."""
        divisor = self._scale
        if self._clip:
            divisor = divisor * ((self._norm + _CLIP_EPSILON) / self._clip).clamp(min=1.0)
        self.optimizer.found_inf, self.optimizer.grad_scale = broken, divisor
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()

    def outcomes(self, *, wait: bool = False) -> list[Outcome]:
        """See Engine.outcomes."""
        if wait:
            self._learn_of_flag()
        told, self._outcomes = self._outcomes, []
        return told

    def _learn_of_flag(self) -> None:
        """What became of the step before, which the device has done long ago if it is not far behind."""
        if self._flag is not None:
            outcome, self._flag = self._flag.read(), None
            self._outcomes.append(outcome)
            if outcome.skipped:
                self.optimizer.take_back()

    def gradient_norm(self) -> float:
        """See Engine.gradient_norm."""
        norm = float(self._norm)
        return norm if math.isfinite(norm) else math.inf

    @property
    def loss_scale(self) -> LossScale | None:
        """See Engine.loss_scale."""
        if self._config.precision != "float16":
            return None
        return LossScale(int(self._scale), int(self._good_steps))

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        if self._config.precision == "float16":
            self._scale.fill_(scale.scale)
            self._good_steps.fill_(min(scale.good_steps, self._config.loss_scale.growth_interval - 1))

    def pieces(self) -> Iterator[Piece]:
        """See Engine.pieces."""
        offsets = {parameter: (group, at) for group in self._groups for parameter, at in group.offsets.items()}
        for name, parameter in self.module.named_parameters():
            if parameter in offsets:
                group, at = offsets[parameter]
                first, end = self._process.rank * group.part, (self._process.rank + 1) * group.part
                start, stop = max(at, first), min(at + parameter.numel(), end)
                if start < stop:
                    yield Piece(name, start - at, stop - start, group.master, start)

    def refresh(self) -> None:
        """See Engine.refresh."""
        for group in self._groups:
            state = self.optimizer.state[group.master]
            for flat in (group.master, *(state[key] for key in self.optimizer.state_keys)):
                if self._process.world_size > 1:
                    mine = flat.narrow(0, self._process.rank * group.part, group.part).clone()
                    dist.all_gather(list(flat.split(group.part)), mine)
            group.refresh()

    @contextmanager
    def using(self, key: str) -> Iterator[None]:
        """See Engine.using. In float32 the parameters are views of the average meanwhile: nothing is copied."""
        self.optimizer.create_state()
        try:
            for group in self._groups:
                average = self.optimizer.state[group.master][key]
                if group.working is group.master:
                    group.show(average)
                else:
                    group.working.copy_(average)
            yield
        finally:
            for group in self._groups:
                group.show(group.working)
                group.refresh()


def _no_buffers() -> dict[str, Any]:
    """What keeps DDP from sending buffers around in each forward pass: torch has given it another name."""
    named = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}


class _Module(nn.Module):
    """The module; without inputs the sum of what is trained, which has all its gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if inputs:
            output: Tensor = self.module(*inputs)
            return output
        total = torch.zeros(())
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                total = total + parameter.sum()
        return total


class _Flag:
    """A number on its way from the device to the host."""

    def __init__(self, on_device: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if on_device.is_cuda:
            self._host = torch.empty((), dtype=on_device.dtype, pin_memory=True)
            self._host.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._host = on_device

    def read(self) -> Outcome:
        if self._arrived is not None:
            self._arrived.synchronize()
        return Outcome(int(self._host.numpy()))
