"""`rejects.jsonl`: one line for each sample that was left out, in the order of the manifest's shards."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pipeline.data.manifest import Receipt


def reject_lines(receipt: Receipt) -> Iterator[str]:
    """The lines of one shard, each with its newline."""
    for reject in receipt.rejects:
        yield json.dumps({"shard": receipt.source, "key": reject.key, "reason": reject.reason}) + "\n"
