"""What stands beside the latent shards, held against the manifest: the manifest itself, the rest of its folder."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.data.fold import content_hash
from pipeline.data.manifest import (
    EMPTY_PREFIX,
    ENCODING,
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    REMOVED,
    Manifest,
    Receipt,
    load_receipt,
)
from pipeline.encode.claim import Encoding
from pipeline.encode.rejects import reject_lines
from pipeline.encode.verify.report import Notes
from pipeline.encode.verify.sample import SampleCheck, size_text, text_rules
from pipeline.encode.verify.text import EMPTY_PROMPT, TextCheck, Texts
from pipeline.errors import LatheError, StorageError
from pipeline.storage import Store, open_stream

Sizes = Mapping[str, int]  # of the files in the manifest's folder, in bytes
_SHOWN = 200  # bytes of a line of rejects.jsonl


def check_manifest(manifest: Manifest, notes: Notes) -> None:
    """Whether the manifest agrees with itself."""

    def fail(said: str) -> None:
        notes.add("manifest", f"{MANIFEST}: {said}")

    if (found := content_hash(manifest.shards)) != manifest.content_hash:
        fail(f"its content hash is {manifest.content_hash[:16]}..., that of its shards {found[:16]}...")
    for name, count in Counter(shard.name for shard in manifest.shards).items():
        if count > 1:
            fail(f"{name} is listed {count} times")
    for shard in manifest.shards:
        if shard.receipt != shard.name + RECEIPT_SUFFIX:
            fail(f"{shard.name} has a receipt of another name, {shard.receipt}")
    for bucket in manifest.fingerprint.buckets:
        if any(side % manifest.downsampling_factor for side in bucket):
            fail(f"bucket {size_text(bucket)} is no multiple of the downsampling factor {manifest.downsampling_factor}")
    if manifest.fingerprint.dtype != "float16":
        fail(f"its latents are {manifest.fingerprint.dtype}, and this Lathe knows float16")


def check_encoding(store: Store, sizes: Sizes, manifest: Manifest, notes: Notes) -> None:
    """Whether the folder was claimed for what the manifest says."""
    if ENCODING not in sizes:
        return  # a copy of the data set may leave it out
    try:
        encoding = Encoding.model_validate_json(store.read(ENCODING))
    except ValidationError:
        notes.add("fingerprint", f"{ENCODING} cannot be read")
        return
    for name in encoding.fingerprint.difference(manifest.fingerprint):
        notes.add("fingerprint", f"{ENCODING}: {name} is another than in {MANIFEST}")
    for name in ("latent_channels", "downsampling_factor", "scaling_factor", "shift_factor"):
        if (one := getattr(encoding, name)) != (other := getattr(manifest, name)):
            notes.add("fingerprint", f"{ENCODING}: {name} is {one}, {MANIFEST} says {other}")


def check_prompt(store: Store, sizes: Sizes, texts: Texts, notes: Notes) -> dict[str, NDArray[Any]]:
    """Whether the empty prompt is there, as the shards have captions; returns it where it is sound."""
    text = TextCheck(texts, notes.add)
    samples = SampleCheck(texts.manifest, "", text, notes.add)
    arrays: dict[str, NDArray[Any]] = {}
    rules = text_rules(texts.manifest, "")
    for stem, rule in rules.items():
        name = f"{EMPTY_PREFIX}{stem}.npy"
        if name not in sizes:
            notes.add("files", f"{name}: missing; it is the empty prompt")
        elif (found := samples.array(name, store.read(name), rule)) is not None:
            arrays[stem] = found
    if len(arrays) < len(rules):
        return {}
    text.check(EMPTY_PROMPT, {"": ""}, arrays)
    return arrays


def check_leftovers(store: Store, sizes: Sizes, manifest: Manifest, pool: Executor, notes: Notes) -> None:
    """What stands in the folders of the data set and is not part of it."""
    listed = {name for shard in manifest.shards for name in (shard.name, shard.receipt)}
    folders = {str(PurePosixPath(name).parent) for name in listed} | {"."}
    known = {MANIFEST, REJECTS, REMOVED, ENCODING, *(f"{EMPTY_PREFIX}{stem}.npy" for stem in text_rules(manifest, ""))}
    extra = [name for name in sizes if name not in listed | known and str(PurePosixPath(name).parent) in folders]
    receipts = [name for name in extra if name.endswith(RECEIPT_SUFFIX)]
    digest = manifest.fingerprint.digest()

    def other_fingerprint(name: str) -> str:
        try:
            found = load_receipt(store, name).fingerprint
        except LatheError as error:
            return error.message
        return "" if found == digest else f"{name}: of fingerprint {found[:16]}..., the manifest's is {digest[:16]}..."

    for said in filter(None, pool.map(other_fingerprint, receipts)):
        notes.add("fingerprint", said)
    for name in extra:
        notes.add("leftovers", f"{name}: {sizes[name]} bytes, not in the manifest", "warn")
    for said in _unfinished(store, folders):
        notes.add("leftovers", said, "warn")


def _unfinished(store: Store, folders: Container[str]) -> Iterator[str]:
    try:
        left = [name for name in store.leftovers() if str(PurePosixPath(name).parent) in folders]
    except StorageError as error:  # a key that may only read files
        yield f"unfinished files cannot be listed: {error.message}"
    else:
        yield from (f"{name}: unfinished; its writer was killed, or is still at work" for name in left)


class RejectsCheck:
    """Holds `rejects.jsonl` against the receipts, given in the manifest's order; the file is read as they come.

    Used as a context, it lets go of the file at its end.
    """

    def __init__(self, store: Store, sizes: Sizes, notes: Notes) -> None:
        self._notes, self._line, self._differs = notes, 0, False
        self._file: io.BufferedReader | None = None
        self.reasons: Counter[str] = Counter()
        if REJECTS not in sizes:
            self._fail(f"{REJECTS}: missing")
            return
        try:
            self._file = io.BufferedReader(open_stream(f"{store.url.rstrip('/')}/{REJECTS}"))
        except StorageError as error:
            self._fail(error.message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def skip(self) -> None:
        """The next receipt is unusable: from here on the lines cannot be compared."""
        self._differs = True

    def add(self, receipt: Receipt) -> None:
        """Take in the next receipt."""
        self.reasons.update(reject.reason for reject in receipt.rejects)
        for wanted in reject_lines(receipt):
            self._line += 1
            found = self._next(len(wanted))
            if not self._differs and found != wanted.encode("ascii"):
                said = found.decode("utf-8", "replace").strip()[:_SHOWN] or "nothing"
                self._fail(f"{REJECTS}: line {self._line} is {said}, the receipts say {wanted.strip()[:_SHOWN]}")

    def finish(self, manifest: Manifest, *, complete: bool) -> None:
        """All receipts were given; where some could not be, nothing is said of what follows from them."""
        if not complete:
            return
        if self._next(1):
            self._fail(f"{REJECTS}: more than the {self._line} lines that the receipts have")
        for reason in sorted({*self.reasons, *manifest.rejects}):
            if (one := self.reasons[reason]) != (other := manifest.rejects.get(reason, 0)):
                self._fail(f"{MANIFEST}: {other} samples are {reason}, the receipts have {one}")

    def _next(self, length: int) -> bytes:
        """The next line, of which little more is read than the bytes that it should have."""
        if self._differs or self._file is None:
            return b""
        try:
            return self._file.readline(max(length + 1, _SHOWN))
        except StorageError as error:
            self._fail(error.message)
            return b""

    def _fail(self, said: str) -> None:
        self._differs = True
        self._notes.add("rejects", said)
