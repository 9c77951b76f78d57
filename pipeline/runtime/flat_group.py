"""A group of parameters as one flat tensor: what plain data parallelism keeps of them, and updates in few kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 8  # elements: parameters begin at 16 bytes in every precision, as vectorised kernels want them
_ROW = 1024  # elements that are summed in float32


class FlatGroup:
    """The parameters of one group of the optimizer, end to end, each at an aligned place, and zeros between and behind.

    Args:
        parameters: of which dtype ever; they become views.
        dtype: of the working weights.
        ranks: each answers for an equal part.
    """

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype, ranks: int) -> None:
        self.offsets: dict[Tensor, int] = {}
        count = 0
        for parameter in parameters:
            self.offsets[parameter] = count
            count += _up(parameter.numel(), _ALIGNMENT)
        self.part = _up(-(-count // ranks), _ALIGNMENT)
        self.master = torch.zeros(_up(self.part * ranks, _ROW), dtype=torch.float32, device=parameters[0].device)
        self.gradient = torch.zeros_like(self.master)
        for parameter in parameters:
            self.view(self.master, parameter).copy_(parameter.detach())
        self.working = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.show(self.working)
        self.gradients = [self.view(self.gradient, parameter) for parameter in parameters]
        self.master.grad = self.gradient
        self._in_buckets = ranks > 1

    def view(self, flat: Tensor, parameter: Tensor) -> Tensor:
        """A parameter's elements of a flat tensor, in its shape."""
        return flat.narrow(0, self.offsets[parameter], parameter.numel()).view(parameter.shape)

    def show(self, flat: Tensor) -> None:
        """Let the parameters be views of a flat tensor."""
        for parameter in self.offsets:
            parameter.data = self.view(flat, parameter)

    def clear(self) -> None:
        """No gradient; in float32 autograd then adds to the flat one itself, else to DDP's buckets."""
        self.gradient.zero_()
        if self.working is self.master:
            for parameter, view in zip(self.offsets, self.gradients, strict=True):
                parameter.grad = view
        elif self._in_buckets:
            for parameter in self.offsets:  # one kernel each, but in place: DDP reads them where they are
                if parameter.grad is not None:
                    parameter.grad.zero_()
        else:
            for parameter in self.offsets:
                parameter.grad = None

    def collect(self) -> None:
        """The parameters' gradients into the flat one."""
        if self.working is not self.master:
            pairs = zip(self.gradients, self.offsets, strict=True)
            found = [(view, parameter.grad) for view, parameter in pairs if parameter.grad is not None]
            torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])

    def norm(self) -> Tensor:
        """L2 norm of the flat gradient: of rows, whose float32 sums no CPU gets wrong, then of theirs in float64."""
        rows = torch.linalg.vector_norm(self.gradient.view(-1, _ROW), dim=1)
        whole: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
        return whole

    def refresh(self) -> None:
        """Working weights from the masters."""
        if self.working is not self.master:
            self.working.copy_(self.master)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
