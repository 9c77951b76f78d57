"""Numbers to a Pushgateway: for jobs that may end between two scrapes, or that no Prometheus reaches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPException

from prometheus_client import CollectorRegistry, delete_from_gateway, push_to_gateway

from pipeline.console import duration, tell
from pipeline.metrics.numbers import clean

PERIOD_SECONDS = 5.0
JOB = "lathe"
"""The Pushgateway's own label `job` of all groups."""
ANSWER_SECONDS = 5.0
"""So long a gateway has for a whole answer, and a job that ends for its last words to it, without `linger_seconds`."""
LAST_ANSWER_SECONDS = 1.0
"""The same of a process that is being ended."""
_LOOK_SECONDS = 0.2  # whether to hurry
_LATE = "no whole answer in time"


class Pusher:
    """Replaces this process's group every few seconds, from a thread of its own.

    A gateway that is away, or does not finish an answer, is told of once, as is its return, and is no error.

    Args:
        url: the gateway's.
        registry: what is pushed.
        labels: of the group, beside `job`: no other process has the same.
        linger_seconds: for which the last numbers stay before they are deleted.
    """

    def __init__(
        self,
        url: str,
        registry: CollectorRegistry,
        labels: Mapping[str, str],
        *,
        linger_seconds: float = 0.0,
    ) -> None:
        self._url, self._registry, self._labels = url, registry, dict(labels)
        self._linger_seconds = linger_seconds
        self._asking: threading.Thread | None = None
        self._silence_told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-push", daemon=True)
        self._thread.start()

    def close(
        self, *, failed: bool = False, stopped: bool = False, hurried: Callable[[], bool] = lambda: False
    ) -> None:
        """Push once more; then delete the group, once a scrape may have seen it.

        Args:
            failed: the group is kept, for who looks for the cause.
            stopped: the group is deleted at once: the process has no time to linger.
            hurried: whether it has none any more.
        """
        seconds = LAST_ANSWER_SECONDS if failed or stopped else ANSWER_SECONDS
        deadline = time.monotonic() + seconds
        self._ended.set()
        self._thread.join(seconds / 2)  # a push that is slow would bring the group back
        if not stopped:
            problem = self._push(deadline)
            if problem is not None:
                self._tell_of_silence(problem)
            if problem is not None or failed:
                return
            if self._linger_seconds:
                tell(f"metrics: their last values stay at the Pushgateway for {duration(self._linger_seconds)}")
                scraped = time.monotonic() + self._linger_seconds
                while (left := scraped - time.monotonic()) > 0 and not hurried():
                    time.sleep(min(left, _LOOK_SECONDS))
                deadline = time.monotonic() + seconds
        problem = self._problem(partial(delete_from_gateway, self._url, JOB, self._labels, seconds), deadline)
        if problem is not None:
            self._tell_of_silence(problem)

    def _tell_of_silence(self, problem: str) -> None:
        if not self._silence_told:
            self._silence_told = True
            tell(
                f"metrics: the Pushgateway {self._url} was not told of the end ({problem}): it keeps what it has of us"
            )

    def _run(self) -> None:
        """Push until the end; that the gateway goes, and comes back, is told once each."""
        away_since: float | None = None
        while True:
            now = time.monotonic()
            problem = self._push(now + ANSWER_SECONDS)
            if problem is None and away_since is not None:
                tell(f"metrics: the Pushgateway is back after {duration(time.monotonic() - away_since)}")
                away_since = None
            elif problem is not None and away_since is None:
                away_since = now
                tell(f"metrics: the Pushgateway {self._url} takes nothing ({problem}); it is tried again")
            if self._ended.wait(PERIOD_SECONDS):
                return

    def _push(self, deadline: float) -> str | None:
        request = partial(push_to_gateway, self._url, JOB, self._registry, self._labels, ANSWER_SECONDS)
        return self._problem(request, deadline)

    def _problem(self, request: Callable[[], None], deadline: float) -> str | None:
        """Of a request; None = it was answered. One that takes longer is left to itself: time-outs are of each read."""
        answers: list[str | None] = []

        def ask() -> None:
            try:
                request()
                answers.append(None)
            except (OSError, HTTPException, ValueError) as error:  # ValueError: of an answer that is no HTTP
                answers.append(clean(str(error) or type(error).__name__))

        if self._asking is not None and self._asking.is_alive() and not self._ended.is_set():
            return _LATE  # one that is never finished is enough
        self._asking = threading.Thread(target=ask, name="metrics-ask", daemon=True)
        try:
            self._asking.start()
        except RuntimeError as error:  # no thread is to be had
            return clean(str(error))
        self._asking.join(max(0.0, deadline - time.monotonic()))
        return answers[0] if answers else _LATE
