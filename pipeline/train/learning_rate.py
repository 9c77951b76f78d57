"""The learning rate as a pure function of the step: linear warm-up, then one of several shapes.

A resumed run, another world size, a longer run: whoever knows the step knows the rate, and no scheduler has a state.
"""

from __future__ import annotations

import math

from pipeline.config import OptimizerConfig

_EDM2_REFERENCE = 70_000  # steps, t_ref of EDM2's ImageNet-512 models
_INVERSE_SQRT_REFERENCE = 10_000  # steps without warm-up; with it, the warm-up is the scale, as in Vaswani et al. 2017


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of one step.

    Args:
        step: counted from 0.
        config: peak rate, warm-up, shape.
        total_steps: of the run, at which `cosine` and `linear` end.
    """
    warming = step < config.warmup_steps
    peak = config.learning_rate * (step + 1) / config.warmup_steps if warming else config.learning_rate
    if config.schedule == "edm2":  # falls by t alone, and its ramp is a factor of its own
        return peak * _edm2(step, config.reference_steps or _EDM2_REFERENCE)
    return peak if warming else peak * _share(step - config.warmup_steps, config, total_steps)


def _share(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Share of the peak, `step` steps after the warm-up."""
    done = min(1.0, step / max(1, total_steps - config.warmup_steps))
    floor = config.final_learning_rate_ratio
    if config.schedule == "cosine":
        # Loshchilov & Hutter 2017 (https://arxiv.org/abs/1608.03983), eq. 5, with one period that ends at the last step
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if config.schedule == "inverse_sqrt":
        # Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), eq. 3, moved so that it begins at the peak
        return 1.0 / math.sqrt(1.0 + step / (config.reference_steps or config.warmup_steps or _INVERSE_SQRT_REFERENCE))
    return 1.0


def _edm2(step: int, reference_steps: int) -> float:
    """Karras et al. 2024 (https://arxiv.org/abs/2312.02696), eq. 67: 1 / sqrt(max(t / t_ref, 1))."""
    return 1.0 / math.sqrt(max(step / reference_steps, 1.0))
