from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_set import (
    CHANNELS,
    HOLDOUT,
    SHARDS,
    TOKENIZER,
    build,
    encode_settings,
    key,
    save_autoencoder,
    write_pictures,
)
from PIL import ImageFont
from small_models import clip, save_clip

from pipeline.data import images
from pipeline.data.fold import fold, provenance
from pipeline.data.manifest import load_manifest, load_receipt
from pipeline.data.samples import is_holdout
from pipeline.data.tar import npy_bytes
from pipeline.encode.captions import CaptionEncoder
from pipeline.encode.job import encode
from pipeline.encode.takedown.job import remove
from pipeline.encode.verify import job
from pipeline.encode.verify.job import verify
from pipeline.encode.verify.pictures import PictureCheck
from pipeline.encode.verify.report import VerifyReport
from pipeline.encode.verify.sample import read_sample
from pipeline.errors import DataError, StorageError
from pipeline.models import autoencoder
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from pipeline.storage.s3_client import client

HELD_OUT = next(i for i in range(99) if is_holdout(key(1, i), HOLDOUT))
TRAINED = next(i for i in range(99) if not is_holdout(key(1, i), HOLDOUT))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, two autoencoders, and the latents of the first."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("verify")
    write_pictures(place / "images")
    save_autoencoder(place / "vae", seed=0)
    save_autoencoder(place / "other", seed=1)
    build(place)
    return place


@pytest.fixture
def copy(place, tmp_path) -> Path:
    """The sound latents, to be damaged; pictures and autoencoder are those of `place`."""
    return shutil.copytree(place / "latents", tmp_path / "latents")


def failures(report: VerifyReport) -> dict[str, str]:
    return {check.name: " | ".join(check.said) for check in report.checks if check.status == "fail"}


def rebuilt(place: Path, tmp_path: Path, **how) -> str:
    """Latents made anew, wrongly, with receipts and manifest that agree with them."""
    for name in ("images", "vae", "other"):
        (tmp_path / name).symlink_to(place / name)
    return build(tmp_path, **how)


def test_a_sound_data_set_passes(place, tmp_path):
    report = verify(f"{place}/latents/manifest.json", output=str(tmp_path))
    assert failures(report) == {}
    by_name = {check.name: check for check in report.checks}
    warned = [name for name, check in by_name.items() if check.status == "warn"]
    assert warned in ([], ["pictures"])  # an autoencoder without training decodes to nothing much
    assert report.ok
    assert "42 keys" in by_name["keys"].figure
    compared = by_name["pictures"].measures["samples"]
    assert len(compared) == 8
    assert len({tuple(one["bucket"]) for one in compared}) == 3
    assert max(one["mean_difference"] for one in compared) < 1e-3
    assert json.loads((tmp_path / "verify.json").read_text())["status"] == report.status
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    told = str(report)
    assert "checksums    SHA-256 of 3 shards" in told
    assert re.search(r"manifest.json: \d+ ok.*MB read in", told)
    assert json.loads(report.to_json())["checks"][0]["name"] == "manifest"


def test_labels_of_the_contact_sheet_fit_below_small_pictures(place, tmp_path, monkeypatch):
    seen = []
    whole = images.contact_sheet

    def contact_sheet(pictures, columns, labels):
        seen.extend(zip(pictures, labels, strict=True))
        return whole(pictures, columns, labels)

    monkeypatch.setattr(images, "contact_sheet", contact_sheet)
    verify(f"{place}/latents/manifest.json", decode=4, output=str(tmp_path))
    assert len(seen) == 8
    font = ImageFont.load_default(10)
    for number, (picture, label) in enumerate(seen):
        assert re.fullmatch(r"\d+\.\d dB" if number % 2 else r"\d{5}", label)
        assert font.getlength(label) <= picture.shape[1] == 64


