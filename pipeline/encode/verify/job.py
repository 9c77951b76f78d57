"""`lathe verify`: does a latent data set hold what its manifest says, and are its latents those of its pictures?

The shards are read through once, several at a time, one block of each in memory. Nothing in the data set is changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from statistics import mean
from typing import Any

from pipeline.data.fold import fold, provenance
from pipeline.data.manifest import Receipt, load_manifest, load_receipt
from pipeline.encode.overlap import mapped
from pipeline.encode.takedown.keys import read_takedown
from pipeline.encode.verify.entry import EntryCheck, Looked
from pipeline.encode.verify.files import (
    RejectsCheck,
    check_encoding,
    check_leftovers,
    check_manifest,
    check_prompt,
)
from pipeline.encode.verify.keys import Draw, KeyIndex, Place
from pipeline.encode.verify.pictures import PictureCheck, check_quality, find_autoencoder, find_pictures, sheet
from pipeline.encode.verify.report import REMEDIES, Check, Notes, VerifyReport
from pipeline.encode.verify.sample import Parts, SampleCheck, Stored, read_sample, stored_sample
from pipeline.encode.verify.text import TextCheck, Texts, find_texts
from pipeline.errors import DataError, LatheError
from pipeline.storage import open_store, split

SHEET = "verify.png"
REPORT = "verify.json"
DECODED = 8  # samples, where their number is not given
Progress = Callable[[int, int, str], None]  # done, total, a few words


def verify(
    manifest_url: str,
    *,
    images: str | Sequence[str] | None = None,
    autoencoder: str | None = None,
    decode: int | None = None,
    output: str | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Progress = lambda done, total, note: None,
) -> VerifyReport:
    """Hold a whole data set against its manifest.

    Args:
        manifest_url: address of `manifest.json`.
        images: where the image shards are, where they have moved since; see `images.shards` of a run file.
        autoencoder: where the autoencoder is, where it has moved since.
        decode: samples that are held against their source pictures, spread over the buckets; 0 = none, None = 8 where
            pictures and autoencoder are in reach.
        output: folder or `s3://` prefix for the report, `verify.json`, and the contact sheet, `verify.png`.
        quick: look at manifest, receipts and sizes only, and read of the shards no more than the samples compared.
        seed: draws the samples that are compared.
        progress: called after each shard with (shards done, shards, a few words).

    Returns:
        Every check with what it found. A check that fails raises nothing.

    Raises:
        DataError: what stands at `manifest_url` is no manifest.
        StorageError: it is not there, or the store cannot be reached.
    """
    began = time.monotonic()
    job = _Verification(manifest_url, quick, DECODED if decode is None else decode, seed)
    store = None if output is None else open_store(output)

    def report() -> VerifyReport:
        made = VerifyReport(manifest_url, quick, time.monotonic() - began, job.bytes, job.checks())
        if store is not None:
            store.write(REPORT, made.to_json().encode())
        return made

    job.look(progress)
    report()  # whatever comes between, this much is written
    job.compare(images, autoencoder, wanted=decode is not None)
    if store is not None and job.sheet is not None:
        store.write(SHEET, job.sheet)
    return report()


class _Verification:
    """One data set on its way through the checks."""

    def __init__(self, url: str, quick: bool, samples: int, seed: int) -> None:
        self._manifest, self._store, self._quick = load_manifest(url), open_store(split(url)[0]), quick
        self._digest = self._manifest.fingerprint.digest()
        self._sizes = {entry.name: entry.size for entry in self._store.list()}
        self._takedown = read_takedown(self._store)
        self._notes, self._keys, self._draw = Notes(), KeyIndex(), Draw(samples, seed)
        self._rejects = RejectsCheck(self._store, self._sizes, self._notes)
        self._samples, self._receipts, self._numbers, self._captions, self.bytes = samples, 0, 0, 0, 0
        self._drawn: list[Stored] = []
        self._compared: list[dict[str, Any]] | None = None  # not yet
        self._sources: dict[str, str] = {}
        self.sheet: bytes | None = None  # PNG

    def look(self, progress: Progress) -> None:
        """Everything but the comparison with the pictures."""
        manifest, notes = self._manifest, self._notes
        check_manifest(manifest, notes)
        check_encoding(self._store, self._sizes, manifest, notes)
        texts = find_texts(manifest, notes)
        texts = replace(texts, empty=check_prompt(self._store, self._sizes, texts, notes))
        workers = min(8, 2 * (os.cpu_count() or 1))
        with ThreadPoolExecutor(workers, "verify") as pool:
            check_leftovers(self._store, self._sizes, manifest, pool, notes)
            entries = EntryCheck(texts, self._store, self._sizes, self._takedown, quick=self._quick)
            with self._rejects:
                self._refold(self._gather(mapped(pool, entries.look, manifest.shards, ahead=2 * workers), progress))
                self._rejects.finish(manifest, complete=self._receipts == len(manifest.shards))
            self._name_repeated(pool)
        self._read_drawn(texts)

    def _gather(self, results: Iterator[Looked], progress: Progress) -> Iterator[Receipt]:
        """The usable receipts, in the manifest's order."""
        total = len(self._manifest.shards)
        for number, looked in enumerate(results):
            self._notes.merge(looked.notes)
            self._keys.add(looked.hashes)
            self.bytes += looked.bytes
            self._numbers += looked.numbers
            self._captions += looked.captions
            if looked.receipt is not None:
                self._receipts += 1
                self._draw.add(number, looked.receipt)
                self._rejects.add(looked.receipt)
                yield looked.receipt
            else:
                self._rejects.skip()
            progress(number + 1, total, f"{self.bytes / 1e6:.0f} MB read" if self.bytes else "")

    def _refold(self, receipts: Iterator[Receipt]) -> None:
        """The receipts give the manifest that is there."""
        manifest = self._manifest
        try:
            again = fold(receipts, provenance(manifest))
        except (DataError, ValueError, OverflowError) as error:
            for _ in receipts:
                pass
            said = error.message if isinstance(error, DataError) else "the receipts give sums that cannot be"
            self._notes.add("statistics", said)
            return
        if self._receipts < len(manifest.shards):
            return  # told already, and the sums cannot be the same
        for name in ("mean", "std"):
            for channel, (one, other) in enumerate(zip(getattr(again, name), getattr(manifest, name), strict=False)):
                if one != other:
                    said = f"{name} of channel {channel} is {other:.9g}, the receipts give {one:.9g}"
                    self._notes.add("statistics", f"manifest.json: {said}")
        if again.environments != manifest.environments:
            self._notes.add("manifest", "manifest.json: its environments are not those of the receipts")

    def _name_repeated(self, pool: Executor) -> None:
        repeated, total = self._keys.repeated()
        found = pool.map(lambda one: {self._key(place) for place in one.places}, repeated)
        for one, keys in zip(repeated, found, strict=True):
            if None not in keys and len(keys) == one.count:
                continue  # different keys of one hash
            name = repr(keys.pop()) if len(keys) == 1 and None not in keys else f"of hash {one.hash:016x}"
            where = ", ".join(f"{self._manifest.shards[shard].name} sample {sample}" for shard, sample in one.places)
            more = ", ..." if one.count > len(one.places) else ""
            self._notes.add("keys", f"key {name} occurs {one.count} times: {where}{more}")
        if total > len(repeated):
            self._notes.add("keys", f"{total - len(repeated)} keys more occur several times")

    def _key(self, place: Place) -> str | None:
        shard, sample = place
        try:
            return read_sample(self._store, load_receipt(self._store, self._manifest.shards[shard].receipt), sample)[0]
        except LatheError:
            return None

    def _read_drawn(self, texts: Texts) -> None:
        """The samples that are compared; `quick` has not looked at them yet."""
        for shard, number in self._draw.places():
            try:
                receipt = load_receipt(self._store, self._manifest.shards[shard].receipt)
                key, parts = read_sample(self._store, receipt, number)
                if self._quick:
                    self._look_at(texts, receipt, number, key, parts)
                self._drawn.append(stored_sample(receipt.shard, key, parts))
            except LatheError as error:
                self._notes.add("samples", error.message)

    def _look_at(self, texts: Texts, receipt: Receipt, number: int, key: str, parts: Parts) -> None:
        def fail(check: str, said: str) -> None:
            self._notes.add("text" if check == "text" else "samples", f"{receipt.shard}: {said}")

        text = TextCheck(texts, fail)
        bucket = next(part.bucket for part in receipt.buckets if part.train[0] <= number < part.holdout[1])
        SampleCheck(texts.manifest, receipt.source, text, fail).moments(key, parts, bucket)
        self._captions += text.captions

    def compare(self, images: str | Sequence[str] | None, autoencoder: str | None, *, wanted: bool) -> None:
        """Hold the samples drawn against their pictures; what is out of reach fails where it was asked for."""
        self._compared = []
        if not self._drawn:
            return
        manifest, notes = self._manifest, self._notes
        self._sources = find_pictures(manifest, self._store.url, images, notes, wanted=wanted or images is not None)
        model = find_autoencoder(manifest, autoencoder, notes, wanted=wanted or autoencoder is not None)
        if not self._sources or model is None:
            return
        compared = list(PictureCheck(manifest, model, self._sources, notes, wanted=wanted).run(self._drawn))
        self._compared = [one.measures() for one in compared]
        if compared:
            check_quality(compared, notes)
            self.sheet = sheet(compared)

    def checks(self) -> tuple[Check, ...]:
        """The report's lines."""
        manifest, check = self._manifest, self._notes.check
        shards, samples = f"{len(manifest.shards)} shards", manifest.samples("train") + manifest.samples("holdout")
        held_out, buckets = manifest.samples("holdout"), len(manifest.buckets("train") | manifest.buckets("holdout"))
        lines = [
            check("manifest", f"content hash, {shards}, {samples} samples"),
            check("receipts", f"{self._receipts} receipts of {shards}"),
            check("fingerprint", f"{self._digest[:16]}..."),
            check("files", f"sizes of {shards} and the empty prompt"),
            check(
                "samples", f"files, types and shapes of {len(self._drawn) if self._quick else len(self._keys)} samples"
            ),
            check("text", f"{self._captions} captions and the empty prompt"),
            check("keys", f"{len(self._keys)} keys, each once"),
            check("rejects", f"{self._rejects.reasons.total()} samples left out"),
            check("removed", f"{len(self._takedown)} samples to be taken down"),
            check("leftovers", "files that are not the data set's"),
        ]
        if self._quick:
            lines.append(check("statistics", "mean and std as the receipts give them"))
        else:
            lines += [
                check("checksums", f"SHA-256 of {shards}, CRC-32 of their blocks"),
                check("blocks", "byte ranges tile the shards"),
                check("finite", f"{self._numbers} numbers"),
                check("split", f"{buckets} buckets, {held_out} samples held out"),
                check("statistics", f"mean and std of {manifest.latent_channels} channels, summed anew"),
            ]
        if self._samples and self._compared is not None:
            lines += [
                check("sources", f"{len(self._sources)} image shards"),
                check("autoencoder", manifest.autoencoder),
                check("pictures", _told(self._compared), {"samples": self._compared}),
            ]
        return tuple(sorted(lines, key=lambda line: list(REMEDIES).index(line.name)))


def _told(compared: Sequence[Mapping[str, Any]]) -> str:
    finite = [one for one in compared if None not in one.values()]
    if not finite:
        return f"{len(compared)} encoded afresh, none of finite numbers" if compared else "none compared"
    psnr = mean(one["psnr"] for one in finite)
    off = max(one["mean_difference"] for one in finite)
    return f"{len(compared)} encoded afresh, at most {off:.2g} standard deviations off; decoded {psnr:.1f} dB"
