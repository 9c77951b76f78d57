"""The training loss: squared error of what the network says."""

from __future__ import annotations

from torch import Tensor


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32.

    Args:
        output: of the network [b, C, h, w], any float dtype.
        target: same shape.

    Returns:
        [b].
    """
    return (output.float() - target.float()).square().flatten(1).mean(1)


def weighted_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The batch's mean of `squared_error`, each sample times its `weight` [b]: a scalar to call backward on."""
    return weighted_mean(squared_error(output, target), weight)


def weighted_mean(errors: Tensor, weight: Tensor) -> Tensor:
    """The same of errors [b] that are there already."""
    return (errors * weight).mean()
