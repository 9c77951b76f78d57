"""Manifests whose list of shards is the one that they were made with."""

from __future__ import annotations

import hashlib

from pipeline.data.fold import content_hash
from pipeline.data.manifest import Manifest, parse_manifest
from pipeline.errors import DataError
from pipeline.storage import read_file

_BEGIN, _END = b'\n "shards": [\n', b"\n ]"


def load_sealed_manifest(url: str) -> Manifest:
    """Read a manifest by its full address, for who relies on its content hash: that it tells one order from another.

    Raises:
        StorageError: it is not there.
        DataError: not JSON, of a newer format, a field is missing, or its shards are not those of its content hash.
    """
    data = read_file(url)
    written = _written_content_hash(data)
    manifest = parse_manifest(data, url)
    if manifest.content_hash != written and manifest.content_hash != content_hash(manifest.shards):
        raise DataError(
            f"{url} was changed by hand: its list of shards is not the one that its content_hash was made of",
            "take data out with `lathe remove` or with share and keys of a data set; `lathe encode` writes it anew",
        )
    return manifest


def _written_content_hash(data: bytes) -> str:
    """`content_hash` from the bytes of a manifest as it writes itself, in a tenth of the time; of others, nonsense."""
    begin = data.find(_BEGIN)
    shards = data[begin + len(_BEGIN) : data.find(_END, begin)]
    # One level of indentation less, and a line's end in place of the commas between them.
    return hashlib.sha256(shards[2:].replace(b"\n  ", b"\n").replace(b"\n},\n{", b"\n}\n{") + b"\n").hexdigest()
