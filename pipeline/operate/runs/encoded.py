"""What an encode job has stored: by its manifest where it is finished, else by the receipts of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.manifest import (
    ENCODING,
    FILTERED,
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    Environment,
    Manifest,
    Receipt,
    load_receipt,
    parse_manifest,
)
from pipeline.encode.overlap import mapped
from pipeline.encode.tally import Tally, unwanted
from pipeline.errors import DataError, StorageError
from pipeline.operate.runs.credentials import without_credentials
from pipeline.operate.runs.record import DamagedError, cannot_read, read_or_tell, tree_of
from pipeline.storage import Entry, Store

_READERS = 16
_MOST_EXAMPLES, _EXAMPLE_BYTES = 20, 1 << 16
_MOST_COUNTED = 1 << 63  # bytes, samples
Progress = Callable[[int, int], None]


@dataclass
class Encoded:
    """One resolution of an encode job's output, as far as it is.

    Args:
        store: that holds it.
        folder: within the output; empty = the output itself.
    """

    store: Store
    folder: str = ""
    manifest: Manifest | None = None
    tally: Tally = field(default_factory=Tally)
    bytes: int = 0
    train: int = 0
    holdout: int = 0
    environments: list[Environment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first of the rejected samples: shard, key, reason; none where the job has not finished."""
    _encoding: dict[str, Any] = field(default_factory=dict)
    _unusable: dict[str, str] = field(default_factory=dict)  # receipts -> what is wrong with them
    _seen: dict[str, str] = field(default_factory=dict)  # files that were read -> version

    @property
    def reasons(self) -> tuple[dict[str, int], dict[str, int]]:
        """Samples that could not be used, and those that nobody wanted, by reason; the commonest first."""
        counted = Counter(self.manifest.rejects) if self.manifest else self.tally.reasons
        ranked = counted.most_common()
        return {r: n for r, n in ranked if not unwanted(r)}, {
            r.removeprefix(FILTERED): n for r, n in ranked if unwanted(r)
        }

    @property
    def samples(self) -> int:
        """Of both splits."""
        return self.train + self.holdout

    def read(self, entries: Iterable[Entry], progress: Progress | None = None) -> bool:
        """Count what has come since the last call.

        Args:
            entries: of the output.
            progress: called with (receipts read, receipts to read).

        Returns:
            Whether something has.

        Raises:
            StorageError: the output cannot be read.
        """
        prefix = f"{self.folder}/" if self.folder else ""
        own = {e.name.removeprefix(prefix): e.version for e in entries if e.name.startswith(prefix)}
        receipts = {name: version for name, version in own.items() if name.endswith(RECEIPT_SUFFIX) and "/" not in name}
        beside = {name: own[name] for name in (MANIFEST, ENCODING, REJECTS) if name in own}
        if {**receipts, **beside} == self._seen:
            return False
        self.problems = []
        if not (MANIFEST in beside and self._is_whole(prefix, receipts)):
            self._count(prefix, receipts, progress)
        if ENCODING in beside:
            self._encoding = read_or_tell(self.store, prefix + ENCODING, dict, self.problems) or self._encoding
        self.examples = self._examples(prefix) if REJECTS in beside else []
        self._seen = {**receipts, **beside}
        return True

    def settings(self) -> dict[str, Any]:
        """What its latents mean: the fields of the fingerprint, and the autoencoder."""
        return dict(without_credentials(self.with_credentials()))

    def with_credentials(self) -> dict[str, Any]:
        """The same; to be compared, and never shown."""
        if self.manifest:
            meaning = self.manifest.fingerprint.model_dump(mode="json")
            return {"autoencoder": self.manifest.autoencoder, **meaning}
        made = self._encoding.get("fingerprint")
        return {"autoencoder": self._encoding.get("autoencoder"), **made} if isinstance(made, dict) else {}

    def _examples(self, prefix: str) -> list[dict[str, str]]:
        try:
            data = self.store.read(prefix + REJECTS, 0, _EXAMPLE_BYTES)
        except StorageError as error:
            self.problems.append(cannot_read(self.store, prefix + REJECTS, error))
            return []
        found = []
        for line in data.splitlines()[:_MOST_EXAMPLES]:
            try:
                tree = tree_of(line)
            except DamagedError:  # the end of what was read, or damaged
                continue
            if isinstance(tree, Mapping):
                found.append({part: str(tree.get(part, "")) for part in ("shard", "key", "reason")})
        return found

    def _is_whole(self, prefix: str, receipts: Mapping[str, str]) -> bool:
        """Take the manifest's word for what it lists, unless shards have come since, or it cannot be read."""
        try:
            manifest = parse_manifest(self.store.read(prefix + MANIFEST), f"{self.store.url}/{prefix}{MANIFEST}")
        except DataError as error:
            self.problems.append(error.message)
            return False
        except StorageError as error:
            self.problems.append(cannot_read(self.store, prefix + MANIFEST, error))
            return False
        if not _is_countable([*manifest.rejects.values(), *(shard.bytes for shard in manifest.shards)]):
            self.problems.append(f"{prefix}{MANIFEST} is damaged, and left out")
            return False
        if not receipts.keys() <= {shard.receipt for shard in manifest.shards}:
            return False
        self.manifest, self.environments = manifest, list(manifest.environments)
        self.bytes = sum(shard.bytes for shard in manifest.shards)
        self.train, self.holdout = manifest.samples("train"), manifest.samples("holdout")
        self.tally.shards = len(manifest.shards)
        return True

    def _count(self, prefix: str, receipts: Mapping[str, str], progress: Progress | None) -> None:
        counted = {name: version for name, version in self._seen.items() if name.endswith(RECEIPT_SUFFIX)}
        if self.manifest or not counted.items() <= receipts.items():  # some were written anew: from the start
            self.manifest, self.tally, counted, self.environments, self._unusable = None, Tally(), {}, [], {}
            self.bytes = self.train = self.holdout = 0
        new = sorted(receipts.keys() - counted.keys())
        with ThreadPoolExecutor(_READERS, "receipts") as pool:
            for number, receipt in enumerate(mapped(pool, self._load, [prefix + name for name in new], ahead=64), 1):
                if isinstance(receipt, Receipt):
                    self._add(receipt)
                else:
                    self._unusable[new[number - 1]] = receipt
                if progress:
                    progress(number, len(new))
        self.problems += self._unusable.values()

    def _load(self, name: str) -> Receipt | str:
        """A receipt, or what is wrong with it."""
        try:
            receipt = load_receipt(self.store, name)
        except DataError as error:
            return error.message
        except StorageError as error:
            return cannot_read(self.store, name, error)
        counts = [count for bucket in receipt.buckets for count in (*bucket.train, *bucket.holdout)]
        return receipt if _is_countable([receipt.bytes, *counts]) else f"{name} is damaged, and left out"

    def _add(self, receipt: Receipt) -> None:
        self.tally.add(receipt)
        self.bytes += receipt.bytes
        self.train += sum(bucket.train[1] - bucket.train[0] for bucket in receipt.buckets)
        self.holdout += sum(bucket.holdout[1] - bucket.holdout[0] for bucket in receipt.buckets)
        if receipt.environment not in self.environments:
            self.environments.append(receipt.environment)


def _is_countable(counts: Iterable[int]) -> bool:
    return all(0 <= count < _MOST_COUNTED for count in counts)
