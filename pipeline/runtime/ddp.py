"""Plain data parallelism as an engine: every rank holds all of weights and optimizer. No DeepSpeed.

Parameters of a group lie end to end in one flat float32 tensor, the master weights, and so do their gradients and the
optimizer's state: few large tensors, that few kernels go through. In float32 the parameters are views of it; in lower
precision they are views of a flat copy. A gradient that is not finite is found on the device, and held back there by
`found_inf` of torch's fused AdamW. The host learns of it one step later: before it hands the device an update, it waits
for the gradient norm of the step before. By then the device has a whole forward and backward pass in hand, which it
computes meanwhile and while the host prepares the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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
from pipeline.runtime.ddp_module import FirstStep, settle_buckets, wrap
from pipeline.runtime.flat_group import FlatGroup
from pipeline.runtime.process import Process

_CLIP_EPSILON = 1e-6  # DeepSpeed's and torch's


class DataParallelEngine(Engine):
    """torch's DistributedDataParallel; for a world of one the module itself.

    Args:
        process: this rank.
        module: the whole of what is trained, on its device and equal on all ranks.
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
        self.module, self.optimizer, self.accumulation = module, optimizer, config.accumulation
        dtype = DTYPES[config.precision]
        self._groups = [FlatGroup(g["params"], dtype, process.world_size) for g in optimizer.param_groups]
        for group, own in zip(self._groups, optimizer.param_groups, strict=True):
            own["params"] = [group.master]
            group.clear()
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self._wrapped: nn.Module = module
        if process.world_size > 1:
            self._wrapped = wrapped = wrap(module, in_buckets=dtype != torch.float32)
            if process.device.type == "cpu":
                settle_buckets(wrapped)
                for group in self._groups:
                    group.clear()
        self._first_step: FirstStep | None = FirstStep(module)
        device = process.device
        self._scale = torch.ones((), device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._broken_loss = torch.zeros((), device=device)  # float16: 1 where a loss of this step was not finite
        if config.precision == "float16":
            self._scale.fill_(2.0**config.loss_scale.initial_power)
        self._norm = torch.zeros((), device=device)
        self._micro_batches = 0  # of this step, done
        self._flag: _Flag | None = None
        self._outcomes: list[Outcome] = []

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
        if self._config.precision == "float16":
            self._broken_loss = torch.maximum(self._broken_loss, (~loss.detach().isfinite()).float())
        torch.autograd.backward(finite_or_nan(loss) * (self._scale / self.accumulation))
        self._micro_batches += 1

    def step(self, learning_rate: float) -> None:
        """See Engine.step."""
        if self._first_step is not None:
            self._first_step.check()
            self._first_step = None
        self._learn_of_flag()
        for group in self._groups:
            group.collect()
        self._norm = torch.stack([group.norm() for group in self._groups]).norm().float() / self._scale
        broken = (~self._norm.isfinite()).float()
        self._update(learning_rate, broken)
        if self._config.precision == "float16" and self._process.world_size > 1:
            dist.all_reduce(self._broken_loss, dist.ReduceOp.MAX)
        self._flag = _Flag(broken * (1 + torch.maximum((self._scale <= 1).float(), self._broken_loss)))
        if self._config.precision == "float16":
            self._update_scale(broken)
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

    def _update_scale(self, broken: Tensor) -> None:
        """Halved where gradients overflowed; as it was where the loss, which it has no part in, was not finite."""
        before = self._scale.clone(), self._good_steps.clone()
        interval = self._config.loss_scale.growth_interval
        torch._amp_update_scale_(self._scale, self._good_steps, broken, 2.0, 0.5, interval)
        self._scale.clamp_(min=1.0)
        for now, kept in zip((self._scale, self._good_steps), before, strict=True):
            now.copy_(torch.where(self._broken_loss > 0, kept, now))
        self._broken_loss.zero_()

    def outcomes(self, *, wait: bool = False) -> list[Outcome]:
        """See Engine.outcomes."""
        if wait:
            self._learn_of_flag()
        told, self._outcomes = self._outcomes, []
        return told

    def _learn_of_flag(self) -> None:
        """What became of the step before; waits for its gradient norm."""
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
                    dist.all_gather_into_tensor(flat[: self._process.world_size * group.part], mine)
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
