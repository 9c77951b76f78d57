"""This node's ranks, started by accelerate or torchrun, and how they ended.

Both run torch's agent, in a thread here: the main thread stays free for signals, to which an agent that waits for other
nodes is deaf for as long as it waits.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import psutil

from pipeline.errors import LatheError
from pipeline.runtime import network

_EXIT_BARRIER_SECONDS = 30  # an agent whose ranks have finished waits for the other nodes' for 300 s by itself


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
            outcome.append(_run(PROGRAMS[program], arguments))
        except BaseException as error:  # for the main thread
            outcome.append(error)

    thread = threading.Thread(target=work, name=program, daemon=True)
    thread.start()
    try:
        thread.join()
    finally:
        if thread.is_alive():  # a signal has ended the wait
            for child in psutil.Process().children(recursive=True):
                child.kill()
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


def _run(program: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> dict[int, int]:
    import torch.distributed.run  # noqa: F401  for its loggers
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        if logger.name.startswith("torch.distributed"):  # each of them sets a level of its own
            logger.setLevel(logging.CRITICAL)
    api.LocalElasticAgent = partial(api.LocalElasticAgent, exit_barrier_timeout=_EXIT_BARRIER_SECONDS)  # type: ignore[misc,assignment]
    nodes = int(os.environ.get("NODES", "1"))
    if nodes > 1:
        network.wait_for_address(os.environ["MASTER_ADDR"])
    try:
        program(arguments)
    except ChildFailedError as failure:
        first, _ = failure.get_first_failure()
        ends = {rank: end.exitcode for rank, end in failure.failures.items()}
        return {first: ends[first], **ends}
    except (DistError, ConnectionError) as error:
        raise _apart(os.environ, nodes, error) from error
    return {}


def _apart(environment: Mapping[str, str], nodes: int, error: Exception) -> LatheError:
    said = str(error).strip().splitlines()[0]
    place = f"{environment.get('MASTER_ADDR', 'localhost')}:{environment.get('MASTER_PORT', '')}"
    return LatheError(
        f"node {environment.get('NODE_RANK', 0)} of {nodes} has not met the others at {place}: {said}",
        "see that all nodes were started with the same NODES, MASTER_ADDR and MASTER_PORT, each with a NODE_RANK of its "
        "own, that MASTER_ADDR is node 0, its port is free, and no firewall is in between",
    )


def _accelerate(arguments: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(list(arguments)))


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import parse_args, run

    run(parse_args(list(arguments)))


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {"accelerate": _accelerate, "torchrun": _torchrun}
