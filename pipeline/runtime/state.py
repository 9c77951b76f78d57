"""An engine's state by parameter name: what of each parameter this rank keeps, and the tensors themselves.

Every engine lays parameters end to end in flat float32 tensors and gives each rank a part: ZeRO 1 and 2 cut the whole
flat tensor, ZeRO-3 each parameter by itself, and of DDP's, which every rank holds, each rank answers for an equal part.
Addressed by (parameter, offset, length), state moves between engines and world sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runtime.base import Engine, Piece

WEIGHT = "weight"
"""Key of the float32 master weights among a fragment's tensors; the others are the optimizer's."""


@dataclass(frozen=True)
class Fragment:
    """The elements `offset : offset + length` of one flattened parameter, all of its tensors as views [length]."""

    parameter: str
    offset: int
    length: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Span:
    """Fragments that lie end to end in one flat tensor: (parameter, offset, length)."""

    fragments: tuple[tuple[str, int, int], ...]
    flat: Tensor
    start: int

    @property
    def length(self) -> int:
        """Elements of all of them."""
        return sum(length for _, _, length in self.fragments)

    def tensors(self, engine: Engine) -> dict[str, Tensor]:
        """Views of all of them at once, by key [length]. Cheap, whatever the number of parameters."""
        length = self.length
        return {key: whole.narrow(0, self.start, length) for key, whole in _tensors(engine, self.flat).items()}


def keys(engine: Engine) -> tuple[str, ...]:
    """Names of a fragment's tensors: the master weight, and the optimizer's, such as "exp_avg"."""
    return (WEIGHT, *engine.optimizer.state_keys)


def fragments(engine: Engine) -> list[Fragment]:
    """This rank's fragments, one of a parameter at most; over all ranks they hold each element once.

    Writing to their tensors changes the engine's state; `restore` tells the other ranks.
    """
    found = []
    for parameter, offset, length, flat, start in engine.pieces():
        views = {key: tensor.narrow(0, start, length) for key, tensor in _tensors(engine, flat).items()}
        found.append(Fragment(parameter, offset, length, views))
    return found


def spans(engine: Engine) -> list[Span]:
    """All of this rank's fragments, as few copies as they take: those that lie end to end are one span."""
    found: list[list[Piece]] = []
    for piece in engine.pieces():
        last = found[-1][-1] if found else None
        if last is not None and last.flat is piece.flat and last.start + last.length == piece.start:
            found[-1].append(piece)
        else:
            found.append([piece])
    return [
        Span(tuple((p.parameter, p.offset, p.length) for p in pieces), pieces[0].flat, pieces[0].start)
        for pieces in found
    ]


def _tensors(engine: Engine, flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor of master weights, and the optimizer's state of it, by key."""
    engine.optimizer.create_state([flat])
    state = engine.optimizer.state[flat]
    return {WEIGHT: flat.detach(), **{key: state[key] for key in engine.optimizer.state_keys}}


def optimizer_step(engine: Engine) -> int:
    """Updates that the optimizer has made; skipped steps do not count once `Engine.outcomes` told of them."""
    return engine.optimizer.updates


def restore(engine: Engine, step: int) -> None:
    """After fragments were written to: set the optimizer's counter, and refresh all ranks. A collective."""
    engine.optimizer.create_state()  # of all: a rank may have no piece of a small group
    engine.optimizer.create_state([piece.flat for piece in engine.pieces()])
    engine.optimizer.updates = step
    engine.refresh()


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Whole shapes of the parameters that are trained, by name."""
    return {name: list(_shape(p)) for name, p in engine.module.named_parameters() if p.requires_grad}


def geometry(engine: Engine) -> dict[str, list[int]]:
    """Whole shapes of all parameters and persistent buffers, trained or not, by name."""
    return {name: list(_shape(tensor)) for name, tensor in engine.module.state_dict(keep_vars=True).items()}


def frozen(engine: Engine, *, keep: bool = True) -> dict[str, Tensor]:
    """Whole copies of what the optimizer does not know: frozen parameters and persistent buffers. A collective.

    Frozen parameters are as they were given, and not as `engine.precision` rounds them.

    Args:
        engine: whose.
        keep: False on ranks that only take part, since in ZeRO-3 all must; they get nothing.
    """
    found = {}
    for name, tensor in _frozen(engine).items():
        with engine.whole(tensor):
            if keep:
                found[name] = engine.given.get(name, tensor).detach().to("cpu", copy=True)
    return found


def buffers(engine: Engine) -> Callable[[], dict[str, Tensor]]:
    """What gives copies of the persistent buffers, which alone of what `frozen` tells may change. No collective."""
    there = _frozen(engine)
    owners = [
        (f"{prefix}.{name}".lstrip("."), module, name)
        for prefix, module in engine.module.named_modules(remove_duplicate=False)
        for name in module._buffers
    ]
    kept = [(whole, module, name) for whole, module, name in owners if whole in there]
    return lambda: {whole: module._buffers[name].detach().to("cpu", copy=True) for whole, module, name in kept}


def set_frozen(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Give frozen parameters and buffers the values that `frozen` told of. A collective."""
    for name, tensor in _frozen(engine).items():
        with torch.no_grad(), engine.whole(tensor, write=True):
            tensor.copy_(tensors[name])
            if name in engine.given:
                engine.given[name].copy_(tensors[name])


def _frozen(engine: Engine) -> dict[str, Tensor]:
    trained = shapes(engine)
    state: dict[str, Tensor] = engine.module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in trained}


def _shape(parameter: Tensor) -> torch.Size:
    whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # in ZeRO-3 the tensor itself may be empty
    return whole
