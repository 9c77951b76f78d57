"""This node's ranks, started by accelerate, torchrun or DeepSpeed, and how they ended.

It happens in a thread: the main thread stays free for signals, to which torch's agent, while it waits for the agents of
other nodes, is deaf.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import psutil

from pipeline.console import tell
from pipeline.errors import ConfigError, LatheError
from pipeline.runtime import network
from pipeline.tether import start_tethered

UNKNOWN = -1
"""Stands for a rank that cannot be named."""
_PLACE = ("NODE_RANK", "NODES", "MASTER_ADDR", "MASTER_PORT")
_EXIT_BARRIER_SECONDS = 30  # an agent whose ranks have finished waits for the other nodes' for 300 s by itself
_MOST_SIGNALS = 256 - 32


def run(program: str, arguments: Sequence[str]) -> dict[int, int]:
    """Start the ranks and wait for them.

    Args:
        program: a key of `PROGRAMS`.
        arguments: of it.

    Returns:
        Exit codes of ranks that failed, -signal where one ended it; the rank that failed first comes first.

    Raises:
        LatheError: the nodes did not meet.
        SystemExit: the program does not take the arguments.
    """
    outcome: list[dict[int, int] | BaseException] = []

    def work() -> None:
        try:
            if int(os.environ.get("NODES", "1")) > 1:
                network.wait_for_address(os.environ["MASTER_ADDR"])
                if int(os.environ.get("NODE_RANK", "0")) == 0:
                    tell("{NODES} machines meet at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ))
            outcome.append(PROGRAMS[program](arguments))
        except BaseException as error:  # for the main thread
            outcome.append(error)

    thread = threading.Thread(target=work, name=program, daemon=True)
    thread.start()
    try:
        thread.join()
    finally:
        if thread.is_alive():  # a signal has ended the wait
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended with its parent
                    child.kill()
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


def _by_agent(start: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> dict[int, int]:
    """What runs torch's agent in this process."""
    import torch.distributed.run  # noqa: F401  for its loggers
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        if logger.name.startswith("torch.distributed"):  # each of them sets a level of its own
            logger.setLevel(logging.CRITICAL)
    patient = api.LocalElasticAgent  # type: ignore[attr-defined]
    api.LocalElasticAgent = partial(patient, exit_barrier_timeout=_EXIT_BARRIER_SECONDS)  # type: ignore[attr-defined,assignment,misc]
    try:
        start(arguments)
    except ChildFailedError as failure:
        first, _ = failure.get_first_failure()
        ends = {rank: end.exitcode for rank, end in failure.failures.items()}
        return {first: ends[first], **ends}
    except (DistError, ConnectionError) as error:
        raise _apart(str(error).strip().splitlines()[0]) from error
    return {}


def _apart(said: str) -> LatheError:
    number, nodes, host, port = (os.environ.get(name, "?") for name in _PLACE)
    return LatheError(
        f"node {number} of {nodes} has not met the others at {host}:{port}: {said}",
        "see that all nodes were started with the same NODES, MASTER_ADDR and MASTER_PORT, each with a NODE_RANK "
        "of its own, that MASTER_ADDR is node 0, its port is free, and no firewall is in between",
    )


def _accelerate(arguments: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(list(arguments)))


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import parse_args, run

    run(parse_args(list(arguments)))  # type: ignore[no-untyped-call]


def _deepspeed(arguments: Sequence[str]) -> dict[int, int]:
    """`HOSTFILE MODULE [ARGUMENTS]` by DeepSpeed's launcher of one node; the machine that failed first is not known.

    DeepSpeed's runner, which does the same, would take a launcher that was killed for one that has finished.
    """
    from deepspeed.launcher.runner import encode_world_info, fetch_hostfile

    hostfile, *module = arguments
    try:
        slots = fetch_hostfile(hostfile)
    except (OSError, ValueError) as error:
        raise ConfigError(f"HOSTFILE={hostfile}: {error}", "one line for each machine: NAME slots=RANKS") from error
    if slots is None:
        raise ConfigError(f"HOSTFILE={hostfile} is no file", "one line for each machine: NAME slots=RANKS")
    number, _, host, port = (os.environ[name] for name in _PLACE)
    world = encode_world_info({name: list(range(ranks)) for name, ranks in slots.items()})
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--quiet", f"--world_info={world}"]
    command += [f"--node_rank={number}", f"--master_addr={host}", f"--master_port={port}"]
    launcher = start_tethered([*command, "--module", "--no_local_rank", *module])
    code = launcher.wait()
    if code > _MOST_SIGNALS:  # exit(-signal) of a rank
        code -= 256
    return {UNKNOWN: code} if code else {}


PROGRAMS: dict[str, Callable[[Sequence[str]], dict[int, int]]] = {
    "accelerate": partial(_by_agent, _accelerate),
    "torchrun": partial(_by_agent, _torchrun),
    "deepspeed": _deepspeed,
}
