"""What is summed up between two lines of the log, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Interval:
    """Sums since the last line of the log. Those of the loss stay on the device."""

    loss: Tensor  # float64 [2]: sum of the finite losses, and their count
    steps: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def start(cls, device: torch.device) -> Interval:
        """An interval without steps."""
        return cls(torch.zeros(2, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, wait_seconds: float, seconds: float) -> None:
        """One step's loss on this rank, and its times."""
        finite = torch.isfinite(loss)
        self.loss += torch.stack([torch.where(finite, loss, 0.0), finite])
        self.steps += 1
        self.wait_seconds += wait_seconds
        self.seconds += seconds
