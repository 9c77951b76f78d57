"""One training process among its ranks: how it starts, what it checks at once, and how it leaves.

For ZeRO accelerate brings up the process group (NCCL with GPUs, gloo without), for plain DDP torch alone, and neither
accelerate nor DeepSpeed is imported. Two traps are dealt with here. Without a GPU,
`Accelerator(cpu=True)` drops DeepSpeed without a word and lets every rank believe that it is alone; `PartialState`
first, then an `Accelerator` with a plugin, gives real ranks and a real engine. And DeepSpeed compiles a shared-memory
operator (80 s, needs a C++ compiler) as soon as it starts on a CPU, though only its inference kernels ever call it:
it is taken off the list of operators that DeepSpeed may build.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import EngineConfig
from pipeline.errors import SetupError
from pipeline.runtime import environment
from pipeline.runtime.deepspeed_config import choose_accelerator
from pipeline.runtime.launch import LostRankError, OtherRankError, end_with_launcher
from pipeline.runtime.watchdog import Watchdog

_PATIENCE_SECONDS = 1.0
_STALLS = 5  # a stall is told, by default, after this part of the time-out
_TEXT_BYTES = 2000
_LAST_FLAG_TIMEOUT = timedelta(seconds=10)
_SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"
_SIGNS_OF_LOSS = ("gloo", "nccl", "timeout caused pair closure", "closed by peer", "reset by peer")
_PLACE_IN_SOURCE = re.compile(r"\[[^\]]*\.cc:\d+\] ")
_CHATTY_LOGGERS = ("DeepSpeed", "accelerate", "torch.distributed")
_HARMLESS_WARNINGS = (r"`torch\.distributed\.\w+` is deprecated",)  # since torch 2.14, for names that 2.6 does not have


@dataclass
class Process:
    """This rank's place among the ranks. `start` makes it, `finish` ends it.

    Args:
        rank: 0 to world_size - 1.
        world_size: ranks over all machines.
        device: where this rank computes.
        watch: where this rank stands, told to the others.
    """

    rank: int
    world_size: int
    device: torch.device
    side_group: Any = field(repr=False)
    watch: Watchdog = field(default_factory=Watchdog, repr=False)
    _flags: torch.Tensor | None = field(default=None, repr=False)
    _pending: Any = field(default=None, repr=False)
    _abandoned: bool = field(default=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, serves metrics and writes what there is once."""
        return self.rank == 0

    def post(self, *flags: int) -> None:
        """Send flags to all ranks. They travel on a group of their own while a step computes, so nobody waits."""
        self._flags = torch.tensor(flags)
        self._pending = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self.side_group, async_op=True)

    def posted(self) -> tuple[int, ...]:
        """The largest that a rank has posted of each flag, the same on all of them; once for each `post`."""
        assert self._pending is not None and self._flags is not None, "nothing was posted"  # noqa: S101, PT018
        self._pending.wait()
        self._pending = None
        return tuple(self._flags.tolist())

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest that a rank has of each value, the same on all."""
        return tuple(self._reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist())

    def text_of(self, rank: int, text: str) -> str:
        """One rank's text on all of them, or its first 2,000 bytes."""
        letters = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        if self.rank == rank:
            own = text.encode()[:_TEXT_BYTES]
            letters[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        return bytes(self._reduce(letters, dist.ReduceOp.MAX).tolist()).rstrip(b"\0").decode(errors="replace")

    def wait_for_all(self, ready: Callable[[float], bool]) -> None:
        """Wait until all ranks are ready. None of them sits in a collective meanwhile, deaf to signals.

        Args:
            ready: whether this rank is; it may take the given seconds to find out.
        """
        while self.any(not ready(_PATIENCE_SECONDS)):
            pass

    def agree(self, problem: Exception | None = None) -> None:
        """Wait for all ranks, and raise if one has a problem: its own there, OtherRankError on the others."""
        code = 0 if problem is None else getattr(problem, "exit_code", 1)
        worst = self._reduce(torch.tensor(code * self.world_size + self.rank if code else 0), dist.ReduceOp.MAX)
        if problem is not None:
            raise problem
        if int(worst):
            code, rank = divmod(int(worst), self.world_size)
            error = OtherRankError(f"rank {rank} failed", "its own message says why")
            error.exit_code = code
            raise error

    def differing(self, values: Mapping[str, object]) -> list[str]:
        """Which of the named values are not the same on all ranks: by their `repr`, the same answer everywhere."""
        digests = [hashlib.sha256(repr(value).encode()).digest()[:8] for value in values.values()]
        mine = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
        least = self._reduce(mine.clone(), dist.ReduceOp.MIN)
        most = self._reduce(mine, dist.ReduceOp.MAX)
        return [name for name, same in zip(values, (least == most).tolist(), strict=True) if not same]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on at least one rank."""
        return self.first(flag) is not None

    def first(self, flag: bool) -> int | None:
        """The lowest rank whose flag is true, the same on all; None where it is true on none."""
        lowest = int(self._reduce(torch.tensor(self.rank if flag else self.world_size), dist.ReduceOp.MIN))
        return lowest if lowest < self.world_size else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, float64 on the host. A collective, and a synchronisation with the device."""
        return self._reduce(values.detach().to("cpu", torch.float64), dist.ReduceOp.SUM)

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor on the host, in their order, on all of them; all are of one shape. A collective."""
        mine = values.detach().cpu().contiguous()
        everyones = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyones, mine, group=self.side_group)
        return everyones

    def _reduce(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        dist.all_reduce(values, operation, group=self.side_group)
        return values

    def abandon(self) -> None:
        """`finish` will not wait for the others: they are gone, or are not told of this rank's end."""
        self._abandoned = self.world_size > 1

    def finish(self) -> None:
        """Leave the process group; a rank that exits without this aborts, and keeps its launcher waiting."""
        self.watch.close()
        if self._abandoned:
            return
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # the others may be gone
                self._pending.wait(_LAST_FLAG_TIMEOUT)
        self._pending = self.side_group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def start(config: EngineConfig) -> Process:
    """Join the other ranks. Without a launcher this is a world of one.

    Raises:
        SetupError: the ranks are not those that the launcher or `engine.world_size` announced, or no network leads to
            the other machines.
    """
    end_with_launcher()
    on_gpu = torch.cuda.is_available()
    environment.prepare()
    threads = config.threads_per_rank or environment.threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if not on_gpu:
        torch.backends.cuda.enable_flash_sdp(False)  # on a CPU too: its bfloat16 backward is ten times the plain one's
    announced = int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=config.timeout_seconds)
    for pattern in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    device = (_join_for_deepspeed if config.zero_stage else _join)(on_gpu, timeout)
    world = dist.get_world_size()
    process = Process(
        rank=dist.get_rank(),
        world_size=world,
        device=device,
        side_group=dist.new_group(backend="gloo", timeout=timeout),
        watch=Watchdog(dist.get_rank(), world, config.stall_seconds or config.timeout_seconds / _STALLS),
    )
    problem = _wrong_world(world, announced, config.world_size)
    if problem is not None:
        process.finish()
        raise problem
    process.watch.start()
    return process


