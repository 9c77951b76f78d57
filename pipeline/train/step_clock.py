"""Where the time of this rank's steps goes: by the host's clock, on a GPU by events on its stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch

Part = Literal["forward", "backward", "optimizer"]
_MOST_EVENTS = 4096


class Event(Protocol):
    """A CUDA event with timing, as far as this clock goes."""

    def record(self) -> None: ...  # noqa: D102
    def synchronize(self) -> None: ...  # noqa: D102
    def elapsed_time(self, end_event: Event) -> float: ...  # noqa: D102


class StepClock:
    """Seconds of each part of steps since it was made. Marking waits for nobody; reading waits for the last mark.

    Args:
        device: that computes.
        event: makes an event; None = CUDA's on a GPU, none elsewhere.
    """

    def __init__(self, device: torch.device, event: Callable[[], Event] | None = None) -> None:
        self._event = event or (_cuda_event if device.type == "cuda" else None)
        self._events: list[tuple[Part | None, Event]] = []
        self._last = 0.0
        self._seconds: defaultdict[Part, float] = defaultdict(float)

    def start(self) -> None:
        """What follows, up to the next mark, is of a part again."""
        self._record(None) if self._event else self._note(None)

    def mark(self, part: Part) -> None:
        """What was done since the last mark was this part."""
        self._record(part) if self._event else self._note(part)

    def seconds(self) -> dict[Part, float]:
        """All of each part so far."""
        self._fold(len(self._events))
        return {part: self._seconds[part] for part in ("forward", "backward", "optimizer")}

    def _note(self, part: Part | None) -> None:
        now = time.perf_counter()
        if part is not None:
            self._seconds[part] += now - self._last
        self._last = now

    def _record(self, part: Part | None) -> None:
        assert self._event is not None  # noqa: S101
        event = self._event()
        event.record()
        self._events.append((part, event))
        if len(self._events) > _MOST_EVENTS:
            self._fold(_MOST_EVENTS // 2)  # hundreds of steps ago: the device is past them

    def _fold(self, count: int) -> None:
        """Sum up the first `count` events; the last of them is kept, where the next part begins."""
        if count < 2:
            return
        done, self._events = self._events[:count], self._events[count - 1 :]
        done[-1][1].synchronize()
        for (_, before), (part, event) in pairwise(done):
            if part is not None:
                self._seconds[part] += before.elapsed_time(event) / 1e3


def _cuda_event() -> Event:
    return cast(Event, torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
