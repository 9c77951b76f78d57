from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from latent_set import (
    CHANNELS,
    HOLDOUT,
    PER_SHARD,
    SHARDS,
    build,
    encode_settings,
    key,
    save_autoencoder,
    write_pictures,
)

from pipeline.data.fold import fold, provenance
from pipeline.data.manifest import key_hash, load_manifest, load_receipt
from pipeline.data.samples import is_holdout
from pipeline.encode.encoder import Encoder
from pipeline.encode.job import encode
from pipeline.encode.takedown.job import _Survey, read_keys, remove
from pipeline.encode.takedown.keys import Takedown, read_takedown
from pipeline.encode.verify.job import verify
from pipeline.errors import DataError, StorageError
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore

ASKED = [key(0, 1), key(0, 2), key(0, 3), f"00002.tar\t{key(2, 5)}", f"00000.tar\t{key(2, 6)}", "nobody"]
GONE = {key(0, 1), key(0, 2), key(0, 3), key(2, 5)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("remove")
    write_pictures(place / "images")
    save_autoencoder(place / "vae")
    build(place)
    return place


@pytest.fixture
def copy(place, tmp_path) -> Path:
    return shutil.copytree(place / "latents", tmp_path / "latents")


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory) -> dict[str, bytes]:
    """The files after an undisturbed removal."""
    folder = shutil.copytree(place / "latents", tmp_path_factory.mktemp("undisturbed") / "latents")
    remove(f"{folder}/manifest.json", ASKED)
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_rest_is_as_if_the_samples_had_never_been_encoded(place, copy, tmp_path):
    summary = remove(f"{copy}/manifest.json", ASKED)
    assert (summary.removed, summary.shards, summary.already) == (4, 2, 0)
    assert summary.unknown == (f"00000.tar\t{key(2, 6)}", "nobody")

    (tmp_path / "fresh").mkdir()
    for name in ("images", "vae"):
        (tmp_path / "fresh" / name).symlink_to(place / name)
    build(tmp_path / "fresh", alter=lambda _, samples: [(s, h) for s, h in samples if s.key not in GONE])
    fresh, store = open_store(str(tmp_path / "fresh" / "latents")), open_store(str(copy))
    for shard in range(SHARDS):
        name = f"{shard:05d}.tar"
        assert store.read(name) == fresh.read(name)
        one, other = (load_receipt(where, f"{name}.receipt.json") for where in (store, fresh))
        removed = [reject.key for reject in one.rejects if reject.reason == "removed"]
        assert set(removed) == {gone for gone in GONE if gone.startswith(f"{shard:02d}")}
        assert one.model_copy(update={"rejects": other.rejects}) == other
    one, other = load_manifest(f"{copy}/manifest.json"), load_manifest(f"{tmp_path}/fresh/latents/manifest.json")
    assert (one.mean, one.std, one.shards, one.content_hash) == (
        other.mean,
        other.std,
        other.shards,
        other.content_hash,
    )
    assert one.rejects == {"no_caption": 3, "removed": 4}
    assert one.content_hash != load_manifest(f"{place}/latents/manifest.json").content_hash


