from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.data.manifest import load_manifest
from pipeline.encode.job import encode
from pipeline.errors import SetupError
from pipeline.operate.bench import memory
from pipeline.operate.bench.device import SimulatedDevice
from pipeline.operate.bench.encode import SIZES, EncodeBench, SimulatedSizes, bench_encode, own_folder, sized
from pipeline.operate.bench.memory import MemorySizes, encode_folder, write_finished
from pipeline.operate.bench.naive import naive
from pipeline.operate.bench.page import page, summary
from pipeline.operate.bench.peak import peak_bytes
from pipeline.operate.bench.pictures import write_shards
from pipeline.operate.bench.runs import job_config, timed_job, told
from pipeline.operate.bench.sd_autoencoder import AutoencoderSizes
from pipeline.storage import open_store

pytestmark = pytest.mark.alone

TINY = EncodeBench(
    repeats=2,
    simulated=SimulatedSizes(shards=2, per_shard=6, naive_shards=1, batch_size=4, picture_side=48, resolution=32),
    autoencoder=AutoencoderSizes(per_shard=3, batch_size=2, picture_side=48, resolution=32, widths=(32, 32, 32, 32)),
    memory=MemorySizes(tiny_shards=(2, 4), finished_shards=(2, 3), finished_samples=200),
)
PEAKS = {"tiny-2": 900_000, "tiny-4": 904_000, "finished-2": 910_000, "finished-3": 913_000}


@pytest.fixture
def config(tmp_path):
    write_shards(open_store(f"{tmp_path}/images"), 2, 6, 48)
    return job_config(str(tmp_path), 32, batch_size=4)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of a benchmark into a folder of one's own, twice, with made-up peaks."""
    root = tmp_path_factory.mktemp("root")
    (root / "mine").write_text("stays")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_measured", lambda root, encoded: PEAKS[root.name])
        bench = EncodeBench(str(root), TINY.repeats, TINY.simulated, TINY.autoencoder, TINY.memory)
        said: list[str] = []
        bench_encode(bench, said.append)
        result = bench_encode(bench, said.append)
    assert [path.name for path in root.iterdir()] == ["mine"], "what was written there is deleted, and nothing else"
    assert said[0].startswith("memory"), "while the parent is small"
    return result


def test_every_figure_follows_from_its_rounds(result):
    simulated, real = result["simulated_device"], result["sd_autoencoder"]
    rounds = simulated["rounds"]
    assert len(rounds) == len(real["rounds"]) == 2
    assert simulated["device_seconds"] == pytest.approx(1.1 * min(one["host_seconds"] for one in rounds))
    for one in rounds:
        assert one["job_over_device"] == pytest.approx(simulated["device_seconds"] / one["job_seconds"])
        assert one["job_over_device"] < 1.0
        assert one["naive_over_device"] == pytest.approx(simulated["device_seconds"] / one["naive_seconds"])
    for one in real["rounds"]:
        assert one["job_over_model"] == pytest.approx(one["model_seconds"] / one["job_seconds"])
    for run in ("host", "job", "naive"):
        assert all(one[f"{run}_cpu_seconds"] > 0 for one in rounds)
    assert result["encode_over_device"] == simulated["median"]["job_over_device"]
    assert result["memory"]["tiny_shards"]["bytes_per_added_shard"] == 2000
    assert result["bytes_per_added_shard"] == 3000
    assert result["setting"]["load_average"] >= 0
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result, allow_nan=False))


def test_median_and_best_of_the_rounds():
    rounds = [{"job_seconds": s, "job_over_device": o} for s, o in ((3.0, 0.9), (1.0, 0.5), (2.0, 0.8))]
    assert told(rounds) == {
        "median": {"job_seconds": 2.0, "job_over_device": 0.8},
        "best": {"job_seconds": 1.0, "job_over_device": 0.9},
        "rounds": rounds,
    }


def test_the_page_tells_figures_machine_and_sizes(result):
    text = page(result, "lathe bench encode --size tiny")
    for said in (
        f"encode_over_device: {result['encode_over_device']:.3f}, to be at least 0.95: ",
        "bytes_per_added_shard: 3,000, to be below 10,000: passed",
        "12 JPEG pictures of 48 px in 2 shards, brought to 32 px",
        "6 pictures in batches of\n2.",
        "| finished shards | 2 and 3 | 0.9 and 0.9 | 3,000 |",
        f"| torch | {result['setting']['packages']['torch']} |",
        "\nlathe bench encode --size tiny\n",
    ):
        assert said in text
    assert "{" not in text
    missed = {**result, "bytes_per_added_shard": 10_000, "encode_over_device": 0.949}
    assert page(missed, "").count("MISSED") == summary(missed).count("MISSED") == 2
    assert "usual loop" in summary(result)


