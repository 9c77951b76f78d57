"""The whole demo in small: killed, robbed of its server, gone on with; what it leaves is what it promises."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from diffusers import StableDiffusionPipeline

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.storage import open_store
from pipeline.train.trained_model import load_trained

pytestmark = [pytest.mark.demo, pytest.mark.s3, pytest.mark.ranks, pytest.mark.timeout(1200)]

STUMBLING_BLOCKS = ("Traceback", "Warning", "WARNING", "warn(", "deprecated")


class Demo:
    """One start of `lathe demo --preset smoke` in a folder; what it prints is kept."""

    def __init__(self, folder: Path, *more: str, **environment: str) -> None:
        self.folder = folder
        self.log = folder.parent / f"demo-{time.monotonic_ns()}.log"
        with self.log.open("wb") as output:
            command = [sys.executable, "-m", "pipeline", "demo", "--preset", "smoke", "--dir", str(folder), *more]
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"} | environment,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"it did not say {words!r}:\n{self.text}")
            time.sleep(0.1)

    def end(self, seconds: float = 600) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it tells where its threads are
            self.process.wait(10)
            raise AssertionError(f"it did not end within {seconds} s:\n{self.text}") from None
        finally:
            self.process.kill()


def wait_until_alone(folder: Path) -> None:
    """Until no process of a killed demo is left; they end with it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout.split()
        if not found:
            return
        time.sleep(0.2)
    raise AssertionError(f"processes are left of {folder}: {found}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A smoke demo that was killed in the first stage, lost its server in training, and was gone on with."""
    folder = tmp_path_factory.mktemp("demo") / "lathe-demo"
    killed = Demo(folder)
    killed.wait_for("[3/9]")
    time.sleep(15)
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    wait_until_alone(folder)

    robbed = Demo(folder)
    robbed.wait_for("engine      DeepSpeedEngine")
    time.sleep(5)
    address = re.findall(r"metrics     (http://\S+)", robbed.text)[-1]  # the first is that of train-vae
    with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310
        metrics = answer.read().decode()
    server = json.loads((folder / "s3" / "server.json").read_text())["pid"]
    os.kill(server, signal.SIGKILL)
    code = robbed.end()

    last = Demo(folder)
    last_code = last.end()
    return SimpleNamespace(
        folder=folder, robbed=robbed, robbed_code=code, metrics=metrics, last=last, last_code=last_code
    )


def test_without_its_server_the_demo_fails_with_a_clear_message(finished: SimpleNamespace) -> None:
    assert finished.robbed_code != 0
    assert "error: the embedded S3 server has ended" in finished.robbed.text
    assert "start the same command again" in finished.robbed.text


def test_metrics_are_live_on_loopback(finished: SimpleNamespace) -> None:
    lines = dict(line.rsplit(" ", 1) for line in finished.metrics.splitlines() if line.startswith("lathe_"))
    assert float(lines["lathe_train_world_size"]) == 2
    assert float(lines["lathe_train_target_steps"]) == 100
    assert float(lines["lathe_train_step"]) > 0


def test_started_again_it_goes_on_and_ends_well(finished: SimpleNamespace) -> None:
    assert finished.last_code == 0, finished.last.text
    assert "[2/9] pack: folder -> WebDataset image shards on S3  (finished earlier)" in finished.robbed.text
    assert "[4/9] encode: image shards -> latent shards, by 2 workers  (finished earlier)" in finished.last.text


def test_two_ranks_in_zero_2_were_real(finished: SimpleNamespace) -> None:
    assert "ranks       2 on cpu" in finished.last.text
    assert "engine      DeepSpeedEngine, ZeRO stage 2" in finished.last.text


def test_nothing_that_a_newcomer_would_stumble_over(finished: SimpleNamespace) -> None:
    for block in STUMBLING_BLOCKS:
        assert block not in finished.last.text, finished.last.text


def test_the_report_has_its_numbers(finished: SimpleNamespace) -> None:
    page = (finished.folder / "report.html").read_text()
    scores = json.loads((finished.folder / "report.json").read_text())
    assert 0 <= scores["prompt_retrieval_top1"] <= scores["prompt_retrieval_top5"] <= 1
    assert scores["prompt_retrieval_candidates"] >= 1000
    assert scores["reconstruction_psnr_db"] > 15
    assert set(scores["wall_seconds"]) >= {"pack", "train-vae", "encode", "train", "sample", "evaluate", "export"}
    assert 2**28 < scores["peak_rss_bytes"] < 8 * 2**30
    assert "skin tone" in json.dumps(scores["unseen"])
    assert page.count("data:image/png;base64,") > 50
    for curve in scores["loss_charts"]:
        values = curve["curves"][0]["values"]
        assert len(values) > 5
        assert values[-1] < values[0]


def test_started_once_more_nothing_is_done_again(finished: SimpleNamespace) -> None:
    before = (finished.folder / "report.html").stat().st_mtime_ns
    again = Demo(finished.folder)
    assert again.end() == 0
    assert again.text.count("(finished earlier)") == 9
    assert (finished.folder / "report.html").stat().st_mtime_ns == before


def test_two_at_once_are_told(finished: SimpleNamespace) -> None:
    first, second = Demo(finished.folder), Demo(finished.folder)
    codes = sorted([first.end(), second.end()])
    assert codes == [0, 5]
    assert "another `lathe demo` is using" in first.text + second.text


def test_another_preset_is_refused(finished: SimpleNamespace) -> None:
    other = Demo(finished.folder, "--preset", "demo")
    assert other.end() == 2
    assert "--fresh" in other.text


def test_stock_webdataset_reads_the_latents_and_the_export_is_the_trained_model(
    finished: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedObjectStore(finished.folder / "s3", "lathe-demo") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://lathe-demo/latents")
        (tmp_path / "shard.tar").write_bytes(store.read("00000.tar"))
        trained = load_trained("s3://lathe-demo/run")
    samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode())
    assert len(samples) == 200
    for sample in samples:
        assert sample["latent.npy"].shape == (16, 8, 8)
        assert sample["latent.npy"].dtype == np.float16
        assert sample["tokens0.clip.npy"].shape == (16,)
        assert sample["json"]["captions"]

    exported = StableDiffusionPipeline.from_pretrained(finished.folder / "export")
    prompts = ["red heart", "", "a very long caption " * 20, "Grinning FACE, with big eyes!"]
    tokens = torch.from_numpy(trained.prompts.tokenizer(prompts).astype(np.int64))
    ids = exported.tokenizer(
        prompts,
        padding="max_length",
        max_length=exported.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    assert torch.equal(ids, tokens)
    noisy, t = (
        torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 250.0, 700.0, 999.0]),
    )
    with torch.no_grad():
        context = exported.text_encoder(ids)[0]
        theirs = exported.unet(noisy, t, encoder_hidden_states=context).sample
        ours = trained.model(noisy, t, tokens)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)


