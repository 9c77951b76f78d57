"""`lathe remove`: take samples down from a finished data set without encoding anew.

The samples are noted in `removed.txt` first, so that a later `lathe encode` leaves them out too. Then the receipt of
each latent shard that holds one is written without it, and behind it the shard: so the receipt's checksum tells whether
what a killed run has left is sound. Last comes the manifest. Whoever is killed on the way runs the same command again.
No worker may be encoding into the data set meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO, TypeVar

import numpy as np

from pipeline.data.fold import fold, provenance
from pipeline.data.manifest import (
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    REMOVED,
    Manifest,
    Receipt,
    key_hash,
    load_manifest,
    load_receipt,
)
from pipeline.encode.overlap import mapped
from pipeline.encode.rejects import reject_lines
from pipeline.encode.takedown.keys import REASON, Takedown, read_takedown
from pipeline.encode.takedown.shard import without
from pipeline.errors import DataError, StorageError
from pipeline.storage import Store, open_store, read_file, split, temporary_folder

_READERS = 16
_WRITERS = 4  # shards at once, each in memory twice
Progress = Callable[[int, int, str], None]  # done, total, a few words


@dataclass(frozen=True)
class RemoveSummary:
    """What was taken down, or, on a dry run, would be."""

    removed: int  # samples that were still there
    already: int  # lines whose samples were left out or taken down before
    unknown: tuple[str, ...]  # lines that no sample has
    shards: int  # rewritten
    siblings: tuple[str, ...]  # manifests of other resolutions beside this one
    dry_run: bool = False

    def __str__(self) -> str:
        said = f"{self.removed} samples {'would be ' if self.dry_run else ''}taken down from {self.shards} shards"
        if self.already:
            said += f"; {self.already} keys were left out before"
        if self.unknown:
            said += f"; {len(self.unknown)} keys are of no sample here: {', '.join(map(repr, self.unknown[:3]))}"
            said += ", ..." if len(self.unknown) > 3 else ""
        if self.siblings:
            said += f"\n  other resolutions still have them, run it for these too: {', '.join(self.siblings)}"
        return said


def read_keys(url: str) -> list[str]:
    """Lines of a file of keys, local or on S3: KEY, or SHARD<TAB>KEY with the image shard's name.

    Raises:
        DataError: it is not UTF-8, or has no line.
        StorageError: it cannot be read.
    """
    try:
        lines = [line.rstrip("\r") for line in read_file(url).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8", "save it as UTF-8, one key a line") from error
    if not any(lines):
        raise DataError(f"{url} names no key", "write one a line: KEY, or SHARD<TAB>KEY")
    return [line for line in lines if line]


def remove(
    manifest_url: str,
    keys: Iterable[str],
    *,
    dry_run: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> RemoveSummary:
    """Take samples down. Run twice it changes nothing more; killed, it goes on where it was.

    Args:
        manifest_url: address of `manifest.json`.
        keys: KEY, which is looked for in all shards, or SHARD<TAB>KEY with the image shard's name.
        dry_run: write nothing, only tell.
        progress: called after each rewritten shard with (done, total, a few words).

    Raises:
        DataError: a shard is damaged; or a key is not UTF-8, or no sample would be left to train on: then nothing is
            written.
        StorageError: something cannot be read or written.
    """
    manifest, store = load_manifest(manifest_url), open_store(split(manifest_url)[0])
    asked, noted = list(dict.fromkeys(keys)), read_takedown(store)
    takedown = noted | Takedown(asked)
    survey = _Survey(asked, takedown, {entry.name: entry.size for entry in store.list()})
    for receipt in _receipts(store, manifest):
        survey.add(receipt, is_listed=True)
    survey.check()
    for receipt in _unlisted(store, manifest, survey.sizes):
        survey.add(receipt, is_listed=False)
    if not dry_run:
        if takedown.to_bytes() != noted.to_bytes():
            store.write(REMOVED, takedown.to_bytes())
        with ThreadPoolExecutor(_WRITERS, "remove") as pool:
            rewritten = mapped(pool, partial(_rewrite, store, takedown), survey.touched, ahead=_WRITERS)
            for done, name in enumerate(rewritten, 1):
                progress(done, len(survey.touched), name)
        _refold(store, manifest_url, manifest)
    known = survey.found | survey.already
    return RemoveSummary(
        removed=survey.removed,
        already=len(survey.already),
        unknown=tuple(line for line in asked if line not in known),
        shards=len(survey.touched),
        siblings=tuple(_siblings(store, manifest)),
        dry_run=dry_run,
    )


@dataclass
class _Survey:
    """Which shards hold what is asked for; no shard is read for it."""

    asked: list[str]
    takedown: Takedown
    sizes: Mapping[str, int]  # of the files that are there
    touched: list[str] = field(default_factory=list)  # names of receipts
    removed: int = 0  # samples
    found: set[str] = field(default_factory=set)  # lines asked for
    already: set[str] = field(default_factory=set)
    _left: int = 0  # training samples that stay

    def __post_init__(self) -> None:
        self._lines: dict[int, list[tuple[str, str]]] = {}  # hash -> shard or nothing, line
        for line in self.asked:
            shard, _, key = line.partition("\t") if "\t" in line else ("", "", line)
            self._lines.setdefault(key_hash(key), []).append((shard, line))

    def add(self, receipt: Receipt, *, is_listed: bool) -> None:
        """Take in one receipt, of which the manifest knows or not."""
        keys, hashes = self.takedown.keys(receipt.source), receipt.hashes()
        hit = np.fromiter((hashed in keys for hashed in hashes), bool, len(hashes))
        self.removed += int(hit.sum())
        if is_listed:
            self._left += sum(int((~hit[first:end]).sum()) for first, end in receipt.ranges("train"))
        if hit.any() or self._is_halfway(receipt):
            self.touched.append(receipt.shard + RECEIPT_SUFFIX)
        for number in np.flatnonzero(hit):
            self.found.update(self._asked(hashes[number], receipt.source))
        for reject in receipt.rejects:
            self.already.update(self._asked(key_hash(reject.key), receipt.source))

    def _is_halfway(self, receipt: Receipt) -> bool:
        """Whether a run was killed that had written this receipt and not yet its shard."""
        size = self.sizes.get(receipt.shard, receipt.bytes)
        return size != receipt.bytes and any(reject.reason == REASON for reject in receipt.rejects)

    def check(self) -> None:
        """Raises DataError where nothing would be left."""
        if not self._left:
            raise DataError(
                "with these keys taken down no picture would be left to train on",
                "check the keys; to drop the whole data set, delete its folder",
            )

    def _asked(self, hashed: int, source: str) -> Iterator[str]:
        return (line for shard, line in self._lines.get(hashed, ()) if shard in ("", source))


def _receipts(store: Store, manifest: Manifest) -> Iterator[Receipt]:
    """Receipts in the manifest's order, a few in memory. Raises DataError where one is of another encoding."""
    digest = manifest.fingerprint.digest()
    for receipt in _loaded(partial(load_receipt, store), [shard.receipt for shard in manifest.shards]):
        if receipt.fingerprint != digest:
            raise DataError(
                f"{store.url}: the receipt of {receipt.shard} is of another fingerprint than the manifest",
                "run `lathe verify`, which tells what does not belong there",
            )
        yield receipt


