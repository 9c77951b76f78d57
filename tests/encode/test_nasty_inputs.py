"""One job over every nasty input of `nasty_pictures`, `nasty_samples` and `nasty_shards`: each as written there."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from nasty_samples import HEIGHT, SCENE, WIDTH, Used
from nasty_shards import SHARDS, Shard
from numpy.typing import NDArray
from PIL import Image
from small_models import autoencoder

from pipeline.config import EncodeConfig
from pipeline.data.images import Pixels
from pipeline.data.manifest import FILTERED, Manifest, Receipt, load_receipt
from pipeline.data.samples import SHARD_DAMAGED
from pipeline.encode.job import EncodeSummary, encode
from pipeline.encode.tally import REASONS
from pipeline.encode.verify.job import verify
from pipeline.models.text import Tokenizer
from pipeline.storage import open_store

EXACT, LOSSY = 0.01, 0.2  # how far stored moments may be from the scene's; float16's step is 0.008 at log-variances
USED = [sample.outcome for shard in SHARDS for sample in shard.samples if isinstance(sample.outcome, Used)]
REJECTED = [sample.outcome for shard in SHARDS for sample in shard.samples if isinstance(sample.outcome, str)]


@dataclass(frozen=True)
class Job:
    """What one run over all shards gave."""

    output: Path
    summary: EncodeSummary
    receipts: dict[str, Receipt]  # by image shard
    latents: dict[tuple[str, str], dict[str, Any]]  # by image shard and key, as plain webdataset reads them
    moments: Callable[[Pixels], NDArray[np.float32]]  # what diffusers alone makes of a picture

    @property
    def manifest(self) -> Manifest:
        return self.summary.manifests[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("nasty")
    folder = place / "images"
    folder.mkdir()
    for shard in SHARDS:
        (folder / shard.name).write_bytes(shard.data)
    (folder / "folder.tar").mkdir()
    (folder / "gone.tar").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.tar")
    autoencoder().save_pretrained(place / "vae")
    config = EncodeConfig(
        images={
            "shards": (str(folder), f"{folder}/*.tar.*", f"{folder}/*.tgz"),
            "resolution": 64,
            "buckets": {"step": 16},
            "filters": {"max_aspect": 10, "min_caption_chars": 2},
        },
        autoencoder=str(place / "vae"),
        output=str(place / "latents"),
        text={"context_length": 16},
        batch_size=8,
        threads=1,
        max_reject_rate=0.9,
    )
    summary = encode(config)
    store = open_store(config.output)
    receipts = [load_receipt(store, entry.receipt) for entry in summary.manifests[0].shards]
    latents = {}
    for receipt in receipts:
        url = f"{config.output}/{receipt.shard}"
        for sample in webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode():
            latents[receipt.source, sample["__key__"]] = sample
    by_source = {receipt.source: receipt for receipt in receipts}
    return Job(place / "latents", summary, by_source, latents, _moments(place / "vae"))


def _moments(folder: Path) -> Callable[[Pixels], NDArray[np.float32]]:
    model = AutoencoderKL.from_pretrained(folder).eval()

    @torch.inference_mode()
    def moments(pixels: Pixels) -> NDArray[np.float32]:
        brought = np.array(Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
        tensor = torch.from_numpy(brought).float().permute(2, 0, 1)[None] / 127.5 - 1
        found: NDArray[np.float32] = model.encode(tensor).latent_dist.parameters[0].numpy()
        return found

    return moments


def written(key: str) -> str:
    """A key as rejects have it."""
    return key.encode("utf-8", "backslashreplace").decode()


def expected_rejects(shard: Shard) -> Counter[tuple[str, str]]:
    found = Counter((written(s.key)[:1000], s.outcome) for s in shard.samples if isinstance(s.outcome, str))
    return found + Counter({("", SHARD_DAMAGED): int(shard.damaged)})


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.name)
def test_what_is_written_there_is_what_becomes_of_it(job: Job, shard: Shard) -> None:
    used = Counter(sample.key for sample in shard.samples if isinstance(sample.outcome, Used))
    receipt = job.receipts[shard.name]
    assert Counter((reject.key, reject.reason) for reject in receipt.rejects) == expected_rejects(shard)
    assert Counter(key for source, key in job.latents if source == shard.name) == used
    assert receipt.samples() == used.total()


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.name)
def test_pictures_captions_and_sizes(job: Job, shard: Shard) -> None:
    tokenizer = Tokenizer(16)
    for sample in shard.samples:
        if not isinstance(wanted := sample.outcome, Used):
            continue
        stored = job.latents[shard.name, sample.key]
        height, width = wanted.pixels.shape[:2]
        assert stored["json"] == {
            "captions": list(wanted.captions),
            "bucket": [HEIGHT, WIDTH],  # of the upright picture
            "source_shard": shard.name,
            "source_key": sample.key,
        }
        assert stored["size.npy"].tolist() == [height, width, 0, 0, HEIGHT, WIDTH], sample.key
        tokens = [stored[f"tokens{i}.clip.npy"] for i in range(len(wanted.captions))]
        np.testing.assert_array_equal(tokens, tokenizer(wanted.captions), err_msg=sample.key)
        off = np.abs(stored["latent.npy"].astype(np.float32) - job.moments(wanted.pixels)).max()
        assert off < (LOSSY if wanted.lossy else EXACT), sample.key  # and so finite


def test_every_orientation_gives_the_same_latent(job: Job) -> None:
    stored = [job.latents["pictures.tar", f"exif-{n}"]["latent.npy"] for n in range(1, 9)]
    assert len({latent.tobytes() for latent in stored}) == 1


def test_the_scenes_can_be_told_apart(job: Job) -> None:
    """No picture passes for another: turned, mirrored, of other colours, with its hidden half."""
    scenes = {wanted.pixels.tobytes(): wanted.pixels for wanted in USED if wanted.pixels.shape == SCENE.shape}
    turned = [SCENE[::-1], SCENE[:, ::-1], SCENE[::-1, ::-1], SCENE[:, :, ::-1]]
    scenes |= {scene.tobytes(): np.ascontiguousarray(scene) for scene in turned}
    for one, other in itertools.combinations(map(job.moments, scenes.values()), 2):
        assert np.abs(one - other).max() > 2 * LOSSY


def test_the_counts_add_up(job: Job) -> None:
    assert len(USED) + len(REJECTED) > 200
    damaged = sum(shard.damaged for shard in SHARDS)
    reasons = Counter(REJECTED) + Counter({SHARD_DAMAGED: damaged})
    unwanted = sum(count for reason, count in reasons.items() if reason.startswith(FILTERED))
    (tally,) = job.summary.tallies
    assert (tally.shards, tally.samples, tally.unwanted) == (len(SHARDS), len(USED), unwanted)
    assert tally.rejects.total() == reasons.total() - unwanted
    assert set(reasons) <= set(REASONS)
    assert job.manifest.rejects == dict(reasons)
    assert job.manifest.samples("train") + job.manifest.samples("holdout") == len(job.latents) == len(USED)
    lines = [json.loads(line) for line in (job.output / "rejects.jsonl").read_text().splitlines()]
    listed = Counter((line["shard"], line["key"], line["reason"]) for line in lines)
    assert listed == Counter(
        {(shard.name, *reject): count for shard in SHARDS for reject, count in expected_rejects(shard).items()}
    )
    said = f"{len(USED)} pictures, {reasons.total() - unwanted} rejected, {unwanted} left out by filters"
    said += f" in {len(SHARDS)} shards ({len(SHARDS)} encoded now); manifest written"
    assert str(job.summary) == said


def test_the_result_passes_verification_but_for_the_key_that_occurs_twice(job: Job) -> None:
    report = verify(str(job.output / "manifest.json"), decode=16)
    failed = {check.name: check.said for check in report.checks if check.status == "fail"}
    assert failed == {"keys": ("key 'across' occurs 2 times: across-1.tar sample 0, across-2.tar sample 0",)}
    assert [check.name for check in report.checks if check.status == "warn"] in ([], ["pictures"])  # a random decoder
