"""Shards by the real img2dataset, which fetched its pictures from a real web server, go into `lathe encode`."""

from __future__ import annotations

import csv
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from picture_files import file
from PIL import Image
from small_models import autoencoder

from pipeline.config import EncodeConfig
from pipeline.data.manifest import load_receipt
from pipeline.encode.job import EncodeSummary, encode
from pipeline.encode.verify.job import verify
from pipeline.encode.verify.report import VerifyReport
from pipeline.operate.bench.own_environment import own_environment
from pipeline.storage import open_store

pytestmark = pytest.mark.tools
PER_SHARD = 10
LARGE = 6  # the number of the picture that is to be shrunk
IMG2DATASET_SECONDS = 120
RUNS = {
    # as LAION and others were fetched: what is no JPEG, or too large, is encoded again
    "shrunk": ("--image_size=96", "--resize_mode=keep_ratio", "--resize_only_if_bigger=True", "--skip_reencode=True"),
    "raw": ("--disable_all_reencoding=True",),
}


@dataclass(frozen=True)
class Row:
    """One line of the list of addresses. Its number is the sample's key: img2dataset counts through."""

    name: str
    data: bytes | None  # None: the server has no such file
    caption: str
    punsafe: float
    size: tuple[int, int] = (0, 0)  # height and width


def picture(number: int, width: int, height: int) -> Image.Image:
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    mode = "RGBA" if number % 3 == 1 else "RGB"
    return Image.fromarray(small[..., : len(mode)]).resize((width, height), Image.Resampling.BICUBIC)


def rows() -> list[Row]:
    found = []
    for number in range(14):
        width, height = (400, 300) if number == LARGE else (70 + 10 * number, 96)
        format_, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
        data = file(picture(number, width, height), format_)
        caption = f'picture {number}, "of many", 猫 & Ü'
        found.append(Row(f"{number}.{extension}", data, caption, number % 4 / 5, (height, width)))
    whole = file(Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 200, 3), dtype=np.uint8)), "PNG")
    found += [
        Row("speechless.png", whole, "", 0.0, (96, 200)),
        Row("cut.png", whole[:300], "cut short", 0.0),
        Row("page.jpg", b"<!DOCTYPE html><html><body>Sign in</body></html>", "a page", 0.0),
        Row("gone.jpg", None, "not there", 0.0),
        Row("nothing.jpg", b"", "no bytes", 0.0),
    ]
    found += [Row(f"gone/{number}.jpg", None, "not there", 0.0) for number in range(5)]  # the third shard is empty
    return found


ROWS = rows()
SPEECHLESS = next(number for number, row in enumerate(ROWS) if not row.caption)


@pytest.fixture(scope="session")
def img2dataset(pytestconfig: pytest.Config) -> Path:
    """The program, in an environment of its own in pytest's cache."""
    folder = Path(pytestconfig.cache.mkdir("img2dataset"))  # type: ignore[union-attr]
    return own_environment(folder, Path(__file__).with_name("img2dataset.txt")) / "img2dataset"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a web server on loopback that has the pictures."""
    folder = tmp_path_factory.mktemp("site")
    for row in ROWS:
        if row.data is not None:
            (folder / row.name).write_bytes(row.data)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def fetch(program: Path, site: str, place: Path, *options: str) -> Path:
    """The folder of shards that img2dataset makes of the list."""
    with (place / "list.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(("link", "text", "punsafe"))
        lines.writerows((f"{site}/{row.name}", row.caption, row.punsafe) for row in ROWS)
    command = [str(program), f"--url_list={place}/list.csv", "--input_format=csv", f"--output_folder={place}/shards"]
    command += ["--url_col=link", "--caption_col=text", '--save_additional_columns=["punsafe"]', *options]
    command += ["--output_format=webdataset", f"--number_sample_per_shard={PER_SHARD}"]
    command += ["--processes_count=1", "--thread_count=4", "--timeout=10", "--retries=0"]
    # Nothing leaves this machine: neither questions for newer releases nor requests by a proxy.
    environment = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "no_proxy": "*", "HOME": str(place)}
    environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=IMG2DATASET_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "shards"


@pytest.fixture(scope="module")
def fetched(img2dataset: Path, site: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of shards of several runs, which are made at once: most of their time goes into starting."""
    places = [tmp_path_factory.mktemp(name) for name in RUNS]
    with ThreadPoolExecutor() as pool:
        made = [
            pool.submit(fetch, img2dataset, site, place, *RUNS[name]) for name, place in zip(RUNS, places, strict=True)
        ]
        return {name: future.result() for name, future in zip(RUNS, made, strict=True)}


