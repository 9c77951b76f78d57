"""Manifests and receipts for a person."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.data.manifest import FILTERED, MANIFEST, RECEIPT_SUFFIX, Bucket, Manifest, Receipt, load_manifest
from pipeline.operate.description import Description, Section, Size
from pipeline.storage import Entry

_MOST_ROWS = 12


def describe_manifest(url: str, manifest: Manifest) -> Description:
    """Counts by bucket, statistics, text, rejects. `url` is the manifest's."""
    made = manifest.fingerprint
    train, holdout = manifest.samples("train"), manifest.samples("holdout")
    facts = {
        "resolution": made.resolution,
        "samples": {"train": train, "holdout": holdout},
        "shards": len(manifest.shards),
        "bytes": Size(sum(shard.bytes for shard in manifest.shards)),
        "latents": f"{manifest.latent_channels} channels of {made.dtype}, one for {manifest.downsampling_factor}"
        f" x {manifest.downsampling_factor} pixels{', flipped too' if made.flip else ''}",
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "autoencoder": manifest.autoencoder,
        "scaling_factor": manifest.scaling_factor,
        "shift_factor": manifest.shift_factor,
        "precision": made.precision,
        "captions": f"{made.text_mode}, {made.text_padding}",
        "images": list(manifest.images),
        "attribution": manifest.attribution,
        "content_hash": manifest.content_hash,
        "fingerprint": made.digest(),
        "made_with": [_versions(environment) for environment in manifest.environments],
    }
    wanted = {reason: count for reason, count in manifest.rejects.items() if not reason.startswith(FILTERED)}
    filtered = {reason: count for reason, count in manifest.rejects.items() if reason.startswith(FILTERED)}
    towers = [
        (tower.name, tower.context_length, tower.layer, tower.width, tower.pooled_width) for tower in made.text_towers
    ]
    held_out = manifest.buckets("holdout")
    counts = {bucket: (count, held_out.get(bucket, 0)) for bucket, count in manifest.buckets().items()}
    counts |= {bucket: (0, count) for bucket, count in held_out.items() if bucket not in counts}
    sections = [
        _buckets(counts),
        Section("text towers", ("name", "tokens", "layer", "width", "pooled"), towers),
        _reasons("rejects", wanted),
        _reasons("filtered", filtered),
    ]
    return Description("manifest", url, facts, sections)


def describe_receipt(url: str, receipt: Receipt) -> Description:
    """One latent shard by its receipt. `url` is the receipt's."""
    counts: dict[Bucket, tuple[int, int]] = {
        b.bucket: (b.train[1] - b.train[0], b.holdout[1] - b.holdout[0]) for b in receipt.buckets
    }
    reasons: dict[str, int] = {}
    for reject in receipt.rejects:
        reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
    sections = [_buckets(counts), _reasons("rejects", reasons)]
    return Description("receipt", url, receipt_facts(receipt), sections)


def receipt_facts(receipt: Receipt) -> dict[str, Any]:
    """What a receipt says of its shard as a whole."""
    has_statistics = receipt.statistics.count > 0
    return {
        "shard": receipt.shard,
        "samples": {
            "train": sum(b.train[1] - b.train[0] for b in receipt.buckets),
            "holdout": sum(b.holdout[1] - b.holdout[0] for b in receipt.buckets),
            "rejected": len(receipt.rejects),
        },
        "bytes": Size(receipt.bytes),
        "blocks": len(receipt.blocks),
        "mean": list(receipt.statistics.mean()) if has_statistics else [],
        "std": list(receipt.statistics.std()) if has_statistics else [],
        "source": receipt.source,
        "source_bytes": Size(receipt.source_bytes),
        "sha256": receipt.sha256,
        "fingerprint": receipt.fingerprint,
        "made_with": _versions(receipt.environment),
    }


def describe_resolutions(url: str, folders: Iterable[str]) -> Description:
    """An output of several resolutions: one manifest in each of its sub-folders."""
    rows: list[tuple[Any, ...]] = []
    for folder in folders:
        manifest = load_manifest(f"{url.rstrip('/')}/{folder}/{MANIFEST}")
        size = Size(sum(shard.bytes for shard in manifest.shards))
        rows.append((folder, manifest.samples("train"), manifest.samples("holdout"), len(manifest.shards), size))
    section = Section("resolutions", ("resolution", "train", "holdout", "shards", "bytes"), rows)
    return Description("latents of several resolutions", url, {"manifests": len(rows)}, [section])


def describe_unfinished(url: str, entries: Iterable[Entry]) -> Description:
    """Latent shards that no manifest was folded from yet."""
    entries = list(entries)
    facts = {
        "committed_shards": sum(entry.name.endswith(RECEIPT_SUFFIX) for entry in entries),
        "shards": sum(entry.name.endswith(".tar") for entry in entries),
        "bytes": Size(sum(entry.size for entry in entries)),
        "manifest": "none yet: run `lathe encode` to its end, or with --finalize",
    }
    return Description("unfinished latents", url, facts)


def _buckets(counts: dict[Bucket, tuple[int, int]]) -> Section:
    total = sum(train + holdout for train, holdout in counts.values())
    rows = [
        (f"{bucket[0]} x {bucket[1]}", train, holdout, f"{(train + holdout) / total:.1%}")
        for bucket, (train, holdout) in sorted(counts.items())
        if train + holdout
    ]
    columns = ("height_x_width", "train", "holdout", "share")
    return Section("buckets", columns, rows[:_MOST_ROWS], max(len(rows) - _MOST_ROWS, 0))


def _reasons(title: str, reasons: dict[str, int]) -> Section:
    rows = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return Section(title, ("reason", "samples"), rows[:_MOST_ROWS], max(len(rows) - _MOST_ROWS, 0))


def _versions(environment: dict[str, str | int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items() if value)
