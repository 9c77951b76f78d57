"""A module in torch's DistributedDataParallel, and which of its parameters take no part in what it computes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import SetupError


def wrap(module: nn.Module, *, in_buckets: bool) -> DistributedDataParallel:
    """DDP over the module, which reduces its trained parameters alone.

    Args:
        module: what is trained, on its device.
        in_buckets: whether gradients are views of DDP's buckets, and not copied into them and back.
    """
    # what keeps buffers from being sent around in each forward pass: torch has given it another name
    named = inspect.signature(DistributedDataParallel).parameters
    no_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False
    }
    return DistributedDataParallel(_Module(module), gradient_as_bucket_view=in_buckets, **no_buffers)


def settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have DDP sort its buckets now and not after the first step of each start.

    With more than two ranks a sum's last bit depends on where in a bucket it is. On GPUs, where such bits are not
    promised, DDP sorts them by the real backward pass, which hides more of the communication.
    """
    torch.autograd.backward(wrapped())


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


class FirstStep:
    """Watches which parameters get a gradient in the first step. DDP waits for all of them, in every step."""

    def __init__(self, module: nn.Module) -> None:
        self._without = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self._hooks = [p.register_post_accumulate_grad_hook(self._got_one) for p in self._without]  # type: ignore[no-untyped-call]

    def _got_one(self, parameter: Tensor) -> None:
        self._without.pop(parameter, None)  # type: ignore[call-overload]

    def check(self) -> None:
        """After the first backward pass.

        Raises:
            SetupError: some parameter has got none.
        """
        for hook in self._hooks:
            hook.remove()
        if self._without:
            first, *others = self._without.values()
            more = f" and {len(others)} more parameters take" if others else " takes"
            raise SetupError(
                f"engine.zero_stage=0: {first}{more} no part in the loss, and DDP waits for every gradient",
                "freeze such parameters (requires_grad=False), or set engine.zero_stage to 1, 2 or 3",
            )