@dataclass(frozen=True)
class Encoded:
    summary: EncodeSummary
    latents: dict[int, dict[str, Any]]  # by number of row, as plain webdataset reads them
    rejects: dict[int, str]
    report: VerifyReport


def encoded(shards: Path, where: str) -> Encoded:
    place = shards.parent
    autoencoder().save_pretrained(place / "vae")
    config = EncodeConfig(
        images={"shards": str(shards), "resolution": 64, "filters": {"where": where}},
        autoencoder=str(place / "vae"),
        output=str(place / "latents"),
        text={"context_length": 16},
        batch_size=4,
        threads=1,
        max_reject_rate=0.9,
    )
    summary = encode(config)
    latents, rejects, store = {}, {}, open_store(config.output)
    for entry in summary.manifests[0].shards:
        url = f"{config.output}/{entry.name}"
        for sample in webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode():
            latents[int(sample["__key__"])] = sample
        rejects |= {int(reject.key): reject.reason for reject in load_receipt(store, entry.receipt).rejects}
    return Encoded(summary, latents, rejects, verify(f"{config.output}/manifest.json", decode=4))


def check(result: Encoded, sizes: dict[int, tuple[int, int]], rejects: dict[int, str]) -> None:
    """These pictures were used, height and width as given, and these were not; of the others nothing was there."""
    assert {number: tuple(latent["size.npy"][:2]) for number, latent in result.latents.items()} == sizes
    assert result.rejects == rejects
    for number, latent in result.latents.items():
        assert latent["json"]["captions"] == [ROWS[number].caption]
        assert latent["json"]["source_shard"] == f"{number // PER_SHARD:05d}.tar"
    (tally,) = result.summary.tallies
    assert (tally.shards, tally.samples, tally.reasons) == (3, len(sizes), Counter(rejects.values()))
    assert result.report.ok, str(result.report)


def test_as_large_sets_are_fetched(fetched: dict[str, Path]) -> None:
    """What cannot be decoded is in the tables alone."""
    shards = fetched["shrunk"]
    beside = {f"{number:05d}{ending}" for number in range(3) for ending in (".tar", ".parquet", "_stats.json")}
    assert {path.name for path in shards.iterdir()} == beside
    sizes = {number: row.size for number, row in enumerate(ROWS) if row.caption.startswith("picture")}
    sizes[LARGE] = (96, 128)
    wanted = {number for number, (_, width) in sizes.items() if width > 100 and ROWS[number].punsafe < 0.5}
    assert len(wanted) == 8
    rejects = dict.fromkeys(sizes.keys() - wanted, "filtered_where") | {SPEECHLESS: "no_caption"}
    result = encoded(shards, "width > 100 and punsafe < 0.5")
    check(result, {number: sizes[number] for number in wanted}, rejects)


def test_as_they_came(fetched: dict[str, Path]) -> None:
    """Everything that the server sent is in the shards, as KEY.jpg; of sizes the metadata say nothing."""
    sizes = {number: row.size for number, row in enumerate(ROWS) if row.caption.startswith("picture")}
    wanted = {number for number in sizes if ROWS[number].punsafe < 0.5}
    unusable = {"cut.png": "damaged_image", "page.jpg": "not_an_image", "nothing.jpg": "empty_file"}
    rejects = {number: unusable[row.name] for number, row in enumerate(ROWS) if row.name in unusable}
    rejects |= dict.fromkeys(sizes.keys() - wanted, "filtered_where") | {SPEECHLESS: "no_caption"}
    result = encoded(fetched["raw"], "punsafe < 0.5")
    check(result, {number: sizes[number] for number in wanted}, rejects)