def test_nothing_in_the_data_set_is_written(place):
    before = {path: path.stat().st_mtime_ns for path in (place / "latents").iterdir()}
    verify(f"{place}/latents/manifest.json", decode=2)
    assert {path: path.stat().st_mtime_ns for path in (place / "latents").iterdir()} == before


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / "00001.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "00001.tar").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[: len(data) - 2000])


def lengthen(folder: Path) -> None:
    with (folder / "00001.tar").open("ab") as file:
        file.write(bytes(512))


def swap(folder: Path) -> None:
    one, other = (folder / "00000.tar"), (folder / "00001.tar")
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def edit(name: str, *path: str | int, value) -> object:
    """A change of one field of a JSON file; `value` is a function of the old value."""

    def damage(folder: Path) -> None:
        tree = json.loads((folder / name).read_bytes())
        inner = tree
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value(inner[path[-1]])
        (folder / name).write_text(json.dumps(tree))

    return damage


def doctored_statistics(folder: Path) -> None:
    """Wrong sums in a receipt, and a manifest that was folded from them."""
    edit("00001.tar.receipt.json", "statistics", "sum_variance", 2, value=lambda x: x * (1 + 1e-6))(folder)
    store, manifest = open_store(str(folder)), load_manifest(f"{folder}/manifest.json")
    receipts = [load_receipt(store, shard.receipt) for shard in manifest.shards]
    (folder / "manifest.json").write_bytes(fold(receipts, provenance(manifest)).to_bytes())


RECEIPT = "00001.tar.receipt.json"
DAMAGE = {
    "a flipped byte": (flip_byte, "checksums", r"00001.tar: SHA-256 is \w+.*samples \d+ to \d+: the checksum|samples"),
    "a shard cut short": (truncate, "blocks", r"00001.tar: the file ends in samples \d+ to \d+"),
    "a longer shard": (lengthen, "files", r"00001.tar: \d+ bytes, the manifest says \d+"),
    "swapped shards": (swap, "keys", r"00000.tar: sample 0 is '01\d+', the receipt has another"),
    "a shard missing": (lambda f: (f / "00002.tar").unlink(), "files", "00002.tar: missing"),
    "a receipt missing": (lambda f: (f / RECEIPT).unlink(), "receipts", f"{RECEIPT}: missing"),
    "a receipt cut": (lambda f: (f / RECEIPT).write_text("{"), "receipts", "is not JSON"),
    "another receipt": (
        edit(RECEIPT, "sha256", value=lambda old: "0" * 64),
        "receipts",
        r"receipt.json: sha256 is 0+.*, the manifest says",
    ),
    "another fingerprint": (
        edit(RECEIPT, "fingerprint", value=lambda old: "e" * 64),
        "fingerprint",
        r"00001.tar.receipt.json: of fingerprint eeee",
    ),
    "another encoding.json": (
        edit("encoding.json", "fingerprint", "max_upscale", value=lambda old: 3.0),
        "fingerprint",
        "encoding.json: max_upscale",
    ),
    "a block moved": (
        edit(RECEIPT, "blocks", 1, "offset", value=lambda old: old + 512),
        "blocks",
        r"00001.tar: the block at sample \d+ does not follow",
    ),
    "a block's checksum": (
        edit(RECEIPT, "blocks", 1, "crc32", value=lambda old: old ^ 1),
        "checksums",
        r"00001.tar: samples \d+ to \d+: the checksum is not the receipt's",
    ),
    "ranges that overlap": (
        edit(RECEIPT, "buckets", 1, "train", value=lambda old: [old[0] - 1, old[1]]),
        "split",
        "00001.tar: the receipt's range of bucket 32x32",
    ),
    "wrong mean": (
        edit("manifest.json", "mean", 1, value=lambda old: old + 1e-6),
        "statistics",
        r"mean of channel 1 is \S+, the receipts give",
    ),
    "wrong std": (edit("manifest.json", "std", 3, value=lambda old: 2 * old), "statistics", "std of channel 3 is"),
    "wrong sums": (doctored_statistics, "statistics", r"00001.tar: sum_variance of channel 2 is \S+, the receipt says"),
    "wrong content hash": (
        edit("manifest.json", "content_hash", value=lambda old: "0" * 64),
        "manifest",
        "its content hash is 0000",
    ),
    "wrong count": (
        edit("manifest.json", "shards", 1, "buckets", 0, "train", value=lambda old: old + 1),
        "receipts",
        "00001.tar.receipt.json: buckets is",
    ),
    "rejects of another run": (
        lambda f: (f / "rejects.jsonl").write_text((f / "rejects.jsonl").read_text().replace("bad1", "bad7")),
        "rejects",
        r'line 2 is .*bad7.*, the receipts say .*"bad1"',
    ),
    "a rejects line too many": (
        lambda f: (f / "rejects.jsonl").open("a").write("{}\n"),
        "rejects",
        "more than the 3 lines",
    ),
    "wrong reject counts": (
        edit("manifest.json", "rejects", "no_caption", value=lambda old: 4),
        "rejects",
        "4 samples are no_caption, the receipts have 3",
    ),
    "what was to be taken down": (
        lambda f: (f / "removed.txt").write_text(f"{key(1, 0)}\n"),
        "removed",
        "00001.tar: it still holds",
    ),
    "no empty prompt": (lambda f: (f / "empty.tokens.clip.npy").unlink(), "files", "empty.tokens.clip.npy: missing"),
}


