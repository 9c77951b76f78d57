"""Which rank stands where: noted at almost no cost, and told when nothing moves any more.

A thread of each rank leaves its place in the store that the ranks met at, and reads the others', on a connection of its
own: there is no collective in it, so it works while all collectives hang.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

TOLD_PER_SECOND = 50
"""So often all ranks together leave their places, at most: one process serves them all."""
_KEY = "lathe/place/{}"
_MOST_PERIOD_SECONDS = 5.0
_STORE_TIMEOUT = timedelta(seconds=5)
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a rank stands. Times are seconds of the Unix clock."""

    phase: str  # such as "waits for data"
    step: int  # that is done, or prepared
    since: float
    host: str = ""
    seen: float = 0.0  # when the rank last said so


class Board:
    """The ranks' places, in the store that they met at."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._keys, self._rank = [_KEY.format(other) for other in range(world_size)], rank
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)

    def post(self, place: Place) -> None:
        """Leave this rank's."""
        self._store.set(self._keys[self._rank], json.dumps(place))

    def read(self) -> list[Place]:
        """All ranks'; none where one has not left its own yet."""
        if not self._store.check(self._keys):
            return []
        return [Place(*json.loads(said)) for said in self._store.multi_get(self._keys)]


class Watchdog:
    """This rank's place, and what is known of the others'.

    Args:
        rank: of this process.
        world_size: of all.
        stall_seconds: without progress, after which it is told who stands where.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, stall_seconds: float = float("inf")) -> None:
        self._rank, self._stall_seconds = rank, stall_seconds
        self._host = socket.gethostname()
        self.place = Place("", 0, time.time(), self._host)  # until it is noted, nothing is judged
        self.period = max(min(_MOST_PERIOD_SECONDS, stall_seconds / 4), world_size / TOLD_PER_SECOND)
        self._others: list[Place] = []
        self._told_after = stall_seconds
        self._stalled_since = 0.0
        self._board = Board(rank, world_size) if world_size > 1 else None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._look()
        self._thread.start()

    def note(self, phase: str, step: int | None = None) -> None:
        """This rank has come to a phase of a step; None = of the same step. The same again is no progress."""
        before = self.place
        step = before.step if step is None else step
        if (phase, step) != (before.phase, before.step):
            self.place = Place(phase, step, time.time(), self._host)

    def known(self) -> str:
        """Who was last seen where; empty in a world of one."""
        return describe(self._others, time.time(), silent_seconds=self._silent_seconds) if self._others else ""

    def close(self) -> None:
        """Watch no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    @property
    def _silent_seconds(self) -> float:
        return 3 * self.period + 1

    def _run(self) -> None:
        while not self._end.wait(self.period):
            self._look()
            self._judge()

    def _look(self) -> None:
        mine = self.place._replace(seen=time.time())
        if self._board is None:
            self._others = [mine]
            return
        try:
            self._board.post(mine)
            self._others = self._board.read() or self._others
        except RuntimeError:  # whoever keeps the store is gone: what was seen last stays
            return

    def _judge(self) -> None:
        """Tell of a stall, then again each time that it has lasted twice as long; and of its end."""
        now, since = time.time(), self.place.since
        if not self.place.phase:
            return
        if self._stalled_since and since != self._stalled_since:
            self._tell(f"progress again, after {since - self._stalled_since:.0f} s without")
            self._stalled_since, self._told_after = 0.0, self._stall_seconds
        elif now - since >= self._told_after:
            self._stalled_since, self._told_after = since, 2 * (now - since)
            self._tell(f"no progress for {now - since:.0f} s: {self.known()}")
            if self._is_apart():
                _log.warning("rank %d is here:\n%s", self._rank, _stack_of_main_thread())

    def _tell(self, text: str) -> None:
        """Once: by the lowest rank that is heard of."""
        heard = [rank for rank, place in enumerate(self._others) if self._is_heard(place)]
        if not heard or self._rank == heard[0]:
            _log.warning("%s", text)

    def _is_apart(self) -> bool:
        """Whether few stand where this rank does: its stack may say what all wait for."""
        kinds = [(place.phase, place.step) for place in self._others if self._is_heard(place)]
        mine = kinds.count((self.place.phase, self.place.step))
        return mine <= min((kinds.count(kind) for kind in kinds), default=1) and mine < 3

    def _is_heard(self, place: Place) -> bool:
        return time.time() - place.seen < self._silent_seconds


def describe(places: Sequence[Place], now: float, *, silent_seconds: float) -> str:
    """Ranks by where they stand, largest group first, in one line.

    Args:
        places: by rank.
        now: on the Unix clock.
        silent_seconds: after which a rank that said nothing is called silent.
    """
    groups: dict[tuple[str, int, bool], list[int]] = {}
    for rank, place in enumerate(places):
        groups.setdefault((place.phase, place.step, now - place.seen > silent_seconds), []).append(rank)
    several = len({place.host for place in places}) > 1
    told = []
    for (phase, step, silent), ranks in sorted(groups.items(), key=lambda group: -len(group[1])):
        hosts = {places[rank].host for rank in ranks}
        where = f" on {hosts.pop()}" if several and len(hosts) == 1 else ""
        said = f"{phase or 'is'} at step {step} for {now - max(places[rank].since for rank in ranks):.0f} s"
        said += f", silent for {now - max(places[rank].seen for rank in ranks):.0f} s" if silent else ""
        told.append(f"{named(ranks)}{where}: {said}")
    return "; ".join(told)


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _stack_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
