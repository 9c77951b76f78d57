from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from scraping import scraped, target

from pipeline.config import BucketsConfig, EncodeConfig, EncodeTextConfig, FiltersConfig
from pipeline.data import images
from pipeline.data.manifest import load_manifest, load_receipt
from pipeline.data.samples import is_holdout
from pipeline.data.tar import TarBuilder, read_npy
from pipeline.encode import job
from pipeline.encode.claim import claim
from pipeline.encode.encoder import Encoder
from pipeline.encode.job import encode, finalize
from pipeline.encode.meter import Snapshot
from pipeline.encode.output import commit
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.metrics import Metrics
from pipeline.models.text import Tokenizer
from pipeline.storage import open_store

SIDE, SHARDS, PER_SHARD = 32, 5, 13
FINGERPRINTED = {"context_length": "text_towers"}
EXTRAS = {"manifest.json", "encoding.json", "rejects.jsonl", "empty.tokens.clip.npy"}


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return images.png(small.repeat(8, 0).repeat(8 + seed % 3, 1))


def image_shard(number: int, extra: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    tar = TarBuilder()
    for i in range(PER_SHARD):
        key = f"{number:03d}{i:04d}"
        tar.add(f"{key}.png", picture(number * 100 + i))
        tar.add(f"{key}.txt", f"picture {i} of {number}".encode())
    for name, data in extra:
        tar.add(name, data)
    return tar.finish()


def save_autoencoder(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Image shards, an autoencoder, and the output of one undisturbed worker."""
    place = tmp_path_factory.mktemp("encode")
    (place / "images").mkdir()
    for i in range(SHARDS):
        (place / "images" / f"{i:05d}.tar").write_bytes(image_shard(i))
    caption = json.dumps({"caption": ["a list", "of two"]}).encode()
    bad = (("zz1.png", b"<html>"), ("zz1.txt", b"x"), ("zz2.txt", b"y"), ("zz3.png", picture(5)), ("zz3.json", caption))
    (place / "images" / "00001.tar").write_bytes(image_shard(1, bad))
    (place / "images" / "ATTRIBUTION.txt").write_text("by A\n")
    save_autoencoder(place / "vae")
    encode(settings(place, "undisturbed"))
    return place


def settings(place: Path, output: str, **fields) -> EncodeConfig:
    tree = {
        "images": {"shards": str(place / "images"), "resolution": SIDE, "holdout": 0.2},
        "autoencoder": str(place / "vae"),
        "output": str(place / output),
        "batch_size": 4,
        "block_samples": 5,
        "max_reject_rate": 0.5,
        "threads": 1,
        "metrics": {"prometheus": False},
        "text": {"context_length": 16},
    }
    return EncodeConfig(**{**tree, **fields})


def content(place: Path, output: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / output).iterdir())}


def without_places(files: dict[str, bytes]) -> dict[str, object]:
    """The files, but for what they tell of where the image shards are."""
    trees = {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}
    for tree in trees.values():
        tree.pop("source_version", None)
        tree.pop("images", None)
    return {**files, **trees}


def test_nothing_but_shards_receipts_and_the_manifest_is_there(place):
    names = {f"{i:05d}.tar" for i in range(SHARDS)}
    assert set(content(place, "undisturbed")) == names | {f"{name}.receipt.json" for name in names} | EXTRAS


def test_prometheus_is_told_what_the_progress_tells(place):
    targets, seen = place / "targets", []

    def watch(now: Snapshot) -> None:
        seen.append((now, scraped(target(targets / "lathe-encode-told-1.json"))))

    encode(settings(place, "told", metrics={"discovery": str(targets)}), (1, 2), watch)
    now, told = seen[-1]
    assert told["lathe_encode_images_total"] == now.images == 27
    assert told["lathe_encode_rejects_total{reason=not_an_image}"] == now.rejected["not_an_image"]
    assert told["lathe_encode_read_bytes_total"] == now.bytes_read > 0
    assert told["lathe_encode_written_bytes_total"] == now.bytes_written > 0
    assert (told["lathe_encode_shards_done"], told["lathe_encode_target_shards"]) == (2, 2)
    assert (seen[0][1]["lathe_encode_finished"], told["lathe_encode_finished"]) == (0, 1)
    assert told["lathe_encode_busy_ratio{stage=encode}"] > 0
    assert told["lathe_storage_requests_total{operation=write}"] > 0
    assert list(targets.iterdir()) == []


def test_a_worker_whose_fold_fails_has_not_finished(place, monkeypatch):
    def fold(*_):
        raise DataError("damaged")

    told = []
    monkeypatch.setattr(job, "fold_output", fold)
    monkeypatch.setattr(Metrics, "set", lambda _, key, value, **labels: told.append((key, value)))
    with pytest.raises(DataError, match="damaged"):
        encode(settings(place, "undisturbed"))
    assert [value for key, value in told if key == "finished"][-2:] == [1, 0]


def test_plain_webdataset_reads_the_latents_of_diffusers(place):
    """The contract of design section 4, with stock decoders, against diffusers alone."""
    reference = AutoencoderKL.from_pretrained(place / "vae").eval()
    tokenizer = Tokenizer(16)
    urls = [str(place / "undisturbed" / f"{i:05d}.tar") for i in range(SHARDS)]
    seen = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        about, latent = sample["json"], sample["latent.npy"]
        assert (about["source_key"], about["bucket"]) == (sample["__key__"], [SIDE, SIDE])
        if sample["__key__"] == "zz3":
            assert about["captions"] == ["a list", "of two"]
            np.testing.assert_array_equal(sample["tokens1.clip.npy"], tokenizer(["of two"])[0])
            continue
        number, i = int(sample["__key__"][:3]), int(sample["__key__"][3:])
        assert about["source_shard"] == f"{number:05d}.tar"
        assert about["captions"] == [f"picture {i} of {number}"]
        assert (latent.dtype, latent.shape) == (np.float16, (8, 8, 8))
        assert (sample["tokens0.clip.npy"].dtype, sample["size.npy"].dtype) == (np.uint16, np.int32)
        np.testing.assert_array_equal(sample["tokens0.clip.npy"], tokenizer(about["captions"])[0])
        width = 6 * (8 + (number * 100 + i) % 3)
        left = (round(width * SIDE / 48) - SIDE) // 2
        assert sample["size.npy"].tolist() == [48, width, 0, left, SIDE, SIDE]
        pixels = images.cover(images.decode(picture(number * 100 + i)), (SIDE, SIDE))
        with torch.no_grad():
            tensor = torch.from_numpy(pixels / 255.0).float().permute(2, 0, 1)[None] * 2 - 1
            expected = reference.encode(tensor).latent_dist.parameters[0]
        np.testing.assert_allclose(latent.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3)
        seen += 1
    assert seen == SHARDS * PER_SHARD


def test_the_manifest_tells_what_is_there(place):
    manifest = load_manifest(str(place / "undisturbed" / "manifest.json"))
    assert (manifest.latent_channels, manifest.latent_side, manifest.downsampling_factor) == (4, 8, 4)
    assert manifest.samples("train") + manifest.samples("holdout") == SHARDS * PER_SHARD + 1
    assert manifest.rejects == {"no_image": 1, "not_an_image": 1}
    assert manifest.attribution == "by A"
    assert manifest.environments[0]["threads"] == 1
    lines = (place / "undisturbed" / "rejects.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["zz1", "zz2"]
    np.testing.assert_array_equal(read_npy(content(place, "undisturbed")["empty.tokens.clip.npy"]), Tokenizer(16).empty)
    store = open_store(str(place / "undisturbed"))
    for entry in manifest.shards:
        receipt = load_receipt(store, entry.receipt)
        names = [
            s["__key__"] for s in webdataset.WebDataset(str(place / "undisturbed" / entry.name), shardshuffle=False)
        ]
        held = [is_holdout(name, 0.2) for name in names]
        assert held == sorted(held)  # hold-out last
        assert sum(held) == entry.samples("holdout") == sum(end - first for first, end in receipt.ranges("holdout"))


def test_two_workers_write_the_same_bytes(place):
    first = encode(settings(place, "two"), (0, 2))
    assert (first.shards, first.waiting, first.manifests) == (3, 2, ())
    assert "2 shards are still to come" in str(first)
    second = encode(settings(place, "two"), (1, 2))
    assert len(second.manifests) == 1
    assert content(place, "two") == content(place, "undisturbed")


def test_a_rerun_encodes_nothing_anew(place):
    seen = []
    before = content(place, "undisturbed")
    summary = encode(settings(place, "undisturbed"), progress=seen.append)
    assert (summary.encoded, summary.shards) == (0, 5)
    assert (summary.tallies[0].samples, summary.tallies[0].rejects.total()) == (66, 2)
    assert {(snapshot.shards, snapshot.images) for snapshot in seen} == {(5, 0)}
    assert content(place, "undisturbed") == before


def test_half_written_and_replaced_shards_are_encoded_again(place):
    shutil.copytree(place / "undisturbed", place / "half")
    out = place / "half"
    (out / "00000.tar.receipt.json").unlink()  # killed between shard and receipt
    (out / "00000.tar").write_bytes(b"torn")
    (out / "00002.tar").write_bytes(b"cut short")
    receipt = json.loads((out / "00003.tar.receipt.json").read_text())
    (out / "00003.tar.receipt.json").write_text(json.dumps({**receipt, "source_bytes": 1}))  # the source was replaced
    (out / "manifest.json").unlink()
    assert encode(settings(place, "half")).encoded == 3
    assert content(place, "half") == content(place, "undisturbed")


def test_finalize_names_what_is_missing_and_is_idempotent(place):
    shutil.copytree(place / "undisturbed", place / "final")
    (place / "final" / "manifest.json").unlink()
    finalize(settings(place, "final"))
    assert content(place, "final") == content(place, "undisturbed")
    finalize(settings(place, "final"))
    assert content(place, "final") == content(place, "undisturbed")
    (place / "final" / "00003.tar.receipt.json").unlink()
    with pytest.raises(DataError, match=r"1 of 5 latent shards are missing: 00003\.tar"):
        finalize(settings(place, "final"))


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("images", {"resolution": 16}),
        ("images", {"background": (0, 0, 0)}),
        ("images", {"holdout": 0.0}),
        ("images", {"caption_field": "alt"}),
        ("images", {"flip": True}),
        ("images", {"max_upscale": 1.5}),
        ("images", {"buckets": BucketsConfig(step=8)}),
        ("images", {"filters": FiltersConfig(where="width > 3")}),
        ("text", {"context_length": 24}),
    ],
)
def test_another_meaning_is_refused_by_name(place, section, fields):
    config = settings(place, "undisturbed")
    other = config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})
    with pytest.raises(DataError, match=f"these differ: .*{FINGERPRINTED.get(next(iter(fields)), next(iter(fields)))}"):
        encode(other)


def test_another_autoencoder_is_refused_by_name(place, tmp_path):
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"these differ: autoencoder_weights\n"):
        encode(settings(place, "undisturbed", autoencoder=other))


def test_too_many_rejects_end_the_job_and_no_manifest_is_written(place, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.tar").write_bytes(image_shard(0, (("bad.png", b"<html>"), ("bad.txt", b"x"))))
    tree = {"shards": str(tmp_path / "images"), "resolution": SIDE}
    strict = settings(place, "strict", images=tree, max_reject_rate=0.05)
    for _ in range(2):  # a rerun must not pass because the shard is there already
        with pytest.raises(DataError, match=r"1 of 14 pictures were rejected \(not_an_image: 1\)"):
            encode(strict)
    assert not (place / "strict" / "manifest.json").exists()
    assert encode(strict.model_copy(update={"max_reject_rate": 0.1})).encoded == 0


def test_non_finite_latents_never_reach_a_shard(place, tmp_path):
    model = AutoencoderKL.from_pretrained(place / "vae")
    with torch.no_grad():  # the means of bright pictures pass float16's range
        model.quant_conv.weight.mul_(3e5)
    model.save_pretrained(tmp_path / "vae")
    config = settings(place, "hot", autoencoder=str(tmp_path / "vae"), max_reject_rate=0.99)
    with pytest.raises(DataError, match="non_finite_latent"):
        encode(config)
    for sample in webdataset.WebDataset(
        str(place / "hot" / "00000.tar"), shardshuffle=False, empty_check=False
    ).decode():
        assert np.isfinite(sample["latent.npy"]).all()


def test_added_shards_extend_the_data(place, tmp_path):
    (tmp_path / "images").mkdir()
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"))
    hashes = []
    for i in range(2):
        (tmp_path / "images" / f"{i}.tar").write_bytes(image_shard(i))
        summary = encode(config)
        assert summary.encoded == 1
        hashes.append(summary.manifests[0].content_hash)
    assert hashes[0] != hashes[1]


def test_an_empty_shard_and_a_damaged_one_do_not_stop_the_job(place, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for name, data in (("a", TarBuilder().finish()), ("b", b"<html>" * 200), ("c", image_shard(0)[:-5000])):
        (tmp_path / "images" / f"{name}.tar").write_bytes(data)
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"))
    with pytest.raises(DataError, match=r"2 of 3 image shards are damaged, more than max_reject_rate=0\.5"):
        encode(config)
    summary = encode(config.model_copy(update={"max_reject_rate": 0.7}))
    assert (summary.encoded, summary.manifests[0].rejects["shard_damaged"]) == (0, 2)
    assert sum("is damaged: " in message for message in caplog.messages) == 2
    assert [shard.samples("train") > 0 for shard in summary.manifests[0].shards] == [False, False, True]


def test_settings_that_cannot_be(place, tmp_path):
    with pytest.raises(ConfigError, match="task 2/2"):
        encode(settings(place, "none"), (2, 2))
    with pytest.raises(ConfigError, match=r"images\.resolution: 30 is not a multiple of 4"):
        encode(settings(place, "none", images={"shards": str(place / "images"), "resolution": 30}))
    with pytest.raises(ConfigError, match="is where the image shards are"):
        encode(settings(place, "images"))
    shutil.copytree(place / "images", tmp_path / "again")
    both = {"shards": f"{{{place}/images,{tmp_path}/again}}/00000.tar", "resolution": SIDE}
    with pytest.raises(DataError, match=r"several image shards each, first 00000\.tar"):
        encode(settings(place, "none", images=both))


def test_on_s3_the_objects_are_the_same_bytes(place, s3_url):
    images_url, output = f"{s3_url}/images", f"{s3_url}/latents"
    for name, data in content(place, "images").items():
        open_store(images_url).write(name, data)
    section = {"shards": f"{images_url}/{{00000..{SHARDS - 1:05d}}}.tar", "resolution": SIDE, "holdout": 0.2}
    for i in range(2):
        summary = encode(settings(place, "", images=section).model_copy(update={"output": output}), (i, 2))
    assert load_manifest(f"{output}/manifest.json") == summary.manifests[0]
    store = open_store(output)
    there = {entry.name: store.read(entry.name) for entry in store.list()}
    assert without_places(there) == without_places(content(place, "undisturbed"))


def test_an_error_in_a_stage_ends_the_job(place, tmp_path):
    """The fetching thread's error arrives here, and no thread keeps the process alive."""
    shutil.copytree(place / "images", tmp_path / "images")
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"))

    def lose(snapshot: Snapshot) -> None:
        if snapshot.shards == 0:
            (tmp_path / "images" / "00004.tar").unlink(missing_ok=True)

    with pytest.raises(Exception, match=r"00004\.tar"):
        encode(config, progress=lose)
    assert "manifest.json" not in content(tmp_path, "out")


def test_several_resolutions_in_one_pass_are_those_of_one_each(place, tmp_path):
    """Fetched and decoded once; each with its manifest; where one lacks a shard, that one alone is encoded."""
    section = {"shards": str(place / "images"), "resolution": (SIDE, 16), "holdout": 0.2}
    summary = encode(settings(tmp_path, "both", images=section, autoencoder=str(place / "vae")))
    assert [m.fingerprint.resolution for m in summary.manifests] == [SIDE, 16]
    assert content(tmp_path / "both", str(SIDE)) == content(place, "undisturbed")
    small = settings(tmp_path, "small", images={**section, "resolution": 16}, autoencoder=str(place / "vae"))
    encode(small)
    assert content(tmp_path / "both", "16") == content(tmp_path, "small")
    (tmp_path / "both" / "16" / "00001.tar.receipt.json").unlink()
    again = encode(settings(tmp_path, "both", images=section, autoencoder=str(place / "vae")))
    assert again.encoded == 1
    assert content(tmp_path / "both", "16") == content(tmp_path, "small")


def test_buckets_captions_flips_and_filters(place, tmp_path):
    """Each picture in the bucket nearest to its shape, encoded as diffusers does; unwanted ones are counted apart."""
    tar = TarBuilder()
    shapes = {"wide": (32, 64), "tall": (64, 32), "square": (48, 48), "tiny": (4, 9), "sliver": (8, 300)}
    for key, (height, width) in shapes.items():
        rng = np.random.default_rng(len(key))
        tar.add(f"{key}.png", images.png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        tar.add(f"{key}.json", json.dumps({"caption": ["one", "a second"], "punsafe": 0.0}).encode())
    for key, metadata in (("unsafe", {"punsafe": 0.9}), ("unknown", {}), ("wordless", {"punsafe": 0, "caption": "x"})):
        tar.add(f"{key}.png", picture(1))
        tar.add(f"{key}.json", json.dumps({"caption": "a caption", **metadata}).encode())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.tar").write_bytes(tar.finish())
    section = {
        "shards": str(tmp_path / "images"),
        "resolution": SIDE,
        "buckets": {"step": 8, "max_aspect": 2.0},
        "flip": True,
        "filters": {"max_aspect": 4.0, "min_caption_chars": 2, "where": "punsafe < 0.5"},
    }
    config = settings(tmp_path, "out", images=section, autoencoder=str(place / "vae"), max_reject_rate=0.0)
    summary = encode(config)
    manifest = summary.manifests[0]
    assert manifest.rejects == {
        "filtered_where": 2,
        "filtered_caption": 1,
        "filtered_aspect": 1,
        "filtered_upscale": 1,
    }
    assert summary.tallies[0].unwanted == 5
    assert "3 pictures, 0 rejected, 5 left out by filters in 1 shards" in str(summary)
    assert list(manifest.buckets()) == [(24, 40), (32, 32), (40, 24)]
    reference = AutoencoderKL.from_pretrained(place / "vae").eval()
    for sample in webdataset.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False).decode():
        key, bucket = sample["__key__"], tuple(sample["json"]["bucket"])
        height, width = shapes[key]
        rng = np.random.default_rng(len(key))
        pixels = images.cover(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), bucket)
        assert sample["size.npy"][:2].tolist() == [height, width]
        assert sample["json"]["captions"] == ["one", "a second"]
        for name, seen in (("latent.npy", pixels), ("latent_flip.npy", pixels[:, ::-1].copy())):
            with torch.no_grad():
                tensor = torch.from_numpy(seen / 255.0).float().permute(2, 0, 1)[None] * 2 - 1
                expected = reference.encode(tensor).latent_dist.parameters[0].numpy()
            np.testing.assert_allclose(sample[name].astype(np.float32), expected, rtol=2e-3, atol=2e-3)


def test_a_source_that_was_replaced_at_the_same_size_is_encoded_again(place, tmp_path, caplog):
    shutil.copytree(place / "images", tmp_path / "images")
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"))
    encode(config)
    before = content(tmp_path, "out")
    changed = bytearray((tmp_path / "images" / "00002.tar").read_bytes())
    at = changed.index(b"picture 3 of 2")
    changed[at : at + 7] = b"PICTURE"
    (tmp_path / "images" / "00002.tar").write_bytes(changed)
    os.utime(tmp_path / "images" / "00003.tar", ns=(1, 1))  # touched, not changed
    assert encode(config).encoded == 1
    assert any("00002.tar has changed" in message for message in caplog.messages)
    assert {name for name, data in content(tmp_path, "out").items() if data != before[name]} == {
        "00002.tar",
        "00002.tar.receipt.json",
        "00003.tar.receipt.json",  # it knows the source's new version
        "manifest.json",
    }
    assert encode(config).encoded == 0


def test_repeated_keys_across_shards_are_used(place, tmp_path):
    """Workers do not talk to each other; `lathe verify` names the keys."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.tar").write_bytes(image_shard(0))
    summary = encode(settings(tmp_path, "out", autoencoder=str(place / "vae")))
    assert summary.tallies[0].samples == 2 * PER_SHARD


def test_shards_of_one_name_are_told_by_their_folders(place, tmp_path):
    for part in ("a", "b"):
        shutil.copytree(place / "images", tmp_path / "images" / part)
    section = {"shards": f"{tmp_path}/images/*/0000[01].tar", "resolution": SIDE, "shard_name_parts": 2}
    manifest = encode(settings(tmp_path, "out", images=section, autoencoder=str(place / "vae"))).manifests[0]
    assert [shard.name for shard in manifest.shards] == ["a/00000.tar", "a/00001.tar", "b/00000.tar", "b/00001.tar"]
    assert manifest.shards[0].sha256 != manifest.shards[2].sha256  # KEY.json names the source shard


def test_what_was_taken_down_stays_out(place, tmp_path):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    encode(config)
    (tmp_path / "out" / "removed.txt").write_text("0000003\n00002.tar\t0020004\n00002.tar\t0030001\nzz1\n")
    summary = encode(config)
    assert summary.encoded == 2
    assert summary.manifests[0].rejects == {"no_image": 1, "not_an_image": 1, "removed": 2}
    assert summary.tallies[0].samples == SHARDS * PER_SHARD + 1 - 2
    assert "2 rejected, 2 taken down in 5 shards (2 encoded now); manifest written" in str(summary)


def test_the_first_failing_upload_ends_the_job(place, tmp_path):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    (tmp_path / "out" / "00001.tar").mkdir(parents=True)  # a folder where a shard is to go
    with pytest.raises(StorageError, match=r"00001\.tar"):
        encode(config)
    (tmp_path / "out" / "00001.tar").rmdir()
    encode(config)
    assert content(tmp_path, "out") == content(place, "undisturbed")


def wordless_shard(seed: int) -> bytes:
    tar = TarBuilder()
    for i in range(PER_SHARD):
        tar.add(f"w{seed:03d}{i:04d}.png", picture(i))
    return bytes(tar.finish())


def test_a_mistake_that_rejects_everything_ends_the_job_early(place, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        (tmp_path / "images" / f"{i:05d}.tar").write_bytes(wordless_shard(i))
    with pytest.raises(DataError, match=r"were rejected \(no_caption"):
        encode(settings(tmp_path, "out", autoencoder=str(place / "vae")))
    done = [name for name in content(tmp_path, "out") if name.endswith(".receipt.json")]
    assert 8 <= len(done) <= 16  # 100 samples are 8 shards; a few more were under way


def test_whether_the_job_fails_does_not_depend_on_the_number_of_workers(place, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        bad = tuple((f"bad{n}.{kind}", b"x") for n in range(5) for kind in ("png", "txt")) if i == 3 else ()
        (tmp_path / "images" / f"{i}.tar").write_bytes(image_shard(i, bad))
    for workers in (1, 4):
        config = settings(tmp_path, f"by-{workers}", autoencoder=str(place / "vae"), max_reject_rate=0.1)
        for i in range(workers):
            summary = encode(config, (i, workers))
        assert len(summary.manifests) == 1
    assert content(tmp_path, "by-1") == content(tmp_path, "by-4")


@pytest.mark.parametrize("output", ["data", "data/a", "data/."])
def test_an_output_never_overwrites_image_shards(place, tmp_path, output):
    shutil.copytree(place / "images", tmp_path / "data" / "a")
    before = content(tmp_path / "data", "a")
    section = {"shards": f"{tmp_path}/data/*/*.tar", "resolution": SIDE, "shard_name_parts": 2}
    with pytest.raises(ConfigError, match="is where the image shards are"):
        encode(settings(tmp_path, output, images=section, autoencoder=str(place / "vae")))
    assert content(tmp_path / "data", "a") == before


def test_an_output_below_the_pattern_is_no_source(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "data" / "a")
    section = {"shards": f"{tmp_path}/data/**/*.tar", "resolution": SIDE}
    config = settings(tmp_path, "data/latents", images=section, autoencoder=str(place / "vae"))
    assert encode(config).encoded == SHARDS
    again = encode(config)
    assert (again.encoded, again.shards) == (0, SHARDS)


def test_shards_added_while_a_worker_runs_are_not_forgotten(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    late = (tmp_path / "images" / "00004.tar").rename(tmp_path / "late.tar")
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"))

    def add(snapshot: Snapshot) -> None:
        if late.exists():
            late.rename(tmp_path / "images" / "00004.tar")

    summary = encode(config, progress=add)
    assert (summary.waiting, summary.manifests) == (1, ())
    assert len(encode(config).manifests[0].shards) == SHARDS


def test_a_takedown_while_a_worker_runs_is_heeded(place, tmp_path):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))

    def take_down(snapshot: Snapshot) -> None:
        (tmp_path / "out" / "removed.txt").write_text("0000003\n")

    with pytest.raises(DataError, match=r"1 of 5 latent shards are missing: 00000\.tar"):
        encode(config, progress=take_down)
    summary = encode(config)
    assert (summary.encoded, summary.tallies[0].removed) == (1, 1)


def test_two_jobs_with_other_settings_cannot_both_have_an_output(place, tmp_path):
    """The second claims an output that has no shard yet; the first notices before it commits one."""
    images_section = settings(place, "").images
    first = settings(tmp_path, "out", images=images_section, autoencoder=str(place / "vae"))
    second = first.model_copy(update={"text": EncodeTextConfig(context_length=24)})

    def claim_too(snapshot: Snapshot) -> None:
        claim(second, Encoder(second))

    with pytest.raises(DataError, match="was claimed meanwhile by a job with other settings"):
        encode(first, progress=claim_too)
    encode(second)
    assert load_manifest(str(tmp_path / "out" / "manifest.json")).context_length == 24
    assert read_npy(content(tmp_path, "out")["empty.tokens.clip.npy"]).shape == (24,)
    with pytest.raises(DataError, match="these differ: text_towers"):
        encode(first)


def test_a_shard_never_stands_beside_the_receipt_of_another(place, tmp_path):
    """A straggler of an earlier array, on other hardware, finds the shard committed and leaves it."""
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    target = claim(config, Encoder(config))[0]
    encode(config)
    before = content(tmp_path, "out")
    receipt = load_receipt(target.store, "00002.tar.receipt.json")
    other = receipt.model_copy(update={"sha256": "0" * 64, "environment": {"device": "another"}})
    assert commit(target, b"x" * receipt.bytes, other) == receipt
    assert content(tmp_path, "out") == before


def test_one_resolution_that_cannot_be_folded_does_not_cost_the_others(place, tmp_path):
    section = {"shards": str(place / "images"), "resolution": (256, SIDE)}
    told = {"discovery": str(tmp_path / "targets")}
    with pytest.raises(DataError, match="no picture of 256 px is left to train on"):
        encode(settings(tmp_path, "out", images=section, autoencoder=str(place / "vae"), metrics=told))
    assert list((tmp_path / "targets").iterdir())  # the command has failed: somebody is to notice
    assert load_manifest(str(tmp_path / "out" / str(SIDE) / "manifest.json")).samples("train") == 66


def test_what_killed_workers_left_in_a_folder_is_swept_up(place, tmp_path):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    (tmp_path / "out").mkdir()
    names = ("00001.tar", "00002.tar.receipt.json", "manifest.json", "encoding.json", "empty.tokens.clip.npy")
    for name in (*names, "removed.txt", "rejects.jsonl"):
        (tmp_path / "out" / f".{name}.0123456789ab.partial").write_bytes(b"half")
    encode(config)
    assert content(tmp_path, "out") == content(place, "undisturbed")


def test_a_source_that_was_damaged_since_does_not_cost_its_latents(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    config = settings(tmp_path, "out", autoencoder=str(place / "vae"), max_reject_rate=0.9)
    encode(config)
    before = content(tmp_path, "out")
    with (tmp_path / "images" / "00003.tar").open("r+b") as shard:
        shard.truncate(9000)
    with pytest.raises(DataError, match=r"00003\.tar was whole when it was encoded, and is damaged now"):
        encode(config)
    assert content(tmp_path, "out") == before
    (tmp_path / "out" / "00003.tar.receipt.json").unlink()
    assert encode(config).manifests[0].rejects["shard_damaged"] == 1


def test_rejects_are_a_share_of_all_samples_also_of_those_that_filters_leave_out(place, tmp_path):
    tar = TarBuilder()
    for i in range(40):
        tar.add(f"{i}.png", picture(i))
        if i:
            tar.add(f"{i}.json", json.dumps({"caption": "words", "q": i}).encode())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.tar").write_bytes(tar.finish())
    section = {"shards": str(tmp_path / "images"), "resolution": SIDE, "filters": {"where": "q < 6"}}
    config = settings(tmp_path, "out", images=section, autoencoder=str(place / "vae"), max_reject_rate=0.03)
    assert encode(config).tallies[0].samples == 5
    with pytest.raises(DataError, match="1 of 40 pictures were rejected"):
        encode(config.model_copy(update={"max_reject_rate": 0.02}))


def test_finalize_refuses_other_settings(place, tmp_path):
    shutil.copytree(place / "undisturbed", tmp_path / "out")
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    images_section, text = config.images.model_copy(update={"holdout": 0.3}), EncodeTextConfig(context_length=24)
    other = config.model_copy(update={"images": images_section, "text": text})
    with pytest.raises(DataError, match="these differ: holdout, context_length"):
        finalize(other)


def test_latents_whose_claim_is_gone_are_known_by_their_receipts(place, tmp_path):
    shutil.copytree(place / "undisturbed", tmp_path / "out")
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    (tmp_path / "out" / "encoding.json").write_text("{")
    with pytest.raises(DataError, match=r"encoding\.json cannot be read") as caught:
        encode(config)
    assert "delete it" in caught.value.remedy
    (tmp_path / "out" / "encoding.json").unlink()
    with pytest.raises(DataError, match="holds latents that were made otherwise"):
        encode(config.model_copy(update={"text": EncodeTextConfig(context_length=24)}))
    assert encode(config).encoded == 0
    assert content(tmp_path, "out") == content(place, "undisturbed")


def test_a_claim_that_stays_empty_is_none(place, tmp_path, monkeypatch):
    """Its worker was killed as it made the file, in a folder without hard links."""
    monkeypatch.setattr("pipeline.encode.claim._EMPTY_SECONDS", 0.05)
    shutil.copytree(place / "undisturbed", tmp_path / "out")
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    (tmp_path / "out" / "encoding.json").write_bytes(b"")
    with pytest.raises(DataError, match="nothing was encoded here"):
        finalize(config)
    with pytest.raises(DataError, match="holds latents that were made otherwise"):
        encode(config.model_copy(update={"text": EncodeTextConfig(context_length=24)}))
    assert encode(config).encoded == 0
    assert content(tmp_path, "out") == content(place, "undisturbed")


def test_a_claim_that_is_being_written_is_waited_for(place, tmp_path, monkeypatch):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    theirs = {**json.loads(content(place, "undisturbed")["encoding.json"]), "autoencoder": "theirs"}
    (tmp_path / "out").mkdir()
    file, encoder = tmp_path / "out" / "encoding.json", Encoder(config)
    file.touch()
    monkeypatch.setattr("pipeline.encode.claim.time.sleep", lambda seconds: file.write_text(json.dumps(theirs)))
    assert claim(config, encoder)[0].encoding.autoencoder == "theirs"
    assert json.loads(file.read_bytes()) == theirs


def test_a_takedown_list_of_another_editor_is_heeded(place, tmp_path):
    config = settings(tmp_path, "out", images=settings(place, "").images, autoencoder=str(place / "vae"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "removed.txt").write_bytes(b"\xef\xbb\xbf0000003\r\n")
    assert encode(config).tallies[0].removed == 1


def test_a_link_to_nowhere_is_told(place, tmp_path, caplog):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "00009.tar").symlink_to("annex")
    assert encode(settings(tmp_path, "out", autoencoder=str(place / "vae"))).shards == SHARDS
    assert any("00009.tar is a link to a file that is not there" in message for message in caplog.messages)


def test_a_shard_spelled_in_two_ways_is_one(place, tmp_path):
    section = {"shards": (f"{place}/images", f"{place}/./images/*.tar"), "resolution": SIDE}
    assert encode(settings(tmp_path, "out", images=section, autoencoder=str(place / "vae"))).shards == SHARDS


def test_the_manifest_tells_addresses_that_hold_from_other_folders(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    section = {"shards": "images", "resolution": SIDE}
    manifest = encode(settings(tmp_path, "out", images=section, autoencoder="vae")).manifests[0]
    assert (manifest.autoencoder, manifest.images) == (str(place / "vae"), (str(place / "images"),))


@pytest.mark.parametrize("autoencoder", ["~nobody-of-this-name/vae", "x" * 300, "/" + "y" * 300])
def test_an_autoencoder_that_cannot_be_a_path(place, tmp_path, autoencoder):
    with pytest.raises((DataError, StorageError), match=r"nobody|no such folder|too long"):
        encode(settings(tmp_path, "out", images=settings(place, "").images, autoencoder=autoencoder))
