"""The training loss: squared error of the predicted velocity."""

from __future__ import annotations

from torch import Tensor


def velocity_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample's velocity, in float32.

    Liu et al. 2022 (https://arxiv.org/abs/2209.03003), eq. 1.

    Args:
        prediction: the network's output [b, C, h, w], any float dtype.
        target: `schedule.velocity_target`, same shape.

    Returns:
        [b].
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def velocity_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The batch's mean of `velocity_mse`, each sample times its `weight` [b]: a scalar to call backward on."""
    return (velocity_mse(prediction, target) * weight).mean()