def is_alone() -> bool:
    """Whether no launcher has announced other ranks."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _join_for_deepspeed(on_gpu: bool, timeout: timedelta) -> torch.device:
    """The process group as DeepSpeed wants it; returns where this rank computes."""
    environment.refuse_settings()
    choose_accelerator()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import deepspeed.ops
    import deepspeed.utils.groups
    from accelerate import PartialState

    _be_quiet()
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OPERATOR] = False
    device: torch.device = PartialState(cpu=not on_gpu, timeout=timeout).device
    deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=timeout)  # its own would wait for half an hour
    return device


def _join(on_gpu: bool, timeout: timedelta) -> torch.device:
    """The process group with torch alone."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    return device


def lost_rank(error: Exception, ranks: Process | None = None) -> LostRankError | None:
    """What a failed collective means: another rank is gone, or was silent for too long. None for other errors.

    Args:
        error: of the collective.
        ranks: knows where the others were last seen.
    """
    said = str(error).strip().splitlines()[0] if str(error) else ""
    if not isinstance(error, dist.DistError) and not any(sign in said.lower() for sign in _SIGNS_OF_LOSS):
        return None
    said = _PLACE_IN_SOURCE.sub("", said).partition(". This is typically")[0]
    places = ranks.watch.known() if ranks is not None else ""
    return LostRankError(
        f"lost another rank: {said}" + (f"; last seen: {places}" if places else ""),
        "the rank that ended first says why; the same command goes on from the last checkpoint",
    )


def _wrong_world(world: int, announced: int, wanted: int | None) -> SetupError | None:
    if world != announced:
        return SetupError(
            f"the launcher announced {announced} ranks, the process group has {world}",
            "start it with launchers/accelerate.sh, or without a launcher as a world of one",
        )
    if wanted is not None and world != wanted:
        return SetupError(
            f"engine.world_size={wanted}, but {world} {'rank was' if world == 1 else 'ranks were'} started",
            f"start {wanted} ranks (NPROC={wanted} launchers/accelerate.sh CONFIG), or set engine.world_size={world}",
        )
    return None


def _be_quiet() -> None:
    """Errors of the libraries still show; their notes on what they are doing do not. After DeepSpeed's import."""
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
