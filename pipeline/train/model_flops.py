"""Floating point operations of a training step, for the share of a device's peak that they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.models.conditioning import FrozenTowers
from pipeline.runtime.peak import peak_flops
from pipeline.runtime.process import Process
from pipeline.train.network import build_network

_log = logging.getLogger(__name__)
_STEP_OVER_FORWARD = 3  # the backward pass is two of them: by weights and by activations


def device_peak(config: TrainConfig, ranks: Process) -> float | None:
    """Operations a second that one device can do, as given or as its name tells; None = not known."""
    if config.metrics.peak_flops is not None or ranks.device.type != "cuda":
        return config.metrics.peak_flops
    return peak_flops(torch.cuda.get_device_name(ranks.device), config.engine.precision)


def step_flops(
    config: TrainConfig, manifest: Manifest, towers: FrozenTowers | None, inputs: Sequence[Tensor | None]
) -> float:
    """Of one rank's step: three times those of the network's forward pass, counted on tensors without memory.

    What is computed anew to save memory, and what the optimizer does, are not among them.

    Args:
        config: the run file.
        manifest: of the latents.
        towers: the frozen ones, which are not counted.
        inputs: of the network; only their shapes matter.

    Returns:
        0 where that fails, as of a network that looks at its inputs' values, which are not there.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            network = build_network(config, manifest, towers)
            shapes = [None if one is None else torch.empty_like(one, device="meta") for one in inputs]
            with FlopCounterMode(display=False) as counter:
                network(*shapes)
    except Exception as error:
        _log.debug("operations of a step could not be counted: %s", error)
        return 0.0
    return float(_STEP_OVER_FORWARD * counter.get_total_flops())
