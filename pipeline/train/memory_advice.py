"""Out of memory: what was asked for, and which settings to change, those first that cost least."""

from __future__ import annotations

import re

import torch

from pipeline.config import TrainConfig
from pipeline.errors import LatheError
from pipeline.runtime.process import Process

_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_ON_HOST = ("DefaultCPUAllocator", "Unable to allocate")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


class OutOfMemoryError(LatheError):
    """Of the device or the host, on this rank."""

    leaves_at_once = True


def out_of_memory(error: Exception, config: TrainConfig, ranks: Process | None) -> OutOfMemoryError | None:
    """The error in one line, with the settings to change; None where it is another one.

    Args:
        error: that ended building the model, or a step.
        config: the run file.
        ranks: this rank among the others; where it stands tells what took the memory.
    """
    said = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(s in said.lower() for s in _SIGNS):
        return None
    if ranks is None:  # it was not even started
        return None
    on_host = ranks.device.type == "cpu" or isinstance(error, MemoryError) or any(sign in said for sign in _ON_HOST)
    place, building = ranks.watch.place, ranks.watch.place.phase == "starts"
    asked = f": {_readable(match)} more were asked for" if (match := _ASKED.search(said)) else ""
    where = "the host's memory" if on_host else f"{ranks.device}'s memory"
    validating = place.phase.startswith("validates")
    when = "as model and optimizer were built" if building else f"at step {place.step}"
    if validating:
        when = f"in the validation after step {place.step}"
    settings = settings_to_change(
        config, ranks.world_size, building=building, on_gpu=ranks.device.type != "cpu", on_host=on_host
    )
    if validating and config.validation.prompts:
        settings.insert(0, "fewer or no validation.prompts")
    return OutOfMemoryError(
        f"rank {ranks.rank} ran out of {where} {when}{asked}",
        f"as many of these as it takes, in this order: {', '.join(settings)}",
    )


def settings_to_change(
    config: TrainConfig, world_size: int, *, building: bool, on_gpu: bool, on_host: bool
) -> list[str]:
    """What takes less memory, those first that cost least time.

    Args:
        config: the run file.
        world_size: ranks.
        building: it was model and optimizer that did not fit, and not a step's activations.
        on_gpu: ranks compute on GPUs.
        on_host: it was the host's memory that ran out.
    """
    engine = config.engine
    in_step, of_state, of_data = [], [], []
    if more := _more_micro_batches(config, world_size):
        in_step.append(f"engine.accumulation={' or '.join(map(str, more))}")
    if not engine.activation_checkpointing:
        in_step.append("engine.activation_checkpointing=true")
    if engine.precision == "float32" and on_gpu:
        of_state.append("engine.precision=bfloat16")
    if world_size > 1 and engine.zero_stage < 3:
        of_state.append(f"engine.zero_stage={' or '.join(str(stage) for stage in range(engine.zero_stage + 1, 4))}")
    if on_gpu and not on_host:
        if not engine.offload_optimizer:
            of_state.append("engine.offload_optimizer=true" + " (with a zero_stage)" * (engine.zero_stage == 0))
        if engine.zero_stage == 3 and not engine.offload_parameters:
            of_state.append("engine.offload_parameters=true")
    if on_gpu and on_host:
        of_data += ["engine.offload_parameters=false"] * engine.offload_parameters
        of_data += ["engine.offload_optimizer=false"] * engine.offload_optimizer
    if on_host:
        of_data.append(f"shuffle_window={max(1, config.shuffle_window // 4)}")
        of_data.append("fewer ranks on each machine")
    if on_gpu and on_host:
        return of_data
    last = "more ranks" if engine.zero_stage else "more ranks, with engine.zero_stage=3"
    return [*([] if building else in_step), *of_state, *([] if building else of_data), last, "a smaller model"]


def _more_micro_batches(config: TrainConfig, world_size: int) -> list[int]:
    """The next numbers of micro batches that divide a rank's samples."""
    share = config.global_batch // world_size
    return [count for count in range(config.engine.accumulation + 1, share + 1) if share % count == 0][:2]


def _readable(match: re.Match[str]) -> str:
    number, unit = float(match[1]), match[2]
    place = _UNITS.index(unit) if unit in _UNITS else 0
    while number >= 1024 and place + 1 < len(_UNITS):
        number, place = number / 1024, place + 1
    return f"{number:.4g} {_UNITS[place]}"
