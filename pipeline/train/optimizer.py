"""AdamW that keeps moving averages of the weights as more of its states; groups of parameters.

The averages being optimizer state, ZeRO cuts them over the ranks as it cuts the moments, and they are made from the
float32 master weights whatever the precision of the working weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import AverageConfig, OptimizerConfig
from pipeline.train.ema_profiles import decay_at

_MOMENTS = ("exp_avg", "exp_avg_sq")
_AVERAGE = "ema."


class AdamWithEMA(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) with moving averages of the weights.

    Args:
        groups: parameter groups, as for `torch.optim.AdamW`.
        config: learning rate, betas, epsilon; the decay is in the groups.
        averages: which are kept, each as the state `ema.NAME`.
        fused: one pass over the state instead of a dozen; where the shards of a tensor begin may change a last bit.
    """

    found_inf: Tensor | None = None
    """1 where the next step must change nothing, which may be known to the device alone; None = it is not."""
    grad_scale: Tensor | None = None
    """What gradients are divided by first; None = nothing."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        config: OptimizerConfig,
        averages: Sequence[AverageConfig],
        *,
        fused: bool = True,
    ) -> None:
        self.averages = {average_key(average.name): average for average in averages}
        super().__init__(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=0.0, fused=fused
        )

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The state's tensors of the weights' own shape, by name."""
        return (*_MOMENTS, *self.averages)

    def create_state(self, weights: Iterable[Tensor] | None = None) -> None:
        """Make the state that `step` would make: zero moments, and the weights themselves as their averages.

        Args:
            weights: of which; None = those of the groups, which ZeRO-3 empties between its steps.
        """
        for weight in self._weights() if weights is None else weights:
            if not self.state[weight]:
                self.state[weight].update(
                    step=torch.zeros((), dtype=torch.float32, device=weight.device),
                    updates=0,  # the same on the host; by weight, since ZeRO-3 steps once for each part of a group
                    **{key: torch.zeros_like(weight, memory_format=torch.preserve_format) for key in _MOMENTS},
                    **{key: weight.detach().clone() for key in self.averages},
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of the weights that have a gradient, then of their averages.

        Where `found_inf` is 1, nothing but the count on the host changes: call `take_back` once that is known.
        """
        self.create_state()
        loss = super().step(closure)  # type: ignore[arg-type]
        moved = [weight for weight in self._weights() if weight.grad is not None]
        for weight in moved:
            self.state[weight]["updates"] += 1
        for updates in {self.state[weight]["updates"] for weight in moved}:
            together = [weight for weight in moved if self.state[weight]["updates"] == updates]
            for key, average in self.averages.items():
                share = 1.0 - decay_at(average, updates)
                averages = [self.state[weight][key] for weight in together]
                if self.found_inf is None:
                    torch._foreach_lerp_(averages, together, share)
                else:
                    torch._foreach_lerp_(averages, together, [share * (1.0 - self.found_inf)] * len(together))
        return loss

    def take_back(self) -> None:
        """The last step was one that `found_inf` held back."""
        for state in self.state.values():
            state["updates"] -= 1

    @property
    def updates(self) -> int:
        """Steps made."""
        return max((int(state["updates"]) for state in self.state.values()), default=0)

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.state.values():
            state["updates"] = count
            state["step"].fill_(count)

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]


def average_key(name: str) -> str:
    """The state of an average."""
    return f"{_AVERAGE}{name}"


def average_name(key: str) -> str | None:
    """The name of the average that a state is; None for other states."""
    return key.removeprefix(_AVERAGE) if key.startswith(_AVERAGE) else None


def parameter_groups(
    module: nn.Module, weight_decay: float, rate_ratios: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters by weight decay and learning rate; norms, biases and embeddings do not decay.

    Args:
        module: whose parameters.
        weight_decay: of the others.
        rate_ratios: learning rate / that of the run, by the beginning of parameters' names: {"text.": 0.1}.

    Returns:
        groups with `weight_decay` and `rate_ratio`, which `Engine.step` multiplies the learning rate by.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            ratio = next((r for prefix, r in (rate_ratios or {}).items() if name.startswith(prefix)), 1.0)
            keeps = parameter.ndim < 2 or id(parameter) in embeddings or name.endswith("positional_embedding")
            groups.setdefault((ratio, keeps), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if keeps else weight_decay, "rate_ratio": ratio}
        for (ratio, keeps), parameters in sorted(groups.items(), key=lambda item: (item[0][0] != 1.0, item[0]))
    ]
