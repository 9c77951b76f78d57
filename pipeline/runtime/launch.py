"""A node's launcher: accelerate, torchrun or DeepSpeed, telling each error once and keeping the ranks' exit code.

Their own agent ends a failed run with exit code 1 and the stack of the agent, and a mistake that all ranks
meet would be told by each. Here ranks leave their user errors in a folder (`report`), the launcher tells each once, and
its exit code is that of the error (`pipeline.errors`), or 128 + signal. A signal that asks to stop goes on to the
ranks, which are waited for as long as they take; the agent by itself would kill them half a minute later.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipeline.console import flush
from pipeline.errors import LatheError
from pipeline.runtime import kernel_kills, node, requeue
from pipeline.stopping import not_ignored
from pipeline.tether import end_with_parent

_FOLDER = "LATHE_ERROR_FOLDER"
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_NAMES = re.compile(r"\S*[\d/]\S*")  # of files, addresses, steps: in these, errors that are alike differ
_LESS_MEMORY = "start fewer ranks on a machine, set a smaller shuffle_window or a larger zero_stage, or give more"
_KILLING = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
_ENDING = (signal.SIGHUP, signal.SIGQUIT)  # ranks are told to end by SIGTERM


class OtherRankError(LatheError):
    """Another rank has failed, or is gone; of interest only where nobody tells the reason."""


class LostRankError(OtherRankError):
    """A collective failed."""

    leaves_at_once = True


def report(error: LatheError) -> bool:
    """Leave an error to the launcher. False where there is none that would tell it."""
    folder = os.environ.get(_FOLDER)
    if not folder or not Path(folder).is_dir():
        return False
    told = {
        "message": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
        "secondary": isinstance(error, OtherRankError),
    }
    file = Path(folder) / f"{int(os.environ['RANK']):06d}.json"
    try:
        file.with_suffix(".partial").write_text(json.dumps(told), encoding="utf-8")
        file.with_suffix(".partial").replace(file)
    except OSError:  # the temporary folder is full
        return False
    return True


def end_with_launcher() -> None:
    """Called by a rank: it is killed when its launcher is (Linux), rather than train on beside the run's next start."""
    if _FOLDER in os.environ:
        end_with_parent(signal.SIGKILL)
        if not Path(os.environ[_FOLDER]).is_dir():  # the launcher ended before that
            raise SystemExit(1)


def main(arguments: Sequence[str]) -> int:
    """Run `PROGRAM ARGUMENTS` (`node.PROGRAMS`); returns 0, the first error's exit code, or 128 + signal."""
    program, *arguments = arguments
    for name in _OF_RANKS:  # another launcher around this one has set them; these ranks are not its ranks
        os.environ.pop(name, None)
    killed = kernel_kills.counts()
    with tempfile.TemporaryDirectory(prefix="lathe-") as folder, _Signals():
        os.environ[_FOLDER] = folder
        try:
            requeue.clear()
            ends = node.run(program, arguments)
            if not ends:
                return 0
            rank, exit_code = _first(ends, Path(folder))
            stopped_by = exit_code - 128 if exit_code > 0 else -exit_code  # Python ends by SIGINT with 130
            if stopped_by in _ASKING and not requeue.is_asked():  # there was nothing to save yet
                requeue.ask(stopped_by=stopped_by)
        except LatheError as error:
            _say_error(error.message, error.remedy)
            return error.exit_code
        return _tell(Path(folder), rank, exit_code, kernel_kills.since(killed, kernel_kills.counts()))


def _first(ends: Mapping[int, int], folder: Path) -> tuple[int, int]:
    """The rank that ended first, and its exit code. Where it tells but of a loss, it is the one that was killed.

    Otherwise who was killed is not asked: the agent kills ranks that do not leave, half a minute later.
    """
    first = next(iter(ends))
    report = folder / f"{first:06d}.json"
    if report.exists() and json.loads(report.read_text(encoding="utf-8"))["secondary"]:
        first = next((rank for rank, exit_code in ends.items() if -exit_code in _KILLING), first)
    return first, ends[first]


class _Signals:
    """While it is entered, signals that ask to stop go on to the ranks. Afterwards they do nothing, if one came.

    SIGHUP stays ignored where it was, as by nohup: ranks have it from here.
    """

    def __init__(self) -> None:
        self._heard = not_ignored((*_ASKING, *_ENDING))
        self._passed_on, self._busy = False, False
        self._come: deque[int] = deque()

    def __enter__(self) -> None:
        for number in self._heard:
            signal.signal(number, self.pass_on)

    def __exit__(self, *_: object) -> None:
        for number in self._heard:
            signal.signal(number, signal.SIG_IGN if self._passed_on else signal.SIG_DFL)

    def pass_on(self, number: int, _frame: FrameType | None) -> None:
        """Give a signal to the ranks, and go on waiting for them; before there are any, end by it.

        One that comes meanwhile, in the midst of this very call, is given to them after it: the first one counts.
        """
        self._come.append(number)
        if self._busy:
            return
        self._busy = True
        try:
            while self._come:
                self._give(self._come.popleft())
        finally:
            self._busy = False

    def _give(self, number: int) -> None:
        ranks = list(_ranks(psutil.Process()))
        if not ranks and not self._passed_on:
            if number in _ASKING:
                with contextlib.suppress(LatheError):  # nobody could be told
                    requeue.ask(stopped_by=number)
            raise SystemExit(128 + number)
        self._passed_on = True
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(signal.SIGTERM if number in _ENDING else number)


def _ranks(process: psutil.Process) -> Iterator[psutil.Process]:
    """The ranks below a process, without what they have started."""
    for child in process.children():
        try:
            is_rank = "RANK" in child.environ()
        except psutil.Error:  # it has ended
            continue
        if is_rank:
            yield child
        else:
            yield from _ranks(child)


def _tell(folder: Path, rank: int, exit_code: int, memory: str = "") -> int:
    """Print the ranks' errors, or how the first one ended; returns the exit code.

    Args:
        folder: of the errors.
        rank: that ended first.
        exit_code: its own; -signal where one ended it.
        memory: that the kernel has killed for want of it; empty where it has not.
    """
    errors: list[dict[str, Any]] = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))
    ]
    causes = [error for error in errors if not error["secondary"]]
    if not causes and exit_code < 0:
        who = "a rank" if rank == node.UNKNOWN else f"rank {rank}"
        _say(f"error: {who} was ended by {signal.Signals(-exit_code).name}, and the other ranks with it")
        if memory and -exit_code == signal.SIGKILL:
            _say(f"  {memory}; {_LESS_MEMORY}")
        return 128 - exit_code
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}  # an outage is met by every rank, each at another file
    for error in causes or errors:
        alike.setdefault((_NAMES.sub("", error["message"]), _NAMES.sub("", error["remedy"])), []).append(error)
    for first, *others in alike.values():
        _say(f"error: {first['message']}")
        if more := len({error["message"] for error in others} - {first["message"]}):
            _say(f"  and {more} more like it, from other ranks")
        if first["remedy"]:
            _say(f"  {first['remedy']}")
    return int(causes[0]["exit_code"]) if causes else exit_code


def _say_error(message: str, remedy: str) -> None:
    _say(f"error: {message}")
    if remedy:
        _say(f"  {remedy}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    flush()
    os._exit(code)  # an ordinary end would be aborted by an agent that still waits for other nodes
