"""GPUs that the ranks want, and what torch can do with them; DeepSpeed, and a compiler where one is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import EncodeConfig, EngineConfig, TrainConfig
from pipeline.errors import SetupError
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.world import World
from pipeline.runtime import operators

_IMPORT_SECONDS = 120.0


@dataclass(frozen=True)
class Devices:
    """What the machine has, and what torch makes of it.

    Attributes:
        in_machine: GPUs by their device files; a container that hides them has none.
        seen: by torch.
        build: what torch was built for, such as "CUDA 12.4"; empty = CPUs alone.
        architectures: that it was built for, such as sm_90; empty = it does not say.
        models: names of those seen, with their architecture and whether they have bfloat16.
    """

    in_machine: int
    seen: int
    build: str
    architectures: Sequence[str] = ()
    models: Sequence[tuple[str, str, bool]] = field(default=())


def checks(config: TrainConfig | EncodeConfig, world: World) -> list[Check]:
    """Of devices, and of the programs that make code for them."""
    bfloat16 = (config.engine.precision if isinstance(config, TrainConfig) else config.precision) == "bfloat16"
    compiles = config.engine.compile if isinstance(config, TrainConfig) else config.compile
    found = [Check("devices", lambda: judge(look(), world, bfloat16=bfloat16))]
    if isinstance(config, TrainConfig):
        engine = config.engine
        if engine.zero_stage:
            found.append(Check("deepspeed", lambda: deepspeed(engine), seconds=_IMPORT_SECONDS))
    if compiles:
        found.append(Check("compiler", compiler, seconds=60.0))
    return found


def look(root: Path = Path("/")) -> Devices:
    """This machine, as this process sees it."""
    in_machine = len([path for path in (root / "dev").glob("nvidia*") if path.name[6:].isdecimal()])
    in_machine = in_machine or len(list((root / "dev/dri").glob("renderD*")) if (root / "dev/kfd").exists() else [])
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    models = []
    for number in range(seen):
        major, minor = torch.cuda.get_device_capability(number)
        models.append((torch.cuda.get_device_name(number), f"sm_{major}{minor}", major >= 8 or hip is not None))
    build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else ""
    return Devices(in_machine, seen, build, torch.cuda.get_arch_list() if seen and not hip else (), tuple(models))


def judge(devices: Devices, world: World, *, bfloat16: bool = False) -> str | Doubt:
    """Whether each rank has its GPU, and code for it; or whether none is there.

    Raises:
        SetupError: GPUs are there and torch does not see them, or fewer than ranks, or has no code for them.
    """
    if devices.in_machine and not devices.seen:
        if not devices.build:
            raise SetupError(
                f"{devices.in_machine} GPUs are in this machine, and torch {torch.__version__} is built for CPUs alone",
                "install torch built for CUDA: https://pytorch.org/get-started",
            )
        raise SetupError(
            f"{devices.in_machine} GPUs are in this machine, and torch {torch.__version__} ({devices.build}) sees none",
            f"look at nvidia-smi (the driver must be new enough for {devices.build}) and at CUDA_VISIBLE_DEVICES",
        )
    if not devices.seen:
        return f"no GPU: {world.local_ranks} rank{'s' * (world.local_ranks > 1)} here on the CPU"
    if world.local_ranks > devices.seen:
        raise SetupError(
            f"{world.local_ranks} ranks here, and torch sees {devices.seen} GPUs",
            f"ask for {world.local_ranks} GPUs on each machine, or set NPROC={devices.seen}",
        )
    for name, architecture, _ in devices.models:
        if devices.architectures and not _runs_on(devices.architectures, architecture):
            raise SetupError(
                f"torch {torch.__version__} ({devices.build}) has no code for {name} ({architecture}), only for"
                f" {', '.join(devices.architectures)}",
                f"install a torch that is built for {architecture}",
            )
    lacking = next((name for name, _, has_it in devices.models if not has_it), None)
    if bfloat16 and lacking:
        return Doubt(f"{lacking} has no bfloat16 of its own: slow", "set precision to float16 or float32")
    return f"{devices.seen} x {devices.models[0][0]}, {devices.build}"


def _runs_on(built: Sequence[str], architecture: str) -> bool:
    """Code runs on its own generation from its own release on; compute_* is compiled for later ones at the start."""
    wanted = int(architecture.removeprefix("sm_"))
    for one in built:
        kind, _, digits = one.rstrip("abcdef").rpartition("_")
        number = int(digits) if digits.isdecimal() else wanted
        if number <= wanted and (kind == "compute" or number // 10 == wanted // 10):
            return True
    return False


def deepspeed(config: EngineConfig) -> str:
    """Whether DeepSpeed can be imported, with the operators of its own that such a run needs. Raises SetupError."""
    release = operators.import_deepspeed()
    if not operators.pins_natively(config):
        return f"DeepSpeed {release}; no operator of its own is compiled for this run"
    if operators.is_built(operators.PIN_MEMORY):
        return f"DeepSpeed {release}, with {operators.PIN_MEMORY}"
    try:
        compiler()
    except SetupError as error:
        raise SetupError(
            f"DeepSpeed {release} cannot compile {operators.PIN_MEMORY}: {error.message}", error.remedy
        ) from error
    return f"DeepSpeed {release}, can compile {operators.PIN_MEMORY}"


def compiler() -> str:
    """Whether C++ can be compiled here against Python's headers. Raises SetupError."""
    return f"{operators.check_compiler()} makes code that Python loads"
