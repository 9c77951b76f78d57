"""`lathe inspect`: every kind of thing, in a folder and on S3, and how little of it is read."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as tensor_bytes
from support import provenance

from pipeline.config import AutoencoderModelConfig
from pipeline.data import images
from pipeline.data.fold import fold
from pipeline.data.manifest import MANIFEST, RECEIPT_SUFFIX, Receipt
from pipeline.data.tar import TarBuilder
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity
from pipeline.errors import DataError, StorageError
from pipeline.models import autoencoder
from pipeline.operate import shard_contents
from pipeline.operate.description import Description, Section, Size
from pipeline.operate.inspect import describe
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from pipeline.train.checkpoint import COMPLETE, FROZEN, RUN, noted

PICTURE = images.png(np.zeros((4, 6, 3), np.uint8))


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def url(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_url")


def write(url: str, files: dict[str, bytes]) -> None:
    store = open_store(url)
    for name, data in files.items():
        store.write(name, data)


def image_shard(count: int, padding: int = 0) -> bytes:
    tar = TarBuilder()
    for i in range(count):
        tar.add(f"d/{i:03d}.png", PICTURE + bytes(padding))
        tar.add(f"d/{i:03d}.txt", f"caption {i}\x1b[31m\n".encode())
    return bytes(tar.finish())


def latents(name: str) -> tuple[bytes, Receipt]:
    shard = LatentShard(name, channels=2, block_samples=4)
    for i in range(6):
        shape = (4, 2, 3) if i % 2 else (4, 3, 2)
        moments = np.full(shape, i, np.float16)
        sample = EncodedSample(
            key=f"{i:03d}",
            captions=("one", "two"),
            bucket=(shape[1] * 8, shape[2] * 8),
            moments=moments,
            flipped=None,
            text=({"tokens.clip": np.ones(5, np.uint16)},) * 2,
            size=np.zeros(6, np.int32),
        )
        shard.add(sample, holdout=i == 5)
    shard.reject("bad", "not_an_image")
    data, receipt = shard.finish(name, SourceIdentity(name, 9, "s", "v"), "f", {"lathe": "1"})
    return bytes(data), receipt


@pytest.fixture
def encoded(url) -> str:
    files: dict[str, bytes] = {}
    receipts = []
    for name in ("00000.tar", "00001.tar"):
        data, receipt = latents(name)
        files |= {name: data, name + RECEIPT_SUFFIX: receipt.to_bytes()}
        receipts.append(receipt)
    write(url, {**files, MANIFEST: fold(receipts, provenance()).to_bytes()})
    return url


def test_image_shard(url):
    write(url, {"00000.tar": image_shard(9)})
    text = describe(f"{url}/00000.tar", samples=2)
    assert text.splitlines()[0] == f"image shard  {url}/00000.tar"
    assert "members        png 9, txt 9" in text
    assert "d/000  png" in text
    assert "4 x 6" in text
    assert "... and 7 more" in text
    assert "caption 1\N{REPLACEMENT CHARACTER}[31m" in text  # nobody's terminal is painted
    tree = json.loads(describe(f"{url}/00000.tar", samples=2, as_json=True))
    assert tree["samples"] == 9
    assert tree["first_samples"][1] == {
        "key": "d/001",
        "format": "png",
        "bytes": len(PICTURE),
        "height_x_width": "4 x 6",
        "caption": "caption 1\x1b[31m",
    }


def test_folder_of_image_shards(url):
    write(url, {"00000.tar": image_shard(3), "00001.tar": image_shard(1), "ATTRIBUTION.txt": b"by A\n"})
    tree = json.loads(describe(url, as_json=True))
    assert (tree["kind"], tree["shards"], tree["samples_of_the_first"], tree["attribution"]) == (
        "image shards",
        2,
        3,
        "by A",
    )


def test_of_large_shards_only_headers_are_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "big.tar", "w") as tar:
        for i in range(3):
            for name, data in ((f"{i}.png", PICTURE), (f"{i}.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with (tmp_path / "big.tar").open("r+b") as file:  # a hole of 4 GiB stands for a picture
        file.seek(6 * 1024)
        member = tarfile.TarInfo("3.png")
        member.size = 4 << 30
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(4 << 30, io.SEEK_CUR)
        file.write(bytes(1024))
    read = 0
    original = LocalStore.read

    def counting(self, name, start=None, end=None):
        nonlocal read
        data = original(self, name, start, end)
        read += len(data)
        return data

    monkeypatch.setattr(LocalStore, "read", counting)
    tree = json.loads(describe(str(tmp_path / "big.tar"), samples=2, as_json=True))
    assert tree["samples"] == 4
    assert read < 200_000


def test_of_a_remote_shard_as_much_is_read_as_is_needed(s3_url, monkeypatch):
    write(s3_url, {"00000.tar": image_shard(60, padding=40_000)})
    monkeypatch.setattr(shard_contents, "_MOST_REQUESTS", 20)
    text = describe(f"{s3_url}/00000.tar", samples=2)
    assert "the first 3" in text
    assert "about 60 samples" in text
    assert "caption 1" in text


def test_latents_and_their_records(encoded):
    shard = json.loads(describe(f"{encoded}/00001.tar", samples=3, as_json=True))
    assert shard["kind"] == "latent shard"
    assert shard["samples"] == {"train": 5, "holdout": 1, "rejected": 1}
    assert shard["members_of_the_first_sample"][0] == {
        "member": "latent.npy",
        "dtype": "float16",
        "shape": "4 x 2 x 3",
        "bytes": 176,
    }
    assert [row["captions"] for row in shard["first_samples"]] == [2, 2, 2]
    assert shard["first_samples"][0]["first_caption"] == "one"
    receipt = describe(f"{encoded}/00001.tar{RECEIPT_SUFFIX}")
    assert "samples       train 5, holdout 1, rejected 1" in receipt
    manifest = json.loads(describe(encoded, as_json=True))
    assert manifest == json.loads(describe(f"{encoded}/{MANIFEST}", as_json=True))
    assert manifest["samples"] == {"train": 10, "holdout": 2}
    assert manifest["rejects"] == [{"reason": "not_an_image", "samples": 2}]
    assert manifest["buckets"] == [
        {"height_x_width": "16 x 24", "train": 4, "holdout": 2, "share": "50.0%"},
        {"height_x_width": "24 x 16", "train": 6, "holdout": 0, "share": "50.0%"},
    ]
    text = describe(encoded)
    assert f"manifest  {encoded}/{MANIFEST}" in text
    assert len(text.splitlines()) < 40


def test_no_samples_and_a_shard_without_any(tmp_path):
    shard = LatentShard("0.tar", channels=2, block_samples=4)
    shard.reject("bad", "not_an_image")
    data, receipt = shard.finish("0.tar", SourceIdentity("0.tar", 9, "s", "v"), "f", {})
    write(str(tmp_path), {"0.tar": bytes(data), f"0.tar{RECEIPT_SUFFIX}": receipt.to_bytes(), "1.tar": latents("1")[0]})
    assert json.loads(describe(f"{tmp_path}/0.tar", as_json=True))["samples"]["rejected"] == 1
    found = json.loads(describe(f"{tmp_path}/1.tar", samples=0, as_json=True))
    assert (found["kind"], found["samples"], found["first_samples"]) == ("latent shard", 6, [])


def test_latents_without_their_records(encoded):
    store = open_store(encoded)
    store.delete([MANIFEST])
    assert "committed shards  2" in describe(encoded)
    store.delete([f"0000{i}.tar{RECEIPT_SUFFIX}" for i in range(2)])
    tree = json.loads(describe(f"{encoded}/00000.tar", as_json=True))
    assert (tree["kind"], tree["samples"], tree["members"]["latent.npy"]) == ("latent shard", 6, 6)


def test_several_resolutions(tmp_path):
    _, receipt = latents("00000.tar")
    manifest = fold([receipt], provenance()).to_bytes()
    write(str(tmp_path), {"512/manifest.json": manifest, "1024/manifest.json": manifest})
    tree = json.loads(describe(str(tmp_path), as_json=True))
    assert [row["resolution"] for row in tree["resolutions"]] == ["512", "1024"]
    assert tree["resolutions"][0]["train"] == 5


def checkpoint(step: int, *, complete: bool = True) -> dict[str, bytes]:
    counters = {"step": step, "skipped": 0}
    run = {"format_version": 1, "counters": counters, "parameters": {"a": [3, 4], "b": []}, "keys": ["weight", "ema.x"]}
    files = {
        RUN: json.dumps(run).encode(),
        FROZEN: tensor_bytes({"table": torch.ones(2)}),
        MANIFEST: json.dumps({"images": ["s3://b/i"], "content_hash": "c", "fingerprint": {"resolution": 64}}).encode(),
    }
    for rank in range(2):
        stem = f"rank-{rank:05d}-of-00002"
        files[f"{stem}.safetensors"] = tensor_bytes({"a:0:weight": torch.ones(6)})
        files[f"{stem}.done.json"] = b"{}"
    if complete:
        files[COMPLETE] = json.dumps({"files": {name: noted(data) for name, data in files.items()}}).encode()
    else:
        del files["rank-00001-of-00002.done.json"], files[RUN]
    return {f"step-{step:08d}/{name}": data for name, data in files.items()}


def test_runs_and_checkpoints(url):
    write(url, {**checkpoint(10), **checkpoint(20), **checkpoint(30, complete=False), "metrics.jsonl": b""})
    run = json.loads(describe(url, as_json=True))
    assert [(row["name"], row["complete"]) for row in run["checkpoints"]] == [
        ("step-00000030", False),
        ("step-00000020", True),
        ("step-00000010", True),
    ]
    assert (run["kind"], run["newest"], run["counters"]["step"]) == ("training run", "step-00000020", 20)
    whole = json.loads(describe(f"{url}/step-00000020/", as_json=True))
    assert (whole["complete"], whole["ranks"], whole["parameters"]) == ("yes", 2, 13)
    assert whole["averages"] == ["x"]
    (latents,) = whole["data_sets"]
    assert (latents["images"], latents["resolution"], latents["content_hash"]) == (["s3://b/i"], 64, "c")
    assert run["data_sets"] == whole["data_sets"]
    assert describe(f"{url}/step-00000020/run.json") == describe(f"{url}/step-00000020")
    assert "no: 1 of 2 ranks were done" in describe(f"{url}/step-00000030")


def test_every_data_set_of_a_checkpoint_is_told(url):
    config = {"datasets": [{"manifest": "a"}, {"manifest": "b", "share": 0.3, "keys": "k.txt"}], "output": "o"}
    _, receipt = latents("00000.tar")
    manifests = [fold([receipt], provenance(images=(name,), attribution=f"by {name}")) for name in ("a", "b")]
    about = {"manifest.json": manifests[0].to_bytes(), "manifest-1.json": manifests[1].to_bytes()}
    folder = {"run.json": b'{"format_version": 2}', "config.yaml": json.dumps(config).encode(), **about}
    write(url, {f"step-00000010/{name}": data for name, data in folder.items()})
    found = json.loads(describe(f"{url}/step-00000010", as_json=True))["data_sets"]
    assert [(row["images"], row["training_samples"], row["part"], row["attribution"]) for row in found] == [
        (["a"], 5, "all", "by a"),
        (["b"], 5, "30% of listed ones", "by b"),
    ]
    assert [row["content_hash"] for row in found] == [manifest.content_hash for manifest in manifests]
    write(url, {"step-00000010/config.yaml": b"datasets: ["})
    assert [row["part"] for row in json.loads(describe(f"{url}/step-00000010", as_json=True))["data_sets"]] == [
        None
    ] * 2
    assert "by b" in describe(f"{url}/step-00000010")


def test_a_checkpoint_with_a_file_cut(tmp_path):
    files = checkpoint(10)
    files["step-00000010/frozen.safetensors"] = b"cut"
    write(str(tmp_path), files)
    assert "no: a file is missing or cut" in describe(f"{tmp_path}/step-00000010")


def test_autoencoder(tmp_path):
    model = autoencoder.build(AutoencoderModelConfig(block_out_channels=(8, 8, 8), norm_num_groups=4))
    autoencoder.save(model, open_store(str(tmp_path)))
    write(str(tmp_path), {"first_stage.json": b'{"steps": 3, "psnr_db": 20.5}'})
    tree = json.loads(describe(str(tmp_path), as_json=True))
    assert (tree["class"], tree["latent_channels"], tree["downsampling_factor"]) == ("AutoencoderKL", 8, 4)
    assert tree["parameters"] == sum(p.numel() for p in model.parameters())
    assert (tree["dtypes"], tree["steps"], tree["psnr_db"]) == (["F32"], 3, 20.5)
    weights = json.loads(describe(str(tmp_path / autoencoder.WEIGHTS), as_json=True))
    assert (weights["kind"], weights["parameters"]) == ("weights", tree["parameters"])


def test_pipeline(url):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"], "feature_extractor": [None, None]}
    weights = tensor_bytes({"w": torch.ones(3, 5, dtype=torch.bfloat16)})
    write(url, {"model_index.json": json.dumps(index).encode(), "unet/diffusion.safetensors": weights})
    tree = json.loads(describe(url, as_json=True))
    assert (tree["kind"], tree["class"]) == ("diffusers pipeline", "StableDiffusionPipeline")
    assert tree["components"] == [
        {"name": "unet", "class": "UNet", "parameters": 15, "dtype": "BF16", "bytes": len(weights)}
    ]


def extended(size: int, records: bytes) -> bytes:
    """A shard that begins with a pax header of so many bytes, as it claims."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512) + image_shard(1)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"no tar" * 300, "is no tar, or damaged"),
        ("a.tar", b"", "is no tar, or damaged"),
        ("a.tar", image_shard(3)[:-3000], "is damaged or cut short|is no tar, or damaged"),
        ("a.tar", image_shard(3)[:1024] + b"x" * 512 + image_shard(3)[1536:], "at byte 1,024"),
        ("a.tar", extended(1 << 40, b""), "ends within the member at byte 0"),
        ("a.tar", extended(2 << 20, bytes(2 << 20)), "an extended header is too long"),
        ("a.tar", extended(11, b"11 size=-5\n"), "a header is damaged"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "is compressed"),
        ("manifest.json", b"{}", "is not a manifest"),
        ("b.json", b"[" * 100_000, "is not JSON"),
        ("b.json", b"{}", "is no record that Lathe knows"),
        ("x.safetensors", b"\xff" * 40, "is not safetensors"),
        ("x.safetensors", b"\x09" + bytes(7) + b'{"a": []}', "is not safetensors"),
        ("notes.md", b"x", "is a file that Lathe does not know"),
        ("sub/notes.md", b"x", r"is no folder that Lathe knows; it holds sub/"),
    ],
)
def test_what_cannot_be_told(tmp_path, name, data, message):
    write(str(tmp_path), {name: data})
    target = tmp_path if "/" in name else tmp_path / name
    with pytest.raises(DataError, match=message) as caught:
        describe(str(target))
    assert caught.value.remedy
    assert "\n" not in caught.value.message