def _unlisted(store: Store, manifest: Manifest, names: Iterable[str]) -> Iterator[Receipt]:
    """Receipts of this encoding that the manifest lacks: a job that adds image shards would go on from them."""
    digest, listed = manifest.fingerprint.digest(), {shard.receipt for shard in manifest.shards}

    def load(name: str) -> Receipt | None:
        if digest.encode() not in store.read(name):  # it may be of another format, and no concern of ours
            return None
        receipt = load_receipt(store, name)
        return receipt if (receipt.fingerprint, receipt.shard + RECEIPT_SUFFIX) == (digest, name) else None

    others = sorted(name for name in names if name.endswith(RECEIPT_SUFFIX) and name not in listed)
    yield from (receipt for receipt in _loaded(load, others) if receipt)


_Loaded = TypeVar("_Loaded")


def _loaded(load: Callable[[str], _Loaded], names: Iterable[str]) -> Iterator[_Loaded]:
    with ThreadPoolExecutor(_READERS, "receipts") as pool:
        yield from mapped(pool, load, names, ahead=4 * _READERS)


def _rewrite(store: Store, takedown: Takedown, name: str) -> str:
    """One receipt, then its shard. Until the shard is there, the size tells that the two do not belong together."""
    receipt = load_receipt(store, name)
    data, changed = without(store.read(receipt.shard), receipt, takedown.keys(receipt.source))
    if changed != receipt:
        store.write(name, changed.to_bytes())
    store.write(receipt.shard, data)
    return receipt.shard


def _refold(store: Store, url: str, manifest: Manifest) -> None:
    """The manifest from the receipts that are there now; it comes last, and is written only where it changes."""
    with temporary_folder("remove") as folder:
        path = folder / REJECTS
        with path.open("w", encoding="ascii") as lines:
            changed = fold(_noting(_receipts(store, manifest), lines), provenance(manifest))
        if changed != manifest:
            store.upload(path, REJECTS)
            store.write(split(url)[1], changed.to_bytes())


def _noting(receipts: Iterable[Receipt], lines: TextIO) -> Iterator[Receipt]:
    for receipt in receipts:
        lines.writelines(reject_lines(receipt))
        yield receipt


def _siblings(store: Store, manifest: Manifest) -> Iterator[str]:
    """Manifests of the other resolutions of one job, which stand in folders beside this one's."""
    try:
        parent, own = split(store.url)
    except StorageError:
        return
    if own != str(manifest.fingerprint.resolution):
        return
    for entry in open_store(parent).list():
        folder, _, name = entry.name.partition("/")
        if name == MANIFEST and folder.isdigit() and folder != own:
            yield f"{parent.rstrip('/')}/{entry.name}"
