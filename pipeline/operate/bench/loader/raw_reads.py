"""Bare range requests to S3: nothing is parsed, checked or kept. A program of its own that imports nothing of Lathe.

    python raw_reads.py '{"bucket": "...", "prefix": "...", "ranges": FILE, "requests": 16}'

`epoch` asks for all ranges in their order, so many at once, over one pool of connections.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session


async def read_all(client: Any, work: dict[str, Any], ranges: Iterator[tuple[str, int, int]]) -> int:
    """The bytes that came; `work["requests"]` tasks take the next range each."""

    async def one() -> int:
        received = 0
        for name, start, end in ranges:
            answer = await client.get_object(
                Bucket=work["bucket"], Key=work["prefix"] + name, Range=f"bytes={start}-{end - 1}"
            )
            async with answer["Body"] as body:
                received += len(await body.read())
        return received

    return sum(await asyncio.gather(*(one() for _ in range(work["requests"]))))


async def main() -> None:
    """Answer each `epoch` on standard input with a line of JSON."""
    work = json.loads(sys.argv[1])
    ranges = json.loads(Path(work["ranges"]).read_text(encoding="utf-8"))
    session, config = get_session(), AioConfig(max_pool_connections=work["requests"])
    async with session.create_client("s3", config=config) as client:
        for _ in sys.stdin:
            begun = time.perf_counter()
            received = await read_all(client, work, iter(ranges))
            answer = {"samples": work["samples"], "bytes": received, "seconds": time.perf_counter() - begun}
            print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
