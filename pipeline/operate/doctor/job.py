"""`lathe doctor`: is this machine, or are all of a job's, ready for a run? Asked before GPUs are held."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline import runfile
from pipeline.config import EncodeConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.machine import versions as versions_of
from pipeline.operate.doctor import devices, encoding, latents, machine, memory, network, room, stores, versions
from pipeline.operate.doctor.finding import Check, Finding, examine
from pipeline.operate.doctor.ranks import Told, together
from pipeline.operate.doctor.world import World, find_world
from pipeline.runtime.roll_call import REMEDY, RollCall
from pipeline.train.compatibility import common_fields

_COLLECTIVE_SECONDS, _RANK_SECONDS, _MORE_SECONDS = 20.0, 0.1, 5.0  # every rank connects with every other one
_HEAR_SECONDS, _WAIT_SECONDS = 60.0, 600.0
_WELL = "well"
_SAME = ("torch", "deepspeed", "accelerate", "diffusers", "numpy")
_QUIET = ("lathe.storage", "DeepSpeed", "accelerate", "torch.distributed")


def examine_run(path: str, overrides: Sequence[str], *, ranks: int | None = None) -> list[Finding]:
    """What this process finds of a run.

    Args:
        path: its run file, of `lathe train` or `lathe encode`.
        overrides: of its fields.
        ranks: that it is to have; None = as the environment, the run file or the machine says.
    """
    with _undisturbed():
        return _examined(path, overrides, ranks, [])


def examine_ranks(path: str, overrides: Sequence[str], call: RollCall) -> list[Finding]:
    """What all ranks find of a run; each of them calls it. On rank 0 all ranks' findings, on others their own.

    Args:
        path: its run file, of `lathe train` or `lathe encode`.
        overrides: of its fields.
        call: the line to the others.
    """
    seconds = _COLLECTIVE_SECONDS + _RANK_SECONDS * call.world_size
    most = (
        len(call.backends) * seconds + _MORE_SECONDS
    )  # gloo may take longer to give up a connection that it is making
    trial = Check("collective", lambda: call.collective(seconds), seconds=most, if_late=REMEDY)
    with _undisturbed():
        found = _examined(path, overrides, None, [trial])
    own = Told(call.rank, socket.gethostname(), _facts(path, overrides), found)
    call.tell(own.to_json())
    if call.rank:
        return found
    told = [Told.from_json(text) for _, text in sorted(call.hear(_HEAR_SECONDS).items())]
    return together(told, call.world_size, _HEAR_SECONDS)


def _examined(path: str, overrides: Sequence[str], ranks: int | None, more: list[Check]) -> list[Finding]:
    opened: list[TrainConfig | EncodeConfig] = []
    first = examine([Check("config", lambda: _load(path, overrides, opened))])
    config = opened[0] if opened else None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    configured = config.engine.world_size if isinstance(config, TrainConfig) else None
    asked = 1 if isinstance(config, EncodeConfig) and ranks is None else ranks
    try:
        world = find_world(os.environ, gpus=gpus, asked=asked, configured=configured)
    except ConfigError as error:
        first.append(Finding("ranks", "fail", error.message, error.remedy))
        world = World(1, 1)
    checks = [*versions.checks(), *machine.checks(world)]
    if config is not None:
        checks += [*devices.checks(config, world), *machine.discovery_check(config)]
    if isinstance(config, TrainConfig):
        checks += _of_training(config, world, on_gpu=gpus > 0)
    elif config is not None and world.is_first_here:
        checks += _of_encoding(config)
    return [*first, *examine([*more, *checks])]


def _of_training(config: TrainConfig, world: World, *, on_gpu: bool) -> list[Check]:
    """What each rank looks at; what is the same for a machine is looked at by its first one, the rest by rank 0."""
    found = [*network.train_checks(config, world), *machine.train_checks(config, world, on_gpu=on_gpu)]
    if not world.is_first_here:
        return found
    run, whole = latents.Training(config), world.rank in (None, 0)
    return [
        *found,
        *stores.checks(_addresses(config), config.output),
        *latents.checks(run, world, whole=whole),
        *room.train_checks(run, whole=whole),
        *memory.checks(run, world, on_gpu=on_gpu),
    ]


def _of_encoding(config: EncodeConfig) -> list[Check]:
    return [
        Check("metrics-port", lambda: network.metrics_port(config.metrics, 1)),
        *stores.checks(_addresses(config), config.output),
        *encoding.checks(config),
        *room.encode_checks(config),
    ]


def _load(path: str, overrides: Sequence[str], opened: list[TrainConfig | EncodeConfig]) -> str:
    config = runfile.load_any(path, list(overrides))
    if not isinstance(config, TrainConfig | EncodeConfig):
        raise ConfigError(
            f"{path} is for `lathe {getattr(config, 'job', '?')}`, which needs no doctor",
            "give the run file of `lathe train` or `lathe encode`",
        )
    opened.append(config)
    return f"{path}: of `lathe {config.job}`, every field is known and fits the others"


def _addresses(config: TrainConfig | EncodeConfig) -> list[str]:
    """All text of the run file that may be a place."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)

    tree = config.model_dump(
        exclude={"root": True, "validation": {"prompts"}} if isinstance(config, TrainConfig) else {"root"}
    )
    return list(texts(tree))


def _facts(path: str, overrides: Sequence[str]) -> dict[str, str]:
    """What must be the same on all ranks."""
    try:
        config = runfile.load_any(path, list(overrides))
    except ConfigError as error:
        return {"run file": error.message, **versions_of(_SAME)}
    fields = common_fields(config) if isinstance(config, TrainConfig) else config.model_dump()
    return {**{name: repr(value) for name, value in fields.items()}, **versions_of(_SAME)}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Storage is waited for no longer than a person would; libraries keep their notes for themselves."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with stores.impatient():
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def agreed(call: RollCall, *, is_well: bool) -> bool:
    """Rank 0's word on all ranks, once it has told: no launcher may end it before, for another's exit code."""
    if call.rank:
        return call.wait(_WAIT_SECONDS) == _WELL
    call.dismiss(_WELL if is_well else "unwell")
    return is_well