@pytest.mark.parametrize(("damage", "check", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(copy, damage, check, said):
    damage(copy)
    report = verify(f"{copy}/manifest.json", decode=0)
    assert re.search(said, failures(report)[check]), failures(report)
    assert not report.ok
    found = next(one for one in report.checks if one.name == check)
    assert found.remedy
    assert found.remedy in str(report)


def test_of_a_missing_receipt_nothing_else_is_blamed(copy):
    (copy / RECEIPT).unlink()
    assert set(failures(verify(f"{copy}/manifest.json", decode=3))) == {"receipts"}


def change(number: int, **fields):
    """An alteration of one sample of shard 1; `holdout` moves it to the other split."""

    def alter(shard, samples):
        for sample, held_out in samples:
            if shard == 1 and sample.key == key(1, number):
                new = {name: value(sample) for name, value in fields.items() if name != "holdout"}
                yield dataclasses.replace(sample, **new), fields.get("holdout", held_out)
            else:
                yield sample, held_out

    return alter


def with_nan(moments):
    moments = moments.copy()
    moments[1, 2, 3] = np.nan
    return moments


def twice(shard, samples):
    return [*samples, samples[0]] if shard == 1 else samples


def in_two_shards(shard, samples):
    if shard == 2:
        samples.append((dataclasses.replace(samples[0][0], key=key(1, TRAINED)), False))
    return samples


TOKENS = ({"tokens.clip": np.zeros(7, np.uint16)},)
WRONG = {
    "NaN": (change(HELD_OUT, moments=lambda s: with_nan(s.moments)), "finite", r"latent.npy has 1 numbers of \d+"),
    "infinity when mirrored": (
        change(TRAINED, flipped=lambda s: np.full_like(s.flipped, np.inf)),
        "finite",
        r"latent_flip.npy has \d+ numbers",
    ),
    "another dtype": (
        change(TRAINED, moments=lambda s: s.moments.astype(np.float32)),
        "samples",
        r"latent.npy is float32 .*, not float16",
    ),
    "another shape": (
        change(TRAINED, flipped=lambda s: s.flipped[:, :-1]),
        "samples",
        rf"latent_flip.npy is float16 \[{2 * CHANNELS}, ",
    ),
    "too few tokens": (
        change(TRAINED, captions=lambda s: ("a",), text=lambda s: TOKENS),
        "samples",
        r"tokens0.clip.npy is uint16 \[7\], not uint16 \[8\]",
    ),
    "no flip": (change(TRAINED, flipped=lambda s: None), "samples", r"lacks latent_flip.npy"),
    "a caption without tokens": (
        change(TRAINED, captions=lambda s: ("a", "b", "c")),
        "samples",
        r"lacks .*tokens2.clip.npy",
    ),
    "a size of another bucket": (
        change(TRAINED, size=lambda s: s.size[[0, 1, 2, 3, 5, 3]]),
        "samples",
        r"size.npy names a target of",
    ),
    "a training sample held out": (
        change(TRAINED, holdout=True),
        "split",
        "stands among the held-out samples, wrongly",
    ),
    "hold-out among training": (change(HELD_OUT, holdout=False), "split", "stands among the training samples, wrongly"),
    "one key twice in a shard": (twice, "keys", r"key '01000' occurs 2 times: 00001.tar sample \d+, 00001.tar sample"),
    "one key in two shards": (in_two_shards, "keys", r"occurs 2 times: 00001.tar sample \d+, 00002.tar sample"),
}


@pytest.mark.parametrize(("alter", "check", "said"), WRONG.values(), ids=WRONG)
def test_what_was_written_wrongly_is_found_and_named(place, tmp_path, alter, check, said):
    report = verify(rebuilt(place, tmp_path, alter=alter), decode=0)
    assert set(failures(report)) == {check}
    assert re.search(said, failures(report)[check]), failures(report)
    assert "00001.tar" in failures(report)[check]
    if check != "keys":
        assert re.search(rf"'{key(1, HELD_OUT)}'|'{key(1, TRAINED)}'", failures(report)[check])


def test_of_many_repeated_keys_a_few_are_named(place, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(job, "read_sample", lambda *where: read.append(where) or read_sample(*where))

    def repeated(shard, samples):
        first = samples[0][0]
        again = [(dataclasses.replace(first, key=f"same{i}"), is_holdout(f"same{i}", HOLDOUT)) for i in range(30)]
        fifth = [(dataclasses.replace(first, key=key(9, 9)), is_holdout(key(9, 9), HOLDOUT))] * 5
        return [*samples, *fifth, *again]

    report = verify(rebuilt(place, tmp_path, alter=repeated), decode=0, quick=True)
    said = next(check.said for check in report.checks if check.name == "keys")
    assert len(said) == 21
    assert said[-1] == "11 keys more occur several times"
    assert sum("occurs 3 times" in one for one in said) == 19
    assert [one.count("sample") for one in said if "'09009' occurs 15 times" in one and one.endswith(", ...")] == [4]
    assert len(read) == 19 * 3 + 4


def pixels(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float()


def other_captions(shard, samples):
    """Each picture with the tokens of another one's captions."""
    captioned = [sample for sample, _ in samples if len(sample.captions) == 2]
    following = {s.key: captioned[(i + 1) % len(captioned)] for i, s in enumerate(captioned)}
    return [(dataclasses.replace(s, text=following.get(s.key, s).text), held_out) for s, held_out in samples]


def test_tokens_that_are_not_those_of_the_captions(place, tmp_path):
    manifest = rebuilt(place, tmp_path, alter=other_captions)
    report = verify(manifest, decode=0)
    assert set(failures(report)) == {"text"}
    assert re.search(r"00001.tar: '01\d+' tokens0.clip has not the tokens .* 'picture \d+'", failures(report)["text"])
    assert next(check.problems for check in report.checks if check.name == "text") == 3 * 7
    assert set(failures(verify(manifest, decode=6, quick=True))) == {"text"}


def test_an_empty_prompt_that_is_not_empty(copy):
    (copy / "empty.tokens.clip.npy").write_bytes(npy_bytes(TOKENIZER(["a"])[0]))
    said = failures(verify(f"{copy}/manifest.json", decode=0, quick=True))
    assert said == {"text": "the empty prompt tokens.clip has not the tokens of its caption ''"}


def test_captions_of_an_unknown_tokenizer_are_told(copy):
    edit("manifest.json", "fingerprint", "text_towers", 0, "tokenizer", value=lambda old: "0" * 64)(copy)
    report = verify(f"{copy}/manifest.json", decode=0, quick=True)
    assert "tower clip: its tokenizer is none of this Lathe's, so its captions were not looked at" in str(report)


def mirrored_wrongly(shard, samples):
    return [(dataclasses.replace(sample, flipped=sample.moments), held_out) for sample, held_out in samples]


def other_pictures(shard, samples):
    """Each latent under the key of another picture of its bucket."""
    by_bucket: dict = {}
    for sample, _ in samples:
        by_bucket.setdefault(sample.bucket, []).append(sample)
    following = {s.key: group[(i + 1) % len(group)] for group in by_bucket.values() for i, s in enumerate(group)}
    return [(dataclasses.replace(s, moments=following[s.key].moments), held_out) for s, held_out in samples]


UNLIKE = {
    "pixels in 0..1": {"prepare": lambda batch: pixels(batch) / 255},
    "pixels in 0..255": {"prepare": pixels},
    "blue for red": {"prepare": lambda batch: pixels(batch).flip(1) / 127.5 - 1},
    "another autoencoder": {"encoder": "other"},
    "mirrored wrongly": {"alter": mirrored_wrongly},
    "of another picture": {"alter": other_pictures},
    "scaled": {
        "alter": lambda _, samples: [
            (dataclasses.replace(s, moments=s.moments * np.float16(0.9)), h) for s, h in samples
        ]
    },
}


@pytest.mark.parametrize("how", UNLIKE.values(), ids=UNLIKE)
def test_latents_that_are_not_those_of_their_pictures(place, tmp_path, how):
    manifest = rebuilt(place, tmp_path, **how)
    assert failures(verify(manifest, decode=0)) == {}  # the data set agrees with itself
    for quick in (False, True):
        report = verify(manifest, decode=3, quick=quick)
        assert set(failures(report)) == {"pictures"}
        assert re.search(r"0000\d.tar: '\d+'.* is \S+ standard deviations from|off by", failures(report)["pictures"])


def test_wrong_captions_and_sizes(place, tmp_path):
    def alter(shard, samples):
        wrong = [
            dataclasses.replace(s, captions=("x",) * len(s.captions), size=s.size + np.int32([1, 0, 0, 0, 0, 0]))
            for s, _ in samples
        ]
        wrong = [dataclasses.replace(s, size=s.size.astype(np.int32)) for s in wrong]
        return list(zip(wrong, (held_out for _, held_out in samples), strict=True))

    said = failures(verify(rebuilt(place, tmp_path, alter=alter), decode=2))["pictures"]
    assert "has captions that its source picture has not" in said
    assert "notes sizes" in said


def test_an_autoencoder_of_other_weights_is_told(place):
    found = failures(verify(f"{place}/latents/manifest.json", autoencoder=f"{place}/other", quick=True))
    assert "its weights have the hash" in found["autoencoder"]
    assert "pictures" in found


@pytest.mark.parametrize("asked", [True, False])
def test_pictures_or_autoencoder_out_of_reach(copy, tmp_path, asked):
    edit("manifest.json", "images", value=lambda old: [f"{tmp_path}/nowhere"])(copy)
    edit("manifest.json", "autoencoder", value=lambda old: f"{tmp_path}/nowhere")(copy)
    report = verify(f"{copy}/manifest.json", decode=4 if asked else None)
    status = {check.name: check.status for check in report.checks if check.status != "ok"}
    wanted = "fail" if asked else "warn"
    assert status == {"sources": wanted, "autoencoder": wanted}


def test_moved_pictures_are_found_where_one_says(place, copy, tmp_path):
    edit("manifest.json", "images", value=lambda old: [f"{tmp_path}/nowhere"])(copy)
    shutil.copytree(place / "images", tmp_path / "moved")
    report = verify(f"{copy}/manifest.json", images=f"{tmp_path}/moved/*.tar", decode=4)
    assert failures(report) == {}
    (tmp_path / "moved" / "00001.tar").unlink()
    report = verify(f"{copy}/manifest.json", images=f"{tmp_path}/moved", decode=30)
    assert failures(report) == {}
    assert "00001.tar: not among the image shards" in str(report)


def test_pictures_that_are_gone_or_unusable(place, copy, tmp_path):
    (tmp_path / "images").mkdir()
    for shard in range(SHARDS):
        data = (place / "images" / f"{shard:05d}.tar").read_bytes()
        (tmp_path / "images" / f"{shard:05d}.tar").write_bytes(data.replace(b"IHDR", b"IHDX"))
    said = failures(verify(f"{copy}/manifest.json", images=f"{tmp_path}/images", decode=3))["sources"]
    assert "is unusable now (" in said


def test_rejects_are_read_a_line_at_a_time(copy, monkeypatch):
    whole = LocalStore.read

    def read(self, name, *where):
        assert name != "rejects.jsonl"
        return whole(self, name, *where)

    monkeypatch.setattr(LocalStore, "read", read)
    assert verify(f"{copy}/manifest.json", decode=0).ok
    (copy / "rejects.jsonl").write_bytes(b"x" * 10**6)
    said = failures(verify(f"{copy}/manifest.json", decode=0))["rejects"]
    assert said.startswith("rejects.jsonl: line 1 is " + "x" * 200 + ", the receipts say")


def test_latents_that_are_not_finite_are_reported_in_json(place, tmp_path):
    def nan_held_out(shard, samples):
        return [
            (dataclasses.replace(s, moments=with_nan(s.moments) if held else s.moments), held) for s, held in samples
        ]

    report = verify(rebuilt(place, tmp_path, alter=nan_held_out), decode=12, output=f"{tmp_path}/out", quick=True)
    assert set(failures(report)) == {"samples", "pictures"}
    told = json.loads((tmp_path / "out" / "verify.json").read_text())
    samples = next(check for check in told["checks"] if check["name"] == "pictures")["measures"]["samples"]
    differences = {one["key"]: one["mean_difference"] for one in samples}
    assert {name for name, off in differences.items() if off is None} == {
        n for n in differences if is_holdout(n, HOLDOUT)
    }
    assert None in differences.values()
    assert "12 encoded afresh, at most" in str(report)


@pytest.mark.parametrize("asked", [True, False])
def test_what_hinders_one_comparison_hinders_no_other(place, tmp_path, monkeypatch, asked):
    whole, failing = PictureCheck._pictures, []

    def pictures(self, source, keys):
        if not failing:
            failing.append(source)
            raise StorageError("the connection was reset")
        return whole(self, source, keys)

    def encode_moments(model, batch):
        if len(failing) == 1:
            failing.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return autoencoder.encode_moments(model, batch)

    monkeypatch.setattr(PictureCheck, "_pictures", pictures)
    monkeypatch.setattr(
        "pipeline.encode.verify.pictures.autoencoder",
        SimpleNamespace(**{**vars(autoencoder), "encode_moments": encode_moments}),
    )
    report = verify(f"{place}/latents/manifest.json", decode=8 if asked else None, output=str(tmp_path))
    found = {check.name: check for check in report.checks}
    assert {found[name].status for name in ("sources", "pictures")} == {"fail" if asked else "warn"}
    assert f"{failing[0]}: the connection was reset" in " ".join(found["sources"].said)
    assert "not compared, since cpu is out of memory" in " ".join(found["pictures"].said)
    assert 2 <= len(found["pictures"].measures["samples"]) < 7
    assert json.loads((tmp_path / "verify.json").read_text())["status"] == report.status


def test_what_was_found_is_written_before_the_pictures(place, tmp_path, monkeypatch):
    def killed(*settings, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "find_pictures", killed)
    with pytest.raises(KeyboardInterrupt):
        verify(f"{place}/latents/manifest.json", output=str(tmp_path))
    told = json.loads((tmp_path / "verify.json").read_text())
    assert told["status"] == "ok"
    assert "pictures" not in {check["name"] for check in told["checks"]}


def test_an_address_that_is_none_is_told(place):
    report = verify(f"{place}/latents/manifest.json", images=[], quick=True)
    assert set(failures(report)) == {"sources"}


def test_leftovers_warn_and_another_fingerprint_fails(copy):
    shutil.copy(copy / "00001.tar", copy / "00009.tar")
    shutil.copy(copy / RECEIPT, copy / "00009.tar.receipt.json")
    (copy / "elsewhere").mkdir()
    for name in (".00001.tar.0123456789ab.partial", "elsewhere/.x.0123456789ab.partial"):
        (copy / name).touch()
    report = verify(f"{copy}/manifest.json", decode=0)
    assert report.status == "warn"
    leftovers = next(check for check in report.checks if check.name == "leftovers")
    found = [said.split(":")[0] for said in leftovers.said]
    assert found == ["00009.tar", "00009.tar.receipt.json", ".00001.tar.0123456789ab.partial"]
    edit("00009.tar.receipt.json", "fingerprint", value=lambda old: "d" * 64)(copy)
    assert (
        "00009.tar.receipt.json: of fingerprint dddd"
        in failures(verify(f"{copy}/manifest.json", decode=0))["fingerprint"]
    )


def test_names_do_not_forge_lines_of_the_report(copy):
    (copy / "a\x1b[31m\nok    all").touch()
    edit("manifest.json", "autoencoder", value=lambda old: "vae\nok    nothing")(copy)
    told = str(verify(f"{copy}/manifest.json", quick=True))
    assert "\x1b" not in told
    assert r"a\x1b[31m\nok    all: 0 bytes, not in the manifest" in told
    assert not re.search("^ok    (all|nothing)", told, re.MULTILINE)


def test_quick_reads_no_shard_through(copy):
    flip_byte(copy)
    report = verify(f"{copy}/manifest.json", quick=True, decode=0)
    assert failures(report) == {}
    assert report.bytes_read == 0
    assert "what is in the shards was not looked at" in str(report)
    assert not {"checksums", "finite", "blocks"} & {check.name for check in report.checks}
    truncate(copy)
    assert "00001.tar" in failures(verify(f"{copy}/manifest.json", quick=True, decode=0))["files"]


def test_the_same_seed_draws_the_same_samples(place):
    def drawn(seed: int) -> list[str]:
        report = verify(f"{place}/latents/manifest.json", decode=4, quick=True, seed=seed)
        return [one["key"] for one in next(c for c in report.checks if c.name == "pictures").measures["samples"]]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_no_manifest_is_an_error(tmp_path):
    with pytest.raises(StorageError):
        verify(f"{tmp_path}/manifest.json")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError):
        verify(f"{tmp_path}/manifest.json")


def test_a_data_set_on_s3(place, s3_url):
    store = open_store(s3_url)
    for path in (place / "latents").iterdir():
        store.upload(path, path.name)
    assert failures(verify(f"{s3_url}/manifest.json", decode=2, output=f"{s3_url}/report")) == {}
    assert store.exists("report/verify.png")
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    client({}).call("create_multipart_upload", bucket, f"{prefix}/00001.tar")  # a writer that is killed leaves it
    assert "00001.tar: unfinished" in str(verify(f"{s3_url}/manifest.json", decode=0, quick=True))
    data = bytearray(store.read("00002.tar"))
    data[4000] ^= 4
    store.write("00002.tar", bytes(data))
    assert "00002.tar" in failures(verify(f"{s3_url}/manifest.json", decode=0))["checksums"]


def test_what_the_encode_job_writes_passes_and_stays_after_a_takedown(place, tmp_path):
    config = encode_settings(place, tmp_path)
    encode(config)
    for resolution in (32, 48):
        report = verify(f"{tmp_path}/{resolution}/manifest.json", decode=5)
        assert failures(report) == {}
        assert len(next(check for check in report.checks if check.name == "pictures").measures["samples"]) == 5
    summary = remove(f"{tmp_path}/32/manifest.json", [key(1, 0), key(2, 3)])
    assert (summary.removed, summary.siblings) == (2, (f"{tmp_path}/48/manifest.json",))
    before = {path: path.read_bytes() for path in (tmp_path / "32").iterdir()}
    encode(config)  # finds nothing to do
    assert {path: path.read_bytes() for path in (tmp_path / "32").iterdir()} == before
    assert verify(f"{tmp_path}/32/manifest.json", decode=3).ok


def test_a_key_that_may_only_read_files_is_enough(copy, monkeypatch):
    def denied(self):
        raise StorageError("access denied", "use another key")

    monkeypatch.setattr(LocalStore, "leftovers", denied)
    report = verify(f"{copy}/manifest.json", decode=0)
    assert report.status == "warn"
    assert "unfinished files cannot be listed: access denied" in str(report)


@pytest.mark.parametrize("padding", ["full", "trimmed"])
def test_text_of_frozen_towers(place, tmp_path, padding):
    """Members, shapes and numbers of cached text, and the empty prompt."""
    tower = {"name": "one", "model": save_clip(tmp_path / "clip", clip()), "layer": "penultimate", "pooled": True}
    text = {"mode": "cached", "context_length": 20, "padding": padding, "towers": [tower]}
    config = encode_settings(place, tmp_path / "out", text)
    encode(config)
    manifest = f"{tmp_path}/out/32/manifest.json"
    report = verify(manifest, decode=0)
    assert failures(report) == {}
    assert next(check.figure for check in report.checks if check.name == "text") == "42 captions and the empty prompt"
    assert "where the towers are is not recorded" in str(report)
    (tmp_path / "out" / "32" / "empty.pooled.one.npy").unlink()
    assert "empty.pooled.one.npy: missing" in failures(verify(manifest, decode=0))["files"]


@pytest.mark.parametrize("padding", ["full", "trimmed"])
def test_embeddings_that_are_not_those_of_the_captions(place, tmp_path, monkeypatch, padding):
    tower = {"name": "one", "model": save_clip(tmp_path / "clip", clip()), "pooled": True}
    text = {"mode": "cached", "context_length": 20, "padding": padding, "towers": [tower]}
    whole = CaptionEncoder.__call__
    monkeypatch.setattr(CaptionEncoder, "__call__", lambda self, captions: whole(self, [*captions[1:], *captions[:1]]))
    encode(encode_settings(place, tmp_path / "out", text))
    manifest, folder = f"{tmp_path}/out/32/manifest.json", tmp_path / "out" / "32"
    assert set(failures(verify(manifest, decode=0))) == {"text"}
    assert "text0.one differs at token" in failures(verify(manifest, decode=0))["text"]
    monkeypatch.undo()
    encode(encode_settings(place, tmp_path / "sound", text))
    for name in ("text", "pooled"):
        shutil.copy(folder / f"empty.{name}.one.npy", tmp_path / "sound" / "32")
    assert failures(verify(f"{tmp_path}/sound/32/manifest.json", decode=0)) == {}
    empty = np.load(folder / "empty.text.one.npy")
    (tmp_path / "sound" / "32" / "empty.text.one.npy").write_bytes(npy_bytes(empty[::-1].copy()))
    said = failures(verify(f"{tmp_path}/sound/32/manifest.json", decode=0))
    assert "differs at token 0 from that of the empty prompt" in said["text"]
