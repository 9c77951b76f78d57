"""What a training step, and a checkpoint, need of any engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Outcome(IntEnum):
    """What became of a step; the same on all ranks."""

    APPLIED = 0
    OVERFLOWED = 1  # float16: finite losses, but not their gradients, at a loss scale that was then halved
    NOT_FINITE = 2  # loss or gradient was not, and no loss scale was to blame

    @property
    def skipped(self) -> bool:
        """Whether it changed nothing."""
        return self is not Outcome.APPLIED


class LossScale(NamedTuple):
    """float16: what the loss is multiplied by, and the steps since it last changed."""

    scale: int
    good_steps: int


class Piece(NamedTuple):
    """Elements `offset : offset + length` of a flattened parameter, and where this rank keeps their master weights.

    They are `flat[start : start + length]`; the optimizer's state of `flat` has the same layout.
    """

    parameter: str
    offset: int
    length: int
    flat: Tensor
    start: int


class AveragingOptimizer(Protocol):
    """`pipeline.train.optimizer.AdamWithEMA`, as far as engines know it."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    updates: int
    found_inf: Tensor | None
    grad_scale: Tensor | None

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The state's tensors of the weights' own shape, by name."""

    def create_state(self, weights: Iterable[Tensor] | None = None) -> None:
        """Make what the first step would make."""

    def take_back(self) -> None:
        """The last step was held back by `found_inf`."""

    def step(self) -> Any:
        """One update of the weights and their averages."""


class Engine(ABC):
    """A module, its optimizer, and how both are shared by the ranks.

    A step is, for each micro batch, a forward pass and `backward`; then one `step`.
    """

    module: nn.Module
    """What is trained, with its working weights."""
    optimizer: AveragingOptimizer
    accumulation: int
    """Micro batches of a step."""
    configuration: Mapping[str, Any]
    """The whole of it, as `pipeline.runtime.engine.describe` tells it: DeepSpeed's own for ZeRO."""
    given: Mapping[str, Tensor]
    """Frozen parameters before they were rounded to the engine's precision, by name, on rank 0's host."""

    @abstractmethod
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The module's forward pass."""

    @abstractmethod
    def __str__(self) -> str:
        """The engine that really runs, in a few words."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro batch's mean loss; after the last one they are the mean over all ranks.

        A loss that is not finite gives gradients that are not, so that every rank meets the fact.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Update weights and averages, on all ranks or, where the gradient norm is not finite, on none.

        A group of parameters whose `rate_ratio` is not 1 learns at so many times `learning_rate`.
        """

    @abstractmethod
    def outcomes(self, *, wait: bool = False) -> list[Outcome]:
        """What became of the steps since the last call, oldest first.

        The newest may be missing where the host does not wait for the device; it comes one step later.

        Args:
            wait: for the device, so that none is missing.
        """

    @abstractmethod
    def gradient_norm(self) -> float:
        """L2 norm of the last step's gradient over all ranks, before clipping; infinite where it was not finite."""

    @property
    @abstractmethod
    def loss_scale(self) -> LossScale | None:
        """float16: of the next step. None in other precisions. Waits for the device."""

    @loss_scale.setter
    @abstractmethod
    def loss_scale(self, scale: LossScale) -> None: ...

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """What this rank keeps of the parameters that are trained; over all ranks, each element once."""

    @abstractmethod
    def refresh(self) -> None:
        """After this rank's pieces were written to: the same weights and state on all ranks. A collective."""

    @abstractmethod
    def using(self, key: str) -> AbstractContextManager[None]:
        """A context in which the working weights are an average, for forward passes alone. A collective.

        Masters, optimizer and gradients are not touched, and the working weights are made from the masters when it is
        left, unless by RuntimeError or MemoryError, which may be one rank's alone. It takes no memory beside the
        state's own.

        Args:
            key: of the optimizer's state, such as "ema.main".
        """

    def whole(self, tensor: Tensor, *, write: bool = False) -> AbstractContextManager[Any]:
        """A context in which a parameter has all of its elements. A collective.

        Args:
            tensor: one of the module's.
            write: what rank 0 writes to it, all ranks have afterwards.
        """
        return nullcontext()


def finite_or_nan(loss: Tensor) -> Tensor:
    """The loss, whose gradients are NaN where it is not finite.

    A loss that is not finite need not give such gradients by itself: infinity may be added to it.
    """
    return loss * (1.0 + 0.0 * loss.detach())


def set_learning_rate(optimizer: AveragingOptimizer, learning_rate: float) -> None:
    """The rate of the next step, times each group's `rate_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_ratio", 1.0)