def test_what_is_left_is_verified_and_noted(copy):
    remove(f"{copy}/manifest.json", ASKED)
    report = verify(f"{copy}/manifest.json", decode=6)
    assert report.ok, str(report)
    assert "38 keys" in str(report)
    takedown = read_takedown(open_store(str(copy)))
    assert takedown.holds("00001.tar", "nobody")
    assert (copy / "removed.txt").read_text() == "".join(f"{line}\n" for line in sorted(ASKED))
    lines = [json.loads(line) for line in (copy / "rejects.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines if line["reason"] == "removed"} == GONE


def test_untouched_files_stay_and_a_second_run_writes_nothing(place, copy):
    remove(f"{copy}/manifest.json", ASKED)
    changed = {name for name, data in files(copy).items() if files(place / "latents").get(name) != data}
    rewritten = {f"{shard}.tar{suffix}" for shard in ("00000", "00002") for suffix in ("", ".receipt.json")}
    assert changed == rewritten | {"removed.txt", "rejects.jsonl", "manifest.json"}
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    summary = remove(f"{copy}/manifest.json", ASKED)
    assert (summary.removed, summary.already, summary.shards, len(summary.unknown)) == (0, 4, 0, 2)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_in_two_steps_it_gives_the_same_latents(copy, undisturbed):
    remove(f"{copy}/manifest.json", ASKED[2:])
    remove(f"{copy}/manifest.json", ASKED[:2])
    after = files(copy)
    assert {name: data for name, data in after.items() if data != undisturbed[name]} == {}
    assert after.keys() == undisturbed.keys()


class Neighbours(Encoder):
    """Latents know their batch, as on many devices, and far more than in their last places."""

    def start(self, pixels, flip):
        moments, flipped = super().start(pixels, flip).result()
        shift = np.float16(int(pixels.astype(np.int64).sum()) % 97)
        return SimpleNamespace(result=lambda: (moments + shift, flipped + shift))


def test_what_is_encoded_anew_later_has_the_very_bytes_that_a_takedown_left(place, tmp_path):
    config = encode_settings(place, tmp_path / "out")
    encode(config, encoder=Neighbours(config))
    asked = [key(1, 0), key(1, 5), f"00002.tar\t{key(2, 3)}", "bad1"]
    assert remove(f"{tmp_path}/out/32/manifest.json", asked).removed == 3
    assert remove(f"{tmp_path}/out/48/manifest.json", asked).removed == 3
    left = {side: files(tmp_path / "out" / side) for side in ("32", "48")}
    receipt = load_receipt(open_store(f"{tmp_path}/out/32"), "00001.tar.receipt.json")
    assert {one.key: one.reason for one in receipt.rejects} == {
        key(1, 0): "removed",
        key(1, 5): "removed",
        "bad1": "no_caption",
    }
    for name in ("32/00001.tar", "32/00001.tar.receipt.json", "48/00002.tar.receipt.json", "48/00002.tar"):
        (tmp_path / "out" / name).unlink()
    assert encode(config, encoder=Neighbours(config)).encoded == 2
    for side, expected in left.items():
        again = files(tmp_path / "out" / side)
        assert {name: data for name, data in again.items() if data != expected[name]} == {}
        assert again.keys() == expected.keys()
    for side in left:
        (tmp_path / "fresh" / side).mkdir(parents=True)
        (tmp_path / "fresh" / side / "removed.txt").write_bytes(left[side]["removed.txt"])
    encode(encode_settings(place, tmp_path / "fresh"), encoder=Neighbours(config))
    assert {side: files(tmp_path / "fresh" / side) for side in left} == left


def test_a_dry_run_writes_nothing(place, copy):
    summary = remove(f"{copy}/manifest.json", ASKED, dry_run=True)
    assert (summary.removed, summary.shards) == (4, 2)
    assert "would be taken down" in str(summary)
    assert files(copy) == files(place / "latents")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_killed_at_any_write_and_run_again_it_gives_the_same_bytes(place, tmp_path, monkeypatch, undisturbed, written):
    """From the n-th write on nothing more gets through; the n-th itself, or not."""
    writes = 0
    limit = 1 << 30

    def failing(method):
        def call(self, *args, **options):
            nonlocal writes
            writes += 1
            if writes > limit or (writes == limit and not written):
                raise Killed
            result = method(self, *args, **options)
            if writes == limit:
                raise Killed
            return result

        return call

    monkeypatch.setattr(LocalStore, "write", failing(LocalStore.write))
    monkeypatch.setattr(LocalStore, "upload", failing(LocalStore.upload))
    total = 7  # removed.txt, two shards with receipts, rejects, manifest
    for number in range(1, total + 1):
        folder = shutil.copytree(place / "latents", tmp_path / str(number))
        writes, limit = 0, number
        with pytest.raises(Killed):
            remove(f"{folder}/manifest.json", ASKED)
        writes, limit = 0, 1 << 30
        noted = (folder / "removed.txt").exists()
        remove(f"{folder}/manifest.json", ["nobody"] if noted else ASKED)  # what was asked for is noted first
        assert files(folder) == undisturbed
    folder = shutil.copytree(place / "latents", tmp_path / "whole")
    writes = 0
    remove(f"{folder}/manifest.json", ASKED)
    assert writes == total


@pytest.fixture
def kill(monkeypatch):
    """Removes, and is killed where it would write the first file of this suffix."""

    def call(folder: Path, asked: list[str], suffix: str) -> None:
        whole = LocalStore.write

        def write(self, name, *args, **options):
            if name.endswith(suffix):
                raise Killed
            return whole(self, name, *args, **options)

        monkeypatch.setattr(LocalStore, "write", write)
        with pytest.raises(Killed):
            remove(f"{folder}/manifest.json", asked)
        monkeypatch.undo()

    return call


def test_killed_runs_with_more_keys_later(copy, kill):
    """Twice the receipt knows of a takedown and the shard of none, and then another sample is to go."""
    kill(copy, [key(0, 1)], "00000.tar")
    kill(copy, [key(0, 2)], "00000.tar")
    assert load_receipt(open_store(str(copy)), "00000.tar.receipt.json").samples() == PER_SHARD - 2
    summary = remove(f"{copy}/manifest.json", [key(0, 1), key(0, 3)])
    assert (summary.removed, summary.already, summary.unknown) == (1, 1, ())
    report = verify(f"{copy}/manifest.json", decode=0)
    assert report.status == "ok", str(report)


def test_damage_is_not_given_new_checksums(copy):
    data = bytearray((copy / "00002.tar").read_bytes())
    data[5000] ^= 1
    (copy / "00002.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"00002.tar is not what its receipt says"):
        remove(f"{copy}/manifest.json", ASKED)
    assert (copy / "00002.tar").read_bytes() == data


@pytest.mark.parametrize("number", range(PER_SHARD))
def test_damage_is_found_in_whatever_a_killed_run_has_left(copy, kill, number):
    """In every sample: in the block that is to lose one too, and in others."""
    kill(copy, [key(1, 0)], "00001.tar")
    data = bytearray((copy / "00001.tar").read_bytes())
    data[data.index(f"{key(1, number)}.latent.npy".encode()) + 512 + 200] ^= 1
    (copy / "00001.tar").write_bytes(data)
    if number == 0:  # what is to go may be damaged
        remove(f"{copy}/manifest.json", [])
        assert verify(f"{copy}/manifest.json", decode=0).status == "ok"
        return
    with pytest.raises(DataError, match="its checksum is another") as caught:
        remove(f"{copy}/manifest.json", [])
    assert "delete shard and receipt" in caught.value.remedy
    assert (copy / "00001.tar").read_bytes() == data


def test_a_shard_that_lost_a_sample_its_receipt_has_is_refused(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    remove(f"{other}/manifest.json", [key(1, 0)])
    shutil.copy(other / "00001.tar", copy)
    before = files(copy)
    with pytest.raises(DataError, match=r"sample \d+ is missing") as caught:
        remove(f"{copy}/manifest.json", [key(1, 0)])
    assert "delete shard and receipt" in caught.value.remedy
    assert {name: data for name, data in files(copy).items() if name != "removed.txt"} == before


def test_what_a_killed_job_has_added_is_taken_down_too(copy):
    """The last shard and its receipt are there, and the manifest does not know of them yet."""
    store, manifest = open_store(str(copy)), load_manifest(f"{copy}/manifest.json")
    receipts = [load_receipt(store, shard.receipt) for shard in manifest.shards]
    store.write("manifest.json", fold(receipts[:-1], provenance(manifest)).to_bytes())
    last = receipts[-1]
    foreign = last.model_copy(update={"fingerprint": "another", "shard": "a.tar"})
    copied = json.loads(last.to_bytes())
    others = {
        "a.tar.receipt.json": foreign.to_bytes(),
        "backup/00002.tar.receipt.json": last.to_bytes(),
        "old.tar.receipt.json": json.dumps({**copied, "fingerprint": "f", "format_version": 1}).encode(),
        "b.tar.receipt.json": b"none of ours",
    }
    for name, data in others.items():
        store.write(name, data)
    before = store.read("manifest.json")
    gone = key(SHARDS - 1, 5)
    assert remove(f"{copy}/manifest.json", [gone], dry_run=True).removed == 1
    summary = remove(f"{copy}/manifest.json", [gone])
    assert (summary.removed, summary.shards, summary.unknown) == (1, 1, ())
    changed = load_receipt(store, f"{last.shard}.receipt.json")
    assert key_hash(gone) not in changed.hashes()
    assert gone.encode() not in store.read(last.shard)
    assert hashlib.sha256(store.read(last.shard)).hexdigest() == changed.sha256
    assert store.read("manifest.json") == before
    assert {name: store.read(name) for name in others} == others
    again = remove(f"{copy}/manifest.json", [gone])
    assert (again.removed, again.already, again.shards) == (0, 1, 0)


def test_hundreds_of_thousands_of_keys_cost_each_shard_no_more_than_its_own(copy):
    (copy / "removed.txt").write_text("".join(f"00000.tar\tgone {i}\n" for i in range(100_000)))
    takedown = read_takedown(open_store(str(copy)))
    receipt = load_receipt(open_store(str(copy)), "00000.tar.receipt.json")
    for asked in (takedown, takedown | Takedown(f"gone {i}" for i in range(100_000))):
        survey = _Survey([], asked, {})
        start = time.process_time()
        for _ in range(90):
            survey.add(receipt, is_listed=True)
            assert not asked.touches(receipt)
            assert not asked.holds("00000.tar", "x")
        assert time.process_time() - start < 0.5


def test_a_key_that_is_not_utf_8_is_told_in_one_line(copy):
    before = files(copy)
    with pytest.raises(DataError, match=r"'caf\\udce9' is no key: it is not UTF-8") as caught:
        remove(f"{copy}/manifest.json", [key(0, 1), "caf\udce9"])
    assert caught.value.remedy
    assert files(copy) == before


@pytest.mark.parametrize("change", ["cut", "exchanged"])
def test_a_shard_that_is_another_is_left_alone(copy, change):
    other = (copy / "00001.tar").read_bytes()
    (copy / "00000.tar").write_bytes(other if change == "exchanged" else other[:3000])
    with pytest.raises(DataError, match=r"00000.tar is not what its receipt says: .*(missing|tar)") as caught:
        remove(f"{copy}/manifest.json", [key(0, 0)])
    assert "lathe encode" in caught.value.remedy


def test_a_whole_shard_and_the_whole_data_set(copy):
    shard = [key(1, i) for i in range(PER_SHARD)]
    assert remove(f"{copy}/manifest.json", shard).removed == PER_SHARD
    receipt = load_receipt(open_store(str(copy)), "00001.tar.receipt.json")
    assert (receipt.bytes, receipt.buckets, receipt.blocks, receipt.statistics.count) == (1024, (), (), 0)
    assert receipt.statistics.sum == (0.0,) * CHANNELS
    assert verify(f"{copy}/manifest.json", decode=0).ok
    before = files(copy)
    trained = [key(s, i) for s in range(SHARDS) for i in range(PER_SHARD) if not is_holdout(key(s, i), HOLDOUT)]
    with pytest.raises(DataError, match="no picture would be left to train on"):
        remove(f"{copy}/manifest.json", trained)
    assert files(copy) == before


def test_other_resolutions_are_told(place, tmp_path):
    shutil.copytree(place / "latents", tmp_path / "32")
    for name in ("64", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    summary = remove(f"{tmp_path}/32/manifest.json", ASKED, dry_run=True)
    assert summary.siblings == (f"{tmp_path}/64/manifest.json",)
    assert f"{tmp_path}/64/manifest.json" in str(summary)


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_bytes("\ufeffa/é\r\n\n00001.tar\tb\n".encode())
    assert read_keys(str(path)) == ["a/é", "00001.tar\tb"]
    for content, said in ((b"\n\n", "names no key"), (b"\xff\n", "is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_keys(str(path))
    with pytest.raises(StorageError):
        read_keys(str(tmp_path / "nothing"))


def test_on_s3(place, s3_url):
    store = open_store(s3_url)
    for path in (place / "latents").iterdir():
        store.upload(path, path.name)
    assert remove(f"{s3_url}/manifest.json", ASKED).removed == 4
    assert verify(f"{s3_url}/manifest.json", decode=0).status == "ok"
