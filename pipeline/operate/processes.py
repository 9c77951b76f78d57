"""Commands as child processes: they end with the one that started them, and their failure is told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from pipeline.errors import LatheError
from pipeline.tether import signals_deferred, start_tethered

STOP_GRACE_SECONDS = 60.0


def run_together(
    commands: Mapping[Path | None, Sequence[str]],
    environment: Mapping[str, str],
    name: str,
    alive: Callable[[], None],
    stop_grace_seconds: float = STOP_GRACE_SECONDS,
) -> None:
    """Run commands side by side.

    Args:
        commands: argument lists, by the file that their output goes to; None = the terminal.
        environment: the whole environment of the children.
        name: the stage, for messages.
        alive: called twice a second; what it raises ends the children and is raised here.
        stop_grace_seconds: how long they may take to leave where one failed, or Ctrl-C was pressed.

    Raises:
        LatheError: a command failed; with its exit code.
    """
    for folder in {log.parent for log in commands if log is not None}:
        folder.mkdir(parents=True, exist_ok=True)
    children: list[subprocess.Popen[bytes]] = []
    grace_seconds = 0.0  # what they would still save has nowhere to go when `alive` raises
    try:
        with signals_deferred():  # a child that is not in the list would not be waited for
            for log, command in commands.items():
                children.append(_start(command, environment, log))
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            alive()
            time.sleep(0.5)
        grace_seconds = stop_grace_seconds
    except KeyboardInterrupt:
        grace_seconds = stop_grace_seconds
        raise
    finally:
        _stop(children, grace_seconds)
    for log, code in zip(commands, codes, strict=True):
        if code:
            where = f"; its output is in {log}" if log else ""
            how = f"ended with exit code {code}" if code > 0 else f"was ended by a signal: {signal.strsignal(-code)}"
            error = LatheError(
                f"stage {name} {how}{where}",
                "what is finished is kept: mend what the lines above say, and start the same command again",
            )
            error.exit_code = code if code > 0 else 1
            raise error


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        return start_tethered(
            command,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )


def _stop(children: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """SIGTERM to those still running, SIGKILL to those that do not leave within the grace period."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    deadline = time.monotonic() + grace_seconds
    for child in running:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill_tree(child.pid)
            child.wait()


def _kill_tree(pid: int) -> None:
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
