"""Samples a second, ours and the peers', over whole epochs: from local files in the page cache, and from S3."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import LoaderConfig
from pipeline.data.manifest import MANIFEST
from pipeline.operate.bench.loader.contestant import Contestant
from pipeline.operate.bench.loader.ours import Work
from pipeline.operate.bench.loader.rivals import ALONE_ON_S3, NOT_FROM_S3, TUNED, Rivals
from pipeline.operate.bench.loader.samples import write_latents, write_samples
from pipeline.operate.bench.loader.starts import measure_starts
from pipeline.operate.bench.runs import Round, delete_below, told
from pipeline.storage import Store, open_store

Say = Callable[[str], None]
THREADS = LoaderConfig().workers
REQUESTS = 16  # at once, ours by default and the bare ones


@dataclass(frozen=True)
class RateSizes:
    """How much is read."""

    samples: int = 16_384
    per_shard: int = 1024
    block_samples: int = 64
    batch: int = 64
    window: int = 64  # less than the default, or a set so small would be in memory as a whole
    processes: int = 2  # workers of the peers; ours has its default number of threads


@dataclass(frozen=True)
class Written:
    """The same samples in everyone's format, in folders of one place."""

    place: Path
    kind: str
    sizes: RateSizes

    @property
    def samples(self) -> str:
        """The folder of .npy files."""
        return str(self.place / "samples")

    def work(self, manifest: str, workers: int) -> Work:
        """What ours is asked for."""
        sizes = self.sizes
        return Work(manifest, sizes.samples, workers=workers, batch=sizes.batch, window=sizes.window)


def write_all(place: Path, kind: str, sizes: RateSizes, rivals: Rivals, say: Say) -> Written:
    """Samples, and everyone's copy of them: `ours`, and a folder for each peer."""
    written = Written(place, kind, sizes)
    say(f"{kind}: writing {sizes.samples} samples in {len(rivals.pythons) + 1 - len(TUNED)} formats")
    write_samples(Path(written.samples), kind, sizes.samples)
    write_latents(
        Path(written.samples),
        open_store(str(place / "ours")),
        kind,
        per_shard=sizes.per_shard,
        block_samples=sizes.block_samples,
    )
    for name in rivals.pythons:
        if name not in TUNED:
            work = {"samples": written.samples, "place": str(place / name), "per_shard": sizes.per_shard}
            with rivals.peer(name, **work) as peer:
                peer.ask("write")
    return written


def measure_local(written: Written, rivals: Rivals, repeats: int, say: Say) -> dict[str, Any]:
    """Rounds with everything in one process, and with workers."""
    manifest, processes = str(written.place / "ours" / MANIFEST), written.sizes.processes
    modes = {}
    for mode, workers in (("inprocess", 0), ("workers", processes)):
        with ExitStack() as running:
            everyone = {"ours": running.enter_context(rivals.ours(written.work(manifest, min(workers, THREADS))))}
            if not workers:
                everyone["ours_threads"] = running.enter_context(rivals.ours(written.work(manifest, THREADS)))
            for name in rivals.pythons:
                place = written.place / _format(name)
                everyone[name] = running.enter_context(_peer(rivals, name, written, str(place), workers))
            modes[mode] = _rounds(everyone, written.sizes.samples, repeats, f"{written.kind}, {mode}", say)
    return modes


def measure_s3(written: Written, url: str, rivals: Rivals, repeats: int, say: Say) -> dict[str, Any]:
    """Rounds from S3 (`s3`) and starts (`start`).

    Bare reads of the ranges that ours asks for, ours with threads, and the peers with workers.

    Everything that is written below `url` is deleted.
    """
    try:
        say(f"S3: uploading {written.kind}")
        for name in ("ours", *(name for name in rivals.pythons if name not in (*TUNED, *NOT_FROM_S3))):
            upload(written.place / name, open_store(f"{url}/{name}"))
        work = written.work(f"{url}/ours/{MANIFEST}", THREADS)
        return {
            "s3": _from_s3(written, url, rivals, repeats, say),
            "start": measure_starts(work, rivals, repeats, say),
        }
    finally:
        delete_below(url)


def _from_s3(written: Written, url: str, rivals: Rivals, repeats: int, say: Say) -> dict[str, Any]:
    work = written.work(f"{url}/ours/{MANIFEST}", THREADS)
    ranges = written.place / "ranges.json"
    with rivals.ours(work) as ours:
        asked = ours.ask("ranges")["ranges"]
    ranges.write_text(json.dumps(asked), encoding="utf-8")
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    with ExitStack() as running:
        everyone = {
            "raw": running.enter_context(
                rivals.raw(
                    bucket=bucket,
                    prefix=f"{prefix}/ours/",
                    ranges=str(ranges),
                    requests=REQUESTS,
                    samples=written.sizes.samples,
                )
            ),
            "ours": running.enter_context(rivals.ours(work)),
        }
        for name in rivals.pythons:
            if name in NOT_FROM_S3:
                continue
            where = f"{url}/{_format(name)}"
            workers = 0 if name in ALONE_ON_S3 else written.sizes.processes
            peer = _peer(rivals, name, written, where, workers, endpoint=endpoint())
            everyone[name] = running.enter_context(peer)
        result = _rounds(everyone, written.sizes.samples, repeats, "S3", say)
    asked_for = {"requests": len(asked), "bytes": sum(end - start for _, start, end in asked)}
    return {"endpoint": endpoint() or "AWS", "at_once": REQUESTS, **asked_for, **result}


def endpoint() -> str:
    """Of the S3 server, for peers that do not look into these variables; empty = AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _peer(rivals: Rivals, name: str, written: Written, place: str, workers: int, **more: Any) -> Contestant:
    return rivals.peer(name, samples=written.samples, place=place, workers=workers, batch=written.sizes.batch, **more)


def _format(name: str) -> str:
    """Whose files a peer reads."""
    return name.removesuffix("_by_item")


def _rounds(everyone: Mapping[str, Contestant], samples: int, repeats: int, what: str, say: Say) -> dict[str, Any]:
    """All in turn, after an epoch that warms up; seconds are of one sample."""
    say(f"{what}: an epoch of each, to warm up")
    for contestant in everyone.values():
        contestant.epoch(samples)
    rounds = []
    for number in range(repeats):
        say(f"{what}: round {number + 1} of {repeats}")
        seconds = {name: contestant.epoch(samples)["seconds"] / samples for name, contestant in everyone.items()}
        rounds.append(ratios(seconds))
    return told(rounds)


def ratios(seconds: Mapping[str, float]) -> Round:
    """One round: everyone's seconds for a sample, and ours over the others' rates.

    `fastest_peer` is of those at the settings that they come with, `fastest_tuned` of all.
    """
    peers = {name: value for name, value in seconds.items() if not name.startswith(("ours", "raw"))}
    found = {f"{name}_seconds": value for name, value in seconds.items()}
    found |= {f"ours_over_{name}": value / seconds["ours"] for name, value in seconds.items() if name != "ours"}
    found["ours_over_fastest_tuned"] = min(peers.values()) / seconds["ours"]
    found["ours_over_fastest_peer"] = min(v for name, v in peers.items() if name not in TUNED) / seconds["ours"]
    return found


def upload(folder: Path, store: Store) -> None:
    """Every file of a folder, under its name there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())
