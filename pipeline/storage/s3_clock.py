"""The server's clock, by the Date header of its answers."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any


class ServerClock:
    """What the last answer told, a refusal too."""

    def __init__(self) -> None:
        self._dated: tuple[str, float] | None = None  # its time, and ours then

    def note(self, parsed: dict[str, Any], **_: Any) -> None:
        """For botocore's `after-call`."""
        if said := parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"):
            self._dated = said, time.time()

    def forget(self) -> None:
        """So that `seconds_ahead` is that of an answer from now on."""
        self._dated = None

    @property
    def seconds_ahead(self) -> float | None:
        """By how much it was ahead of ours, to about a second; None = no answer, or one that told no time."""
        try:
            return None if self._dated is None else parsedate_to_datetime(self._dated[0]).timestamp() - self._dated[1]
        except ValueError:
            return None
