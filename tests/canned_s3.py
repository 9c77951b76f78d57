"""A server that answers as a test says: no package offers an S3 that is busy, lies or breaks off."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """What was asked."""

    path: str
    headers: Mapping[str, str]

    @property
    def range(self) -> str:
        """As `5-9`; empty where the whole object was asked for."""
        return self.headers.get("Range", "").removeprefix("bytes=")


@dataclass(frozen=True)
class Answer:
    """What is answered; the connection is closed behind it."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""  # or its pieces
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Content-Length is that of the bytes, unless another is told here; None = there is none."""


def part_of(data: bytes, request: Request) -> Answer:
    """What was asked for of an object, as S3 sends it."""
    if not request.range:
        return Answer(200, data)
    found = re.fullmatch(r"(\d+)-(\d*)", request.range)
    assert found is not None
    first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    if first > last:
        return Answer(416, b"<Error><Code>InvalidRange</Code></Error>")
    return Answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


@contextmanager
def canned_s3(answer: Callable[[Request], Answer]) -> Iterator[dict[str, str]]:
    """Serves until the end of the block; yields the environment with which it is reached."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answer(Request(self.path, dict(self.headers)))
            length = str(len(found.body)) if isinstance(found.body, bytes) else None
            pieces = [found.body] if isinstance(found.body, bytes) else found.body
            self.send_response(found.status)
            for name, value in {"Content-Length": length, **found.headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(OSError):
                    for piece in pieces:
                        self.wfile.write(piece)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
        }
    finally:
        server.shutdown()
        server.server_close()
