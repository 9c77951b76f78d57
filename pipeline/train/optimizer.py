"""AdamW that keeps the weights' moving average as one more of its states; the learning rate as a function of the step.

The average being optimizer state, ZeRO cuts it over the ranks as it cuts the moments, and it is made from the float32
master weights whatever the precision of the working weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import OptimizerConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
"""The optimizer's tensors of the weights' own shape."""


class AdamWithEMA(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) with an exponential moving average of the weights.

    Args:
        groups: parameter groups, as for `torch.optim.AdamW`.
        config: learning rate, betas, epsilon; the decay is in the groups.
        ema_decay: decay per step of the average, once warmed up (`ema_decay_at`).
        fused: one pass over the state instead of a dozen; where the shards of a tensor begin may change a last bit.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, ema_decay: float, *, fused: bool = True
    ) -> None:
        self.ema_decay = ema_decay
        super().__init__(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=0.0, fused=fused
        )
        for group in self.param_groups:
            group["updates"] = 0  # on the host: the state's own counter is on the device

    def create_state(self) -> None:
        """Make the state that `step` would make: zero moments, and the weights themselves as their average."""
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight].update(
                        step=torch.zeros((), dtype=torch.float32, device=weight.device),
                        exp_avg=torch.zeros_like(weight, memory_format=torch.preserve_format),
                        exp_avg_sq=torch.zeros_like(weight, memory_format=torch.preserve_format),
                        ema=weight.detach().clone(),
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of the weights that have a gradient, then of their average."""
        self.create_state()
        loss = super().step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["updates"] += 1
            share = 1.0 - ema_decay_at(group["updates"], self.ema_decay)
            for weight in group["params"]:
                if weight.grad is not None:
                    self.state[weight]["ema"].lerp_(weight, share)
        return loss

    @property
    def updates(self) -> int:
        """Steps made."""
        return int(self.param_groups[0]["updates"])

    @updates.setter
    def updates(self, count: int) -> None:
        self.create_state()
        for group in self.param_groups:
            group["updates"] = count
            for weight in group["params"]:
                self.state[weight]["step"].fill_(count)


def ema_decay_at(step: int, decay: float) -> float:
    """The average's decay at optimizer step `step` (from 1): min(decay, (1 + step) / (10 + step)).

    The warm-up of TensorFlow's ExponentialMovingAverage, by which short runs forget their start: until `decay` is
    reached, about the power function average of Karras et al. 2024 (https://arxiv.org/abs/2312.02696, section 3.1)
    with gamma = 8.
    """
    return min(decay, (1.0 + step) / (10.0 + step))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: those that decay, and norms, biases and embeddings, which do not."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            keeps = parameter.ndim < 2 or id(parameter) in embeddings or name.endswith("positional_embedding")
            (plain if keeps else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then half a cosine down to the final ratio.

    Loshchilov & Hutter 2017 (https://arxiv.org/abs/1608.03983), eq. 5, with one period that ends at `total_steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))
