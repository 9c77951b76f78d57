"""One S3 client per process: its event loop and its retries."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import random
import threading
import time
from collections.abc import Mapping
from typing import Any

import s3fs

from pipeline.storage import traffic
from pipeline.storage.s3_clock import ServerClock
from pipeline.storage.s3_errors import PASSING, Kind, S3Error, explain, fault_of, without_secrets
from pipeline.storage.s3_pace import Deadline, Pace, pace
from pipeline.storage.s3_ranges import RangeReader

log = logging.getLogger("lathe.storage")
_MAX_CONNECTIONS = 32
_MAX_DELAY_SECONDS = 5.0
_SLOW_TRIES = 2  # each may take longer than all retries together
# A server that has just come back may refuse keys and buckets until it has read its own tables.
_WARM_UP_SECONDS = 5.0
# Answers that callers look into; every other fault is told to the user.
_TELLING = (Kind.NO_BUCKET, Kind.NO_OBJECT, Kind.NO_UPLOAD, Kind.CONDITION, Kind.RANGE)


class S3Client:
    """Calls of botocore's S3 API, from any thread, with retries.

    s3fs brings credentials and session; its own retries and botocore's are off, since they give up on a refused
    connection after 6 s. It works on an event loop in a thread of its own.
    """

    def __init__(self, pace: Pace, given: Mapping[str, str]) -> None:
        """`given`: AWS_* variables that stand in for the process's own; empty = the standard chain."""
        for name in ("botocore", "aiobotocore"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they announce where they found keys and endpoint
        self._pace = pace
        self._connections = asyncio.Semaphore(_MAX_CONNECTIONS)  # who waits for one has asked for nothing yet
        self._outage = _Outage()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_leave_unclaimed)
        self._thread = threading.Thread(target=self._loop.run_forever, name="lathe-s3", daemon=True)
        self._thread.start()
        self._fs = s3fs.S3FileSystem(
            asynchronous=True,  # closing is ours: s3fs' finalizer would wait for a dead loop in forked children
            skip_instance_cache=True,
            use_listings_cache=False,
            endpoint_url=given.get("AWS_ENDPOINT_URL"),
            key=given.get("AWS_ACCESS_KEY_ID"),
            secret=given.get("AWS_SECRET_ACCESS_KEY"),
            client_kwargs={"region_name": given["AWS_DEFAULT_REGION"]} if "AWS_DEFAULT_REGION" in given else {},
            config_kwargs={
                **({"proxies": {}} if "AWS_ENDPOINT_URL" in given else {}),
                "connect_timeout": 5,
                "read_timeout": pace.working_seconds,  # of single requests, see `Pace.be_prompt`
                "max_pool_connections": _MAX_CONNECTIONS,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
        )
        self._fs.retries = 1
        self.clock = ServerClock()
        self._hooked: tuple[Any, RangeReader] | None = None  # the client, which s3fs makes anew at times

    def call(self, method: str, bucket: str, key: str = "", **arguments: Any) -> dict[str, Any]:
        """One S3 request, repeated while it meets transient faults.

        Returns:
            botocore's answer; its `Body`, if any, has been read and is bytes; `Attempts` counts the requests made.

        Raises:
            S3Error: the server refuses; a missing bucket, object or upload, a condition or range that does not hold.
            StorageError: anything else.
        """
        request = {"Bucket": bucket, **({"Key": key} if key else {}), **arguments}
        trial = _Trial(self._pace.give_up_seconds)
        while True:
            try:
                answer = self._run(method, request)
            except Exception as error:
                fault = error if isinstance(error, S3Error) else fault_of(error)
                fault.attempts = trial.attempts
                cause = error
            else:
                self._outage.end(self.endpoint)
                traffic.count_bytes(read=_length(answer), written=_length(request))
                return {**answer, "Attempts": trial.attempts}
            if not trial.again(fault):
                if fault.kind in _TELLING:
                    raise fault from cause
                traffic.count_error(fault.kind.name.lower())
                raise explain(fault, self.endpoint, bucket, key, trial.waited()) from cause
            traffic.count_retry()
            if fault.kind is Kind.SLOW:
                log.warning("s3://%s/%s: %s; asking again", bucket, key, fault.said)
            elif trial.attempts > 1:
                self._outage.begin(self.endpoint, fault, trial.left())
            trial.pause()

    @property
    def endpoint(self) -> str:
        """The server's address, without user name and password."""
        client = self._fs._s3
        known = (
            client.meta.endpoint_url
            if client is not None
            else os.environ.get("AWS_ENDPOINT_URL", "the default endpoint")
        )
        return without_secrets(known)

    def close(self) -> None:
        """Close the connections and stop the loop."""

        async def leave() -> None:
            requests = asyncio.all_tasks() - {asyncio.current_task()}  # of threads that the process does not wait for
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            if self._fs._s3 is not None:
                await self._fs._s3creator.__aexit__(None, None, None)

        try:
            asyncio.run_coroutine_threadsafe(leave(), self._loop).result(timeout=5)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)
            if not self._thread.is_alive():
                self._loop.close()

    def _run(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            ranges = await self._reader()
            async with self._connections, Deadline(self._pace, method, request) as deadline:
                began = time.perf_counter()
                try:
                    return await self._answer(ranges, method, request, deadline)
                finally:
                    operation = traffic.OPERATIONS.get(method, traffic.OTHER)
                    traffic.count(operation, time.perf_counter() - began)

        future = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _answer(
        self, ranges: RangeReader, method: str, request: dict[str, Any], deadline: Deadline
    ) -> dict[str, Any]:
        if method == "get_object" and request.keys() == {"Bucket", "Key", "Range"}:
            return {"Body": await self._read_range(ranges, request, deadline)}
        answer: dict[str, Any] = await self._fs._call_s3(method, **request)
        if "Body" in answer:
            answer = {**answer, "Body": await ranges.content(answer, request.get("Range"), deadline)}
        return answer

    async def _read_range(self, ranges: RangeReader, request: dict[str, Any], deadline: Deadline) -> bytes:
        """The bytes of a range: directly, or as any other answer where its object is not known or that is refused."""
        place = (request["Bucket"], request["Key"])
        refused = ranges.knows(*place)
        if refused:
            began = time.perf_counter()
            data = await ranges.read(*place, request["Range"], deadline)
            if data is not None:
                return data
            traffic.count("read", time.perf_counter() - began)
        ranges.watch()
        answer = await self._fs._call_s3("get_object", **request)
        data = await ranges.content(answer, request["Range"], deadline)
        ranges.learn(*place, refused=refused)
        return data

    async def _reader(self) -> RangeReader:
        client = await self._fs.set_session()
        if self._hooked is None or self._hooked[0] is not client:
            client.meta.events.register("provide-client-params.s3", self._pace.be_prompt)
            client.meta.events.register("after-call.s3", self.clock.note)
            self._hooked = client, RangeReader(client)
        return self._hooked[1]


def _leave_unclaimed(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of aiohttp's own tasks, when a connection breaks as they write: the request itself tells what happened."""
    log.debug("%s: %r", context["message"], context.get("exception"))


def _length(message: dict[str, Any]) -> int:
    body = message.get("Body", b"")
    return len(body) if isinstance(body, bytes) else 0


class _Trial:
    """One request's attempts: how long to go on, and how long to wait in between."""

    def __init__(self, retry_seconds: float) -> None:
        self.attempts = 1
        self._retry_seconds = retry_seconds
        self._first_fault: float | None = None
        self._last_silence: float | None = None

    def again(self, fault: S3Error) -> bool:
        now = time.monotonic()
        if self._first_fault is None:
            self._first_fault = now
        if fault.kind in PASSING:
            self._last_silence = now
            return self.left() > 0 or (fault.kind is Kind.SLOW and self.attempts < _SLOW_TRIES)
        warming_up = self._last_silence is not None and now - self._last_silence < _WARM_UP_SECONDS
        return warming_up and fault.kind in (Kind.FORBIDDEN, Kind.NO_BUCKET, Kind.NO_OBJECT) and self.left() > 0

    def waited(self) -> float:
        return time.monotonic() - (self._first_fault or time.monotonic())

    def left(self) -> float:
        return self._retry_seconds - self.waited()

    def pause(self) -> None:
        delay = min(_MAX_DELAY_SECONDS, 0.1 * 2**self.attempts) * random.uniform(0.5, 1.0)  # noqa: S311
        time.sleep(max(0.0, min(delay, self.left())))
        self.attempts += 1


class _Outage:
    """So that an outage is logged once, however many threads meet it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None

    def begin(self, endpoint: str, fault: S3Error, left: float) -> None:
        with self._lock:
            if self._since is not None:
                return
            self._since = time.monotonic()
        said = f"answers {fault.said}" if fault.answered else "does not answer"
        log.warning("S3 at %s %s; trying for %.0f s more", endpoint, said, left)

    def end(self, endpoint: str) -> None:
        """A request has succeeded."""
        with self._lock:
            if self._since is None:
                return
            seconds, self._since = time.monotonic() - self._since, None
        log.warning("S3 at %s answers again after %.0f s", endpoint, seconds)


_clients: dict[tuple[object, ...], S3Client] = {}
_lock = threading.Lock()
_of_parent: list[dict[tuple[object, ...], S3Client]] = []


def client(given: Mapping[str, str]) -> S3Client:
    """This process's client for the present AWS_* variables, or for those `given`; made on first use.

    Raises:
        ConfigError: a LATHE_STORAGE_* variable is no number.
    """
    wanted = pace(given)
    settings = tuple(sorted((k, v) for k, v in {**os.environ, **given}.items() if k.startswith("AWS_")))
    with _lock:
        found = _clients.get((wanted, *settings))
        if found is None:
            found = _clients[(wanted, *settings)] = S3Client(wanted, given)
        return found


def _after_fork() -> None:
    """Connections and loop thread belong to the parent: leave them alone, and start anew."""
    global _clients, _lock
    _of_parent.append(_clients)  # kept, so that no destructor runs on them here
    _clients, _lock = {}, threading.Lock()


def _close_all() -> None:
    for open_client in _clients.values():
        open_client.close()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
