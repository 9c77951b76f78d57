"""Commands in forked processes, where the slow imports are done already; a module that these can import.

What a user starts is tested elsewhere: here are the many commands of tests whose point is another.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipeline.tether import end_with_parent

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["pipeline.cli", "pipeline.encode.job", "pipeline.storage.s3", "pipeline.train.trainer", "deepspeed"]
)


def start(
    target: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None, daemon: bool = True
) -> BaseProcess:
    """`target(*arguments)` in a process of its own, on one thread.

    Args:
        target: of a module that can be imported.
        arguments: that can be pickled.
        environment: all variables; None = those that this process has now, which are not those of the first start.
        daemon: it may have no processes of its own, and is ended with this one.
    """
    variables = dict(os.environ if environment is None else environment)
    process = _FORK.Process(target=_call, args=(variables, target, *arguments), daemon=daemon)
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    """Both ends of a line to a process that is started."""
    return _FORK.Pipe()


class Command:
    """`lathe ARGUMENTS`, and its ranks where it has several; the methods are those of `subprocess.Popen`.

    Args:
        arguments: of `lathe`.
        log: stdout and stderr go there.
        ranks: that run it together.
        environment: all variables; None = those of this process.
        folder: to run in; None = this one.
        file_bytes: no file may become larger; 0 = any may.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        file_bytes: int = 0,
    ) -> None:
        self._log, self._seen = log, log.stat().st_size if log.exists() else 0
        self._process = start(
            _run, list(arguments), log, ranks, folder or Path.cwd(), file_bytes, environment=environment
        )
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Of the command, -signal where one ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has said, once it has ended. Raises TimeoutError."""
        self.wait(timeout)
        return self._log.read_bytes()[self._seen :].decode(), None

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _call(variables: Mapping[str, str], target: Callable[..., None], *arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    target(*arguments)


def _run(arguments: list[str], log: Path, ranks: int, folder: Path, file_bytes: int) -> None:
    os.chdir(folder)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["lathe", *arguments]
    if ranks > 1:
        _be_ranks(ranks)
    runpy.run_module("pipeline", run_name="__main__")


def _be_ranks(ranks: int) -> None:
    """Return as each of so many processes; this one waits for them and ends as the first that failed did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu")
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            end_with_parent(signal.SIGKILL)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
            return
        children.add(child)
    _leave_as(children)


def _leave_as(children: set[int]) -> NoReturn:
    code = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        ended = os.waitstatus_to_exitcode(status)
        code = code or (ended if ended >= 0 else 128 - ended)
    os._exit(code)
