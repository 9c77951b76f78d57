"""Parameters end to end in one flat tensor, which few kernels go through: masters, working weights, gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class FlatGroup:
    """The parameters of one group of the optimizer, end to end, padded to a multiple of the ranks.

    Args:
        parameters: of which dtype ever; they become views.
        dtype: of the working weights.
        ranks: each answers for an equal part.
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype, ranks: int) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        self.part = -(-count // ranks)
        self.master = torch.zeros(self.part * ranks, dtype=torch.float32, device=parameters[0].device)
        self.gradient = torch.zeros_like(self.master)
        self.offsets: dict[Tensor, int] = {}
        offset = 0
        for parameter in parameters:
            self.offsets[parameter] = offset
            offset += parameter.numel()
            self.view(self.master, parameter).copy_(parameter.detach())
        self.working = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.show(self.working)
        self.gradients = [self.view(self.gradient, parameter) for parameter in parameters]
        self.master.grad = self.gradient

    def view(self, flat: Tensor, parameter: Tensor) -> Tensor:
        """A parameter's elements of a flat tensor, in its shape."""
        return flat.narrow(0, self.offsets[parameter], parameter.numel()).view(parameter.shape)

    def show(self, flat: Tensor) -> None:
        """Let the parameters be views of a flat tensor."""
        for parameter in self.offsets:
            parameter.data = self.view(flat, parameter)

    def clear(self) -> None:
        """No gradient; in float32 autograd then adds to the flat one itself."""
        self.gradient.zero_()
        for parameter, view in zip(self.offsets, self.gradients, strict=True):
            parameter.grad = view if self.working is self.master else None

    def collect(self) -> None:
        """The parameters' gradients into the flat one."""
        if self.working is not self.master:
            found = [parameter.grad for parameter in self.offsets]
            torch._foreach_copy_(self.gradients, found)  # type: ignore[arg-type]

    def refresh(self) -> None:
        """Working weights from the masters."""
        if self.working is not self.master:
            self.working.copy_(self.master)
