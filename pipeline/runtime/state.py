"""The engine's sharded state, by parameter name: what of each parameter this rank owns, and the tensors themselves.

ZeRO 1 and 2 lay the parameters of a group end to end in one flat float32 tensor, pad it, and give each rank one run
of it. A parameter on the border of two runs is in two fragments. Addressed by (parameter, offset, length), state moves
between world sizes and stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pipeline.runtime.engine import Engine

WEIGHT = "weight"
"""Key of the float32 master weights among a fragment's tensors; the others are the optimizer's."""


@dataclass(frozen=True)
class Fragment:
    """The elements `offset : offset + length` of one flattened parameter, all of its tensors as views [length]."""

    parameter: str
    offset: int
    length: int
    tensors: dict[str, Tensor]


def keys(engine: Engine) -> tuple[str, ...]:
    """Names of a fragment's tensors: the master weight, and the optimizer's, such as "exp_avg"."""
    return (WEIGHT, *engine.zero_optimizer.optimizer.state_keys)


def fragments(engine: Engine) -> list[Fragment]:
    """This rank's fragments, in the order of the parameters; writing to their tensors changes the engine's state."""
    return list(_fragments(engine))


def _fragments(engine: Engine) -> Iterator[Fragment]:
    zero = engine.zero_optimizer
    zero.optimizer.create_state()
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # frozen, or wholly on other ranks
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        state = zero.optimizer.state[flat]
        tensors = {WEIGHT: flat.detach(), **{key: state[key] for key in zero.optimizer.state_keys}}
        views = {key: tensor.narrow(0, here.start, here.numel) for key, tensor in tensors.items()}
        yield Fragment(name, there.start, there.numel, views)


def optimizer_step(engine: Engine) -> int:
    """Updates that the optimizer has made; skipped steps do not count."""
    return int(engine.zero_optimizer.optimizer.updates)


def restore(engine: Engine, step: int) -> None:
    """After fragments were written to: set the optimizer's counter, and refresh the working weights on all ranks."""
    engine.zero_optimizer.optimizer.updates = step
    engine.zero_optimizer.update_lp_params()