def test_members_that_are_no_samples_and_sparse_files_are_passed_over(tmp_path):
    sparse = bytearray(tarfile.TarInfo("old.png").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157], sparse[482] = tarfile.GNUTYPE_SPARSE, 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    others = TarBuilder()
    for name in ("README", ".hidden.png", "0.PNG", "0.txt"):
        others.add(name, b"x")
    write(str(tmp_path), {"a.tar": bytes(sparse) + bytes(512) + bytes(others.finish())})
    tree = json.loads(describe(f"{tmp_path}/a.tar", as_json=True))
    assert (tree["samples"], tree["members"]) == (1, {"png": 1, "txt": 1})


NESTED = json.loads("[" * 900 + "]" * 900)
ODD = [5, -1, True, None, "x" * 5000, 1e400, {"a": {"b": [1]}}, [[]], [10**4000] * 2, [2] * 10_000, NESTED]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_records_with_odd_values_are_told_or_refused(tmp_path, value):
    """In every place of every file that anybody may have written."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4, "scaling_factor": 1.0}
    run = {"format_version": 1, "counters": {"step": 1}, "parameters": {"a": [3, 4]}, "keys": ["weight", "ema.main"]}
    latents = {"images": ["s3://b/i"], "content_hash": "c", "fingerprint": {"resolution": 64}}
    sample = {"caption": "a", "captions": ["a"], "bucket": [8, 8]}

    def odd(tree):
        yield value
        for name in tree:
            yield {**tree, name: value}

    def dumped(tree):
        try:
            return json.dumps(tree).encode()
        except RecursionError:
            return b"[" * 900 + b"]" * 900

    def files():
        for tree in odd({"a": tensor}):
            yield "w", {"x.safetensors": safetensors(dumped(tree))}
        for tree in odd(tensor):
            yield "w", {"x.safetensors": safetensors(dumped({"a": tree}))}
        for tree in odd(config):
            yield "v", {"config.json": dumped(tree), "x.safetensors": safetensors(b"{}"), "first_stage.json": b"{}"}
        for tree in odd({"steps": 1}):
            yield "v", {"config.json": dumped(config), "x.safetensors": b"", "first_stage.json": dumped(tree)}
        for tree in odd({"_class_name": "P", "unet": ["diffusers", "UNet"]}):
            yield "p", {"model_index.json": dumped(tree)}
        for tree in odd(run):
            yield "r", {"step-00000010/run.json": dumped(tree)}
        for tree in odd(latents):
            yield "r", {"step-00000010/run.json": dumped(run), "step-00000010/manifest.json": dumped(tree)}
        for tree in odd(sample):
            for kind in ("png", "latent.npy"):
                tar = TarBuilder()
                tar.add(f"0.{kind}", b"x")
                tar.add("0.json", dumped(tree))
                yield "s", {"a.tar": bytes(tar.finish())}

    longest = 0
    for i, (name, group) in enumerate(files()):
        folder = tmp_path / f"{i}-{name}"
        write(str(folder), group)
        where = (
            f"{folder}/{next(iter(group))}" if name in "ws" else f"{folder}/step-00000010" if name == "r" else folder
        )
        for as_json in (False, True):
            try:
                assert describe(str(where), as_json=as_json)
            except DataError as error:
                longest = max(longest, len(error.message))
    assert longest < 400


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("name", ["", "a.tar", "a/manifest.json"])
def test_nothing_is_there(url, name):
    with pytest.raises(StorageError, match=r"nothing is there|no such file"):
        describe(f"{url}/none/{name}")


def test_values_in_a_persons_units():
    description = Description(
        "thing",
        "u",
        {"size": Size(3 << 20), "on": True, "none": None, "rate": 0.123456, "long": "x" * 1000},
        [Section("rows", ("name", "bytes"), [("a", Size(5)), ("bb", Size(1536))], more=1000)],
    )
    lines = description.text().splitlines()
    assert lines[1:4] == ["  size  3.0 MiB", "  on    yes", "  rate  0.1235"]
    assert max(map(len, lines)) < 120
    assert lines[-3:] == ["    a         5 B", "    bb    1.5 KiB", "    ... and 1,000 more"]
    assert json.loads(description.json())["rows"] == [{"name": "a", "bytes": 5}, {"name": "bb", "bytes": 1536}]