def test_diffusers_makes_pictures_without_this_package(finished: SimpleNamespace) -> None:
    code = """
import sys
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
made = DiffusionPipeline.from_pretrained(sys.argv[1])
made.set_progress_bar_config(disable=True)
picture = made("red heart", guidance_scale=2.0, num_inference_steps=4).images[0]
assert picture.size == (64, 64), picture.size
again = AutoPipelineForImage2Image.from_pipe(made)
again.set_progress_bar_config(disable=True)
assert again("blue heart", image=picture, strength=0.6, num_inference_steps=5).images[0].size == (64, 64)
assert not any(name == "pipeline" or name.startswith("pipeline.") for name in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(finished.folder / "export")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr


def test_a_server_of_the_users_own_and_what_may_be_wrong_with_it(tmp_path: Path) -> None:
    with EmbeddedObjectStore(tmp_path / "server", "mine") as server:
        keys = server.environment()
        endpoint = keys.pop("AWS_ENDPOINT_URL")
        keys.pop("AWS_ENDPOINT_URL_S3", None)
        absent = Demo(tmp_path / "a", "--s3", f"{endpoint}/absent", **keys)
        assert absent.end() == 3
        assert "absent" in absent.text
        wrong = Demo(tmp_path / "b", "--s3", f"{endpoint}/mine", **{**keys, "AWS_SECRET_ACCESS_KEY": "guessed"})
        assert wrong.end() == 3
        assert "guessed" not in wrong.text
        right = Demo(tmp_path / "c", "--s3", f"{endpoint}/mine", **keys)
        right.wait_for("[3/9]")
        right.process.terminate()
        assert right.end() == 130
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            packed = [entry.name for entry in open_store("s3://mine/lathe-demo/images").list()]
    assert packed == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "00003.tar",
        "00004.tar",
        "00005.tar",
        "00006.tar",
        "ATTRIBUTION.txt",
    ]
    for failed in (absent, wrong):
        assert len(failed.text.splitlines()) == 2
        assert failed.text.startswith("error: ")
