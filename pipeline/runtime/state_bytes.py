"""Bytes that weights, gradients, optimizer and averages of a rank take, by engine: the table of docs/engines.md."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import EngineConfig

_FLOAT32 = 4


@dataclass(frozen=True)
class StateBytes:
    """Of one rank.

    Attributes:
        device: where it computes.
        host: offloaded.
        saved: the copy in the host's memory from which a checkpoint is stored.
    """

    device: int
    host: int
    saved: int


def state_bytes(config: EngineConfig, parameters: int, *, averages: int, ranks: int) -> StateBytes:
    """Between backward pass and step; without activations, DeepSpeed's buckets and the layers in use of ZeRO-3.

    Args:
        config: the engine.
        parameters: that are trained.
        averages: of the weights.
        ranks: of the whole run.
    """
    stage, low = config.zero_stage, config.precision != "float32"
    width = 2 if low else _FLOAT32
    weights: float = width
    gradients: float = width
    kept = _FLOAT32 * (2 + averages)  # moments and averages
    if stage == 0:
        gradients = _FLOAT32 + (width if ranks > 1 else 0)  # those of the step, and DDP's buckets
        kept += _FLOAT32 * low  # else the weights are the masters
        owned: float = kept
    else:
        gradients /= ranks if stage >= 2 else 1
        weights /= ranks if stage == 3 else 1
        owned = (kept + _FLOAT32) / ranks
    on_host = (owned if config.offload_optimizer else 0) + (weights if config.offload_parameters else 0)
    return StateBytes(
        device=round(parameters * (weights + gradients + owned - on_host)),
        host=round(parameters * on_host),
        saved=round(parameters * _FLOAT32 * (3 + averages) / ranks),
    )
