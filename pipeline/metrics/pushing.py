"""Numbers to a Pushgateway: for jobs that may end between two scrapes, or that no Prometheus reaches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPException

from prometheus_client import CollectorRegistry, delete_from_gateway, push_to_gateway

from pipeline.console import duration, tell

PERIOD_SECONDS = 5.0
JOB = "lathe"
"""The Pushgateway's own label `job` of all groups."""
_TIMEOUT_SECONDS = 5.0
_LAST_TIMEOUT_SECONDS = 1.0  # of a process that is being ended


class Pusher:
    """Replaces this process's group every few seconds, from a thread of its own.

    A gateway that is away is told of once, as is its return, and is no error.

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
        self._away_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-push", daemon=True)
        self._thread.start()

    def close(self, *, failed: bool = False, stopped: bool = False) -> None:
        """Push once more; then delete the group, once a scrape may have seen it.

        Args:
            failed: the group is kept, for who looks for the cause.
            stopped: the group is deleted at once: the process has no time to linger.
        """
        timeout = _LAST_TIMEOUT_SECONDS if failed or stopped else _TIMEOUT_SECONDS
        self._ended.set()
        self._thread.join(timeout)
        if not stopped and (not self._push(timeout) or failed):
            return
        if not stopped and self._linger_seconds:
            tell(f"metrics: their last values stay at the Pushgateway for {duration(self._linger_seconds)}")
            time.sleep(self._linger_seconds)
        self._ask(partial(delete_from_gateway, self._url, JOB, self._labels, timeout))

    def _run(self) -> None:
        while True:
            self._push(_TIMEOUT_SECONDS)
            if self._ended.wait(PERIOD_SECONDS):
                return

    def _push(self, timeout: float) -> bool:
        return self._ask(partial(push_to_gateway, self._url, JOB, self._registry, self._labels, timeout))

    def _ask(self, request: Callable[[], None]) -> bool:
        try:
            request()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: of an answer that is no HTTP
            if self._away_since is None:
                self._away_since = time.monotonic()
                tell(f"metrics: the Pushgateway {self._url} takes nothing ({error}); it is tried again")
            return False
        if self._away_since is not None:
            tell(f"metrics: the Pushgateway is back after {duration(time.monotonic() - self._away_since)}")
            self._away_since = None
        return True
