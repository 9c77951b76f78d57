"""DeepSpeed's ZeRO 1, 2 and 3 as an engine.

ZeRO 1 and 2 lay the parameters of a group end to end in one flat float32 tensor, pad it, and give each rank one run of
it; ZeRO-3 cuts every parameter into equal parts, pads the last one, and lays a rank's parts end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig
from pipeline.errors import SetupError
from pipeline.runtime.base import (
    AveragingOptimizer,
    Engine,
    LossScale,
    Outcome,
    Piece,
    finite_or_nan,
    set_learning_rate,
)
from pipeline.runtime.process import Process

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # as accelerate calls them


class _LossScaling:
    """float16: when DeepSpeed's loss scale is halved and doubled.

    By itself it doubles the scale before it divides the gradients by it, which halves them in that step; and it raises
    an error where the scale cannot be halved any more. Here both wait until the step is done.

    Args:
        scaler: DeepSpeed's.
        interval: good steps after which the scale is doubled.
    """

    def __init__(self, scaler: Any, interval: int) -> None:
        self._scaler, self._interval, self._good_steps = scaler, interval, 0
        self._broken_loss: Tensor | None = None  # of the step under way: 1 where a loss was not finite
        scaler.update_scale = lambda overflow: None

    @property
    def state(self) -> LossScale:
        return LossScale(int(self._scaler.cur_scale), self._good_steps)

    @state.setter
    def state(self, state: LossScale) -> None:
        self._scaler.cur_scale, self._good_steps = float(state.scale), min(state.good_steps, self._interval - 1)

    def note(self, loss: Tensor) -> None:
        """A micro batch's loss."""
        broken = (~loss.detach().isfinite()).float()
        self._broken_loss = broken if self._broken_loss is None else torch.maximum(self._broken_loss, broken)

    def is_at_fault(self) -> bool:
        """After a step that overflowed: whether all losses were finite, on all ranks, and the scale can be halved."""
        assert self._broken_loss is not None, "no loss was noted"  # noqa: S101
        torch.distributed.all_reduce(self._broken_loss, torch.distributed.ReduceOp.MAX)
        return self.state.scale > 1 and not bool(self._broken_loss)

    def update(self, outcome: Outcome) -> None:
        """After a step: halved, kept or doubled."""
        scale, good_steps = self.state
        self._broken_loss = None
        if outcome is Outcome.NOT_FINITE:
            return
        if outcome is Outcome.OVERFLOWED:
            self.state = LossScale(max(scale // 2, 1), 0)
        elif good_steps + 1 == self._interval:
            self.state = LossScale(scale * 2, 0)
        else:
            self.state = LossScale(scale, good_steps + 1)


class ZeroEngine(Engine):
    """DeepSpeed's engine, as little of it as a training step needs."""

    def __init__(self, deepspeed_engine: Any, optimizer: AveragingOptimizer, config: EngineConfig) -> None:
        self._engine, self._config = deepspeed_engine, config
        self._zero = deepspeed_engine.optimizer
        self._outcomes: list[Outcome] = []
        self.module: nn.Module = deepspeed_engine.module
        self.optimizer, self.accumulation = optimizer, config.accumulation
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._scaling: _LossScaling | None = None
        if config.precision == "float16":
            self._scaling = _LossScaling(self._zero.loss_scaler, config.loss_scale.growth_interval)

    @property
    def stage(self) -> int:
        """The ZeRO stage that really runs."""
        return int(self._engine.zero_optimization_stage())

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """See Engine.__call__."""
        output: Tensor = self._engine(*inputs)
        return output

    def __str__(self) -> str:
        dtype = str(self._engine.get_data_types()[0]).removeprefix("torch.")
        facts = [type(self._engine).__name__, f"ZeRO stage {self.stage}", dtype]
        facts += ["weights on the host"] * self._config.offload_parameters
        facts += ["optimizer on the host (torch's fused AdamW)"] * self._config.offload_optimizer
        return ", ".join(facts)

    def backward(self, loss: Tensor) -> None:
        """See Engine.backward."""
        if self._scaling is not None:
            self._scaling.note(loss)
        self._engine.backward(finite_or_nan(loss))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro batch, and does no more

    def step(self, learning_rate: float) -> None:
        """See Engine.step."""
        set_learning_rate(self.optimizer, learning_rate)
        self._engine.step()
        outcome = Outcome.APPLIED
        if bool(self._zero.overflow):
            scaling = self._scaling
            outcome = Outcome.OVERFLOWED if scaling is not None and scaling.is_at_fault() else Outcome.NOT_FINITE
        if self._scaling is not None:
            self._scaling.update(outcome)
        self._outcomes.append(outcome)

    def outcomes(self, *, wait: bool = False) -> list[Outcome]:
        """See Engine.outcomes."""
        told, self._outcomes = self._outcomes, []
        return told

    def gradient_norm(self) -> float:
        """See Engine.gradient_norm."""
        return float(self._engine.get_global_grad_norm())

    @property
    def loss_scale(self) -> LossScale | None:
        """See Engine.loss_scale."""
        return self._scaling.state if self._scaling is not None else None

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        if self._scaling is not None:
            self._scaling.state = scale

    def pieces(self) -> Iterator[Piece]:
        """See Engine.pieces."""
        return self._pieces_of_parameters() if self.stage == 3 else self._pieces_of_groups()

    def _pieces_of_groups(self) -> Iterator[Piece]:
        for name, parameter in self.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # neither frozen nor wholly on other ranks
                flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Piece(name, there.start, there.numel, flat, here.start)

    def _pieces_of_parameters(self) -> Iterator[Piece]:
        rank = torch.distributed.get_rank()
        for parameters, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in parameters:
                part = parameter.partition_numel()
                offset = rank * part
                length = min(part, parameter.ds_numel - offset)
                if length > 0:  # the last ranks may have nothing but padding
                    yield Piece(self._names[parameter], offset, length, flat, start)
                start += part

    def refresh(self) -> None:
        """See Engine.refresh."""
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        # what stage3.py does after each step: parts anew from the masters, then small parameters whole again
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextmanager
    def using(self, key: str) -> Iterator[None]:
        """See Engine.using. DeepSpeed makes working weights of what its lists of masters hold: averages, meanwhile."""
        name = "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_partitioned_groups_flat"
        masters = getattr(self._zero, name)
        self.optimizer.create_state(masters)
        averages = [self.optimizer.state[master][key] for master in masters]
        alone = False
        try:
            setattr(self._zero, name, averages)
            self.refresh()
            setattr(self._zero, name, masters)
            yield
        except (RuntimeError, MemoryError):  # as of memory: the others would never come to a collective
            alone = True
            raise
        finally:
            setattr(self._zero, name, masters)
            if not alone:
                self.refresh()

    def whole(self, tensor: Tensor, *, write: bool = False) -> AbstractContextManager[Any]:
        """See Engine.whole."""
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[Any] = GatheredParameters([tensor], modifier_rank=0 if write else None)
        return gathered


def build(
    process: Process,
    module: nn.Module,
    optimizer: AveragingOptimizer,
    config: EngineConfig,
    whole: Mapping[str, Any],
) -> ZeroEngine:
    """See `pipeline.runtime.engine.build`; `whole` is DeepSpeed's configuration."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    unrounded = {}
    if config.precision != "float32":  # on the host, until the masters have them
        trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        unrounded = {name: p.to("cpu", torch.float32, copy=True).flatten() for name, p in trained.items()}
    try:
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(whole)), mixed_precision=_PRECISION[config.precision]
        )
        wrapped, _ = accelerator.prepare(module, optimizer)
    except ValueError as error:
        if config.precision == "float32" or "not supported" not in str(error):
            raise
        raise SetupError(
            f"engine.precision: DeepSpeed does not run {config.precision} on this {process.device.type}",
            "set engine.precision to bfloat16 or float32, or engine.zero_stage to 0",
        ) from error
    engine = ZeroEngine(wrapped, optimizer, config)
    _check(wrapped, engine, config, process)
    if unrounded:
        for parameter, offset, length, flat, start in engine.pieces():
            flat.detach().narrow(0, start, length).copy_(unrounded[parameter].narrow(0, offset, length))
    return engine


def _check(wrapped: Any, engine: ZeroEngine, config: EngineConfig, process: Process) -> None:
    import deepspeed

    found = type(wrapped).__name__
    if not isinstance(wrapped, deepspeed.DeepSpeedEngine):
        raise SetupError(f"the engine is {found}, not DeepSpeedEngine", "start it with launchers/accelerate.sh")
    if engine.stage != config.zero_stage:
        raise SetupError(
            f"engine.zero_stage={config.zero_stage}, but ZeRO stage {engine.stage} runs",
            "unset ACCELERATE_DEEPSPEED_* in the environment",
        )
    if wrapped.dp_world_size != process.world_size:
        raise SetupError(
            f"the engine has {wrapped.dp_world_size} ranks, the process group {process.world_size}",
            "start it with launchers/accelerate.sh",
        )