def test_the_usual_loop_writes_the_jobs_latent_shards(config, tmp_path):
    encode(config, encoder=SimulatedDevice(32, 0.0))
    loop = config.model_copy(update={"output": str(tmp_path / "naive")})
    assert naive(loop, SimulatedDevice(32, 0.0), 2) == 12
    for name in ("00000.tar", "00001.tar", "00000.tar.receipt.json", "00001.tar.receipt.json"):
        assert (tmp_path / "naive" / name).read_bytes() == (tmp_path / "latents" / name).read_bytes()


def test_a_run_that_found_its_work_done_is_no_measurement(config, tmp_path):
    encode(config, encoder=SimulatedDevice(32, 0.0))
    with pytest.raises(AssertionError, match="0 shards were encoded, and 2 were to be"):
        timed_job(config, SimulatedDevice(32, 0.0), 2)
    assert timed_job(config, SimulatedDevice(32, 0.0), 2)["seconds"] > 0
    assert not (tmp_path / "latents").exists(), "each run deletes its output"
    assert (tmp_path / "images").exists()


def test_a_bucket_is_left_as_it_was(s3_url):
    open_store(s3_url).write("mine", b"stays")
    with own_folder(s3_url) as url:
        write_shards(open_store(f"{url}/images"), 2, 3, 48)
        timed_job(job_config(url, 32, batch_size=4), SimulatedDevice(32, 0.0), 2)
        assert {entry.name.rpartition("/")[2] for entry in open_store(url).list()} == {"00000.tar", "00001.tar"}
    assert [entry.name for entry in open_store(s3_url).list()] == ["mine"]


def test_the_device_serves_one_batch_after_another(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    device = SimulatedDevice(32, 0.5)
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    first, second = device.start(pixels, False), device.start(pixels, False)
    assert first.result()[0].shape == (4, 8, 4, 4)
    assert now[0] == 102.0
    second.result()
    assert now[0] == 104.0
    now[0] += 1.0  # idle
    device.start(pixels, False).result()
    assert now[0] == 107.0


def test_finished_shards_are_taken_for_finished(tmp_path):
    write_finished(tmp_path, shards=3, samples=1000, buckets=4)
    done = encode_folder(tmp_path)
    assert (done.shards, done.encoded, done.tallies[0].samples) == (3, 0, 3000)
    assert done.tallies[0].rejects == {"damaged_image": 30}
    assert len(load_manifest(f"{tmp_path}/latents/manifest.json").buckets()) == 4


def test_a_jobs_peak_is_measured_in_a_process_of_its_own(tmp_path):
    write_finished(tmp_path, shards=2, samples=10)
    assert 2**26 < memory._measured(tmp_path, encoded=0) < 2**32


@pytest.mark.parametrize(
    ("code", "told", "error", "said"),
    [
        (0, '{"encoded": 1, "peak_bytes": 5}', AssertionError, "1 shards were encoded, and 2 were to be"),
        (1, "", SetupError, "failed: out of paper"),
    ],
)
def test_a_job_that_did_something_else_is_no_measurement(tmp_path, monkeypatch, code, told, error, said):
    done = subprocess.CompletedProcess([], code, told, "out of paper")
    monkeypatch.setattr("subprocess.run", lambda command, **options: done)
    with pytest.raises(error, match=said):
        memory._measured(tmp_path, encoded=2)


def test_a_childs_peak_does_not_begin_with_its_parents():
    program = "from pipeline.operate.bench.peak import peak_bytes; print(peak_bytes())"

    def peak() -> int:
        return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)

    alone = peak()
    held = b"\x01" * 2**30
    assert peak_bytes() > 2**30
    assert abs(peak() - alone) < 2**24
    del held


def test_sizes_by_name():
    assert sized("standard", "s3://b/x") == EncodeBench(root="s3://b/x")
    assert sized("small", repeats=7).repeats == 7
    assert sized("small").simulated == SIZES["small"].simulated
