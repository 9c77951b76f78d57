"""How long S3 may take: the silence that is borne, and the rate below which a request is asked for again.

Silence is counted anew with every byte, so a connection that trickles is never silent. Hence the second limit, for a
whole request: a time to begin, and more for each byte at the lowest rate.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage.base import GIVE_UP_VARIABLE, RETRY_VARIABLE
from pipeline.storage.s3_errors import RATE_VARIABLE, Kind, S3Error

_PROMPT = {"get_object", "head_object", "head_bucket", "put_object", "upload_part"}
_LEAST_SILENCE_SECONDS = 2.0  # a busy machine of ours is silent too
_MOST_SILENCE_SECONDS = 60.0
_LEAST_BEGIN_SECONDS = 5.0
_WORK_SECONDS = 600.0  # a server that puts an upload together sends blanks meanwhile, for minutes


@dataclass(frozen=True)
class Pace:
    """What is asked of a server.

    Attributes:
        retry_seconds: how long faults that pass are waited for, as most commands have it.
        least_rate: bytes a second of each request; 0 = any.
        give_up_seconds: how long they are by whoever uses this.
    """

    retry_seconds: float
    least_rate: float
    give_up_seconds: float

    @property
    def silence_seconds(self) -> float:
        """For objects: a quarter of the retry time, so that several connections that were dropped can be met in a row.

        S3 begins to answer within a second; 15 s, the default, is what a disk server under load takes at worst.
        """
        return _within(_LEAST_SILENCE_SECONDS, self.retry_seconds / 4, _MOST_SILENCE_SECONDS)

    @property
    def working_seconds(self) -> float:
        """The same where the server has work to do first, for listings, deletions and uploads: half of it."""
        return _within(_LEAST_SILENCE_SECONDS, self.retry_seconds / 2, _MOST_SILENCE_SECONDS)

    def seconds(self, method: str, length: int) -> float | None:
        """What a whole request may take that brings or takes `length` bytes; None = any time."""
        if not self.least_rate:
            return None
        if method not in _PROMPT:
            return _WORK_SECONDS
        begin = _within(_LEAST_BEGIN_SECONDS, self.retry_seconds / 2, _MOST_SILENCE_SECONDS)
        return begin + length / self.least_rate

    def be_prompt(self, context: dict[str, Any], model: Any, **_: Any) -> None:
        """For botocore's `provide-client-params`: reading objects, a request may be silent for less time than else.

        Releases of aiobotocore that know no time-out of single requests pass it over.
        """
        if model.name in ("GetObject", "HeadObject", "HeadBucket"):
            context["read_timeout"] = self.silence_seconds


class Deadline:
    """The time that one request may take, as an asynchronous context. When it is over, S3Error is raised, Kind.SLOW.

    Args:
        pace: what is asked of the server.
        method: of botocore's S3 API.
        request: its arguments.
    """

    def __init__(self, pace: Pace, method: str, request: Mapping[str, Any]) -> None:
        self._method, self._rate = method, pace.least_rate
        self._sent = len(request.get("Body", b""))
        first, _, last = request.get("Range", "").removeprefix("bytes=").partition("-")
        self._asked = int(last) + 1 - int(first) if last else 0
        self._expected, self._came = self._sent or self._asked, 0
        self._seconds = pace.seconds(method, self._expected)
        self._timeout = asyncio.timeout(self._seconds)

    def came(self, piece: bytes) -> bytes:
        """A piece of the answer's body, which is given back. More than was known of has its time too."""
        self._came += len(piece)
        more = self._came - self._expected
        if more > 0 and self._seconds is not None and (when := self._timeout.when()) is not None:
            self._expected += more
            self._seconds += more / self._rate
            self._timeout.reschedule(when + more / self._rate)
        return piece

    async def __aenter__(self) -> Deadline:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise S3Error(Kind.SLOW, self._said(), answered=True) from late

    def _said(self) -> str:
        if not self._expected:
            return f"no whole answer within {self._seconds:.0f} s"
        came = f"{self._came} of {self._asked}" if self._came < self._asked else f"{self._came}"
        what = f"{self._sent} bytes were not taken" if self._sent else f"{came} bytes came"
        return f"{what} within {self._seconds:.0f} s, less than {self._rate / 1024:g} KiB/s"


def pace(given: Mapping[str, str]) -> Pace:
    """As the variables say, those `given` before the process's own.

    Raises:
        ConfigError: one is no number.
    """
    retry = _number(given, RETRY_VARIABLE, 60, "of seconds")
    rate = 1024 * _number(given, RATE_VARIABLE, 16, "of KiB/s")
    return Pace(retry, rate, float(given.get(GIVE_UP_VARIABLE, retry)))


def _number(given: Mapping[str, str], name: str, default: float, what: str) -> float:
    said = given.get(name) or os.environ.get(name, str(default))
    try:
        number = float(said)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name}={said!r} is not a number {what}", f"write {name}={default:g}")
    return number


def _within(least: float, value: float, most: float) -> float:
    return max(least, min(value, most))
