"""Memory that weights, optimizer and averages take before the first step, against what there is."""

from __future__ import annotations

import psutil
import torch

from pipeline.errors import SetupError
from pipeline.memory import limit_bytes
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.latents import Training
from pipeline.operate.doctor.world import World
from pipeline.operate.numerals import in_units
from pipeline.runtime.state_bytes import StateBytes, state_bytes
from pipeline.train.memory_advice import settings_to_change

_AFTER = ("network",)


def checks(run: Training, world: World, *, on_gpu: bool) -> list[Check]:
    """Of the host, and of the GPUs where there are some."""
    found = [Check("memory", lambda: host(run, world, on_gpu=on_gpu), _AFTER)]
    if on_gpu:
        found.append(Check("gpu-memory", lambda: device(run, world), _AFTER))
    return found


def host(run: Training, world: World, *, on_gpu: bool) -> str | Doubt:
    """Whether a machine's ranks have room for their states, and for the copy that a checkpoint is stored from.

    Raises:
        SetupError: they do not.
    """
    states = _states(run, world)
    own = psutil.Process().memory_info().rss  # packages are loaded by now, as in each rank
    of_rank = own + states.saved + (states.host if on_gpu else states.host + states.device)
    needed, limit = of_rank * world.local_ranks, limit_bytes()
    said = (
        f"{world.local_ranks} ranks here take about {in_units(needed)} before activations and batches"
        f" ({in_units(of_rank)} each)"
    )
    remedy = _remedy(run, world, on_gpu=on_gpu, on_host=True)
    if needed > limit:
        raise SetupError(f"{said}, and {in_units(limit)} are there", remedy)
    free = psutil.virtual_memory().available
    if needed > free:
        return Doubt(f"{said}, and {in_units(free)} are free now", f"end what else runs here; or {remedy}")
    return f"{said} of {in_units(limit)}"


def device(run: Training, world: World) -> str:
    """Whether a GPU has room for a rank's states. Raises SetupError."""
    needed = _states(run, world).device
    total = min(torch.cuda.mem_get_info(number)[1] for number in range(torch.cuda.device_count()))
    said = f"a rank's states take {in_units(needed)} before activations"
    if needed > total:
        raise SetupError(f"{said}, and a GPU has {in_units(total)}", _remedy(run, world, on_gpu=True, on_host=False))
    return f"{said} of {in_units(total)}"


def _states(run: Training, world: World) -> StateBytes:
    trained = sum(weight.numel() for weight in run.network().parameters() if weight.requires_grad)
    return state_bytes(run.config.engine, trained, averages=len(run.config.ema.averages), ranks=world.ranks)


def _remedy(run: Training, world: World, *, on_gpu: bool, on_host: bool) -> str:
    change = settings_to_change(run.config, world.ranks, building=True, on_gpu=on_gpu, on_host=on_host)
    return f"ask for more, or as many of these as it takes: {', '.join(change)}"
