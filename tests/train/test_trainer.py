"""`lathe train` as a user starts it, on two real ranks: killed, stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.errors import DataError, StorageError
from pipeline.metrics import read_log
from pipeline.storage import open_store
from pipeline.train import checkpoint
from pipeline.train.post_hoc import reconstruct
from pipeline.train.snapshots import snapshot_store
from pipeline.train.trained_model import load_trained
from pipeline.train.trainer import fit

ROOT = Path(__file__).parents[2]
STEPS = 30
SMALL = {
    "unet": {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "norm_num_groups": 8,
    },
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "train_token_embedding": False},
    "engine": {"threads_per_rank": 1, "timeout_seconds": 60},
    "optimizer": {"warmup_steps": 3},
    "steps": STEPS,
    "global_batch": 8,
    "shuffle_window": 4,
    "checkpoint": {"every": 4, "keep": 2},
    "log_every": 1,
}

pytestmark = pytest.mark.ranks


class Run:
    """One output folder, and the commands started on it."""

    def __init__(self, folder: Path, latents: str) -> None:
        self.latents, self.output = latents, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "train.yaml"
        config = TrainConfig.model_validate({"manifest": latents, "output": str(self.output), **SMALL})
        self.file.write_text(runfile.dump(config))
        self.store = open_store(str(self.output))

    def start(self, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
        launcher = ["bash", str(ROOT / "launchers/accelerate.sh")]
        command = launcher if ranks > 1 else [sys.executable, "-m", "pipeline", "train"]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
        environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": str(ranks)}
        return subprocess.Popen(
            [*command, str(self.file), *overrides],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.file.parent,
        )

    def wait_for_step(self, step: int, child: subprocess.Popen[str]) -> None:
        started = psutil.Process(child.pid).create_time()
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step and line["time"] > started for line in read_log(self.store)):
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def losses(self) -> list[float]:
        lines = read_log(self.store)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def steps(self) -> list[int]:
        return [found.step for found in checkpoint.find(self.store)]

    def state(self, step: int) -> dict[str, bytes]:
        """Everything that is trained, as the ranks wrote it at a step: bytes by file."""
        folder = self.output / checkpoint.step_name(step)
        return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def ranks_of(child: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(child.pid).children(recursive=True) if "RANK" in p.environ()]


def finish(child: subprocess.Popen[str], code: int = 0) -> str:
    said = child.communicate(timeout=180)[0]
    assert child.returncode == code, said
    return said


def copy_of(run: Run, folder: Path, step: int) -> Run:
    """A run as it was after a step."""
    copy = Run(folder, run.latents)
    shutil.copytree(run.output, copy.output)
    for later in copy.steps():
        if later > step:
            checkpoint.clear(copy.store, checkpoint.step_name(later))
    return copy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_latents) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, make_latents(folder / "latents"))
    run.said = finish(run.start("checkpoint.every=1", "checkpoint.keep=100"))
    return run


def test_what_a_newcomer_sees(undisturbed):
    assert re.fullmatch(
        r"  parameters  UNet [\d.]+ M, text tower [\d.]+ M\n"
        r"  samples     40 of 4x4x4\n"
        r"  steps       0 to 30 of 8 samples, 6.0 epochs\n"
        r"  ranks       2 on \w+, 1 threads each\n"
        r"  engine      DeepSpeedEngine, ZeRO stage 2, float32 \(checked\)\n"
        r"  metrics     http://127\.0\.0\.1:\d+/metrics\n"
        r"  output      .*/run\n"
        r"train: 30/30 steps after \d+ s  loss \d\.\d+  \d+ images/s\n"
        r"finished: .*/run/step-00000030\n",
        undisturbed.said,
    )


def test_log_and_checkpoints_of_a_run(undisturbed):
    assert undisturbed.steps() == list(range(STEPS, 0, -1))
    last = read_log(undisturbed.store)[-1]
    assert {"loss", "learning_rate", "gradient_norm", "images_per_second", "data_wait_seconds", "epoch"} <= last.keys()
    assert last["samples_seen"] == STEPS * 8
    assert last["epoch"] == pytest.approx(STEPS * 8 / 40)
    assert all(1.5 < loss < 3.5 for loss in undisturbed.losses())  # of noise that nothing can be learned from


def test_killed_then_resumed_then_asked_to_stop_is_the_undisturbed_run_so_far(undisturbed, tmp_path, latents):
    run = Run(tmp_path, latents)
    killed = run.start()
    run.wait_for_step(6, killed)
    ranks_of(killed)[1].kill()
    assert finish(killed, 128 + signal.SIGKILL).endswith("was ended by SIGKILL, and the other ranks with it\n")
    last = run.steps()[0]
    assert last in (4, 8, 12)  # every fourth is saved

    resumed = run.start("checkpoint.keep=1")
    run.wait_for_step(last + 2, resumed)
    ranks_of(resumed)[0].send_signal(signal.SIGTERM)
    said = finish(resumed, 128 + signal.SIGTERM)
    assert f"going on from {run.output}/{checkpoint.step_name(last)}\n" in said
    stopped = re.search(r"stopped by SIGTERM after step (\d+); .*/step-0+\1\n", said)
    assert stopped is not None
    step = int(stopped[1])
    assert run.steps() == [step]
    assert run.losses() == undisturbed.losses()[:step]
    assert run.state(step) == undisturbed.state(step)


def test_one_rank_goes_on_where_two_were(undisturbed, tmp_path, latents):
    run = Run(tmp_path, latents)
    shutil.copytree(undisturbed.output, run.output)
    for step in (STEPS - 1, STEPS):
        shutil.rmtree(run.output / checkpoint.step_name(step))
    assert "going on from" in finish(run.start("engine.zero_stage=1", ranks=1))
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    assert run.losses()[: STEPS - 2] == undisturbed.losses()[: STEPS - 2]


def test_a_damaged_block_ends_all_ranks_with_one_message(undisturbed, tmp_path, make_latents):
    run = Run(tmp_path, make_latents(tmp_path / "latents"))
    (receipt,) = (tmp_path / "latents").glob("*.receipt.json")
    block = json.loads(receipt.read_text())["blocks"][-1]
    shard = tmp_path / "latents" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[block["offset"] + 600] ^= 1
    shard.write_bytes(data)
    started = time.monotonic()
    said = finish(run.start(), code=DataError.exit_code)
    assert time.monotonic() - started < 60
    assert said.count("00000.tar: samples 32 to 39") == 1
    assert "Traceback" not in said

    skip = ("loader.on_damage=skip", "loader.max_skip_rate=0.9", "checkpoint.keep=9", "steps=20")
    said = finish(run.start(*skip))
    assert "its 8 samples are skipped from now on" in said
    saved = checkpoint.open_checkpoint(run.store, checkpoint.step_name(12))
    assert [[0, 0, 4, 8]] in [notes["skipped_blocks"] for notes in saved.notes()]
    # the mean is of the samples that count, a fifth of which are skipped
    assert 0.93 < sum(run.losses()) / sum(undisturbed.losses()[:20]) < 1.07
    # the skip list is the run's: with the block sound again, and on one rank, the steps that follow are the same
    data[block["offset"] + 600] ^= 1
    shard.write_bytes(data)
    alone = copy_of(run, tmp_path / "alone", 12)
    finish(alone.start("loader.on_damage=fail", *skip[1:], ranks=1))
    assert alone.losses() == pytest.approx(run.losses(), rel=1e-4)


def test_other_samples_are_refused_and_by_wish_gone_on_with(undisturbed, tmp_path, make_latents):
    run = copy_of(undisturbed, tmp_path, 12)
    more = make_latents(tmp_path / "more", seed=1)
    both = (f"datasets=[{{manifest: {run.latents}, weight: 3}}, {{manifest: {more}, weight: 1}}]", "manifest=''")
    said = finish(run.start(*both, ranks=1), code=DataError.exit_code)
    assert "trained on other samples: it had 1 data sets, and there are 2" in said
    assert "restart_order=true" in said
    said = finish(run.start(*both, "restart_order=true", "steps=20", ranks=1))
    assert "other samples than before: their order begins with step 12" in said
    assert "80 of 4x4x4, from 2 data sets" in said
    before = json.loads((undisturbed.output / "step-00000012" / "latents.json").read_text())
    now = json.loads((run.output / "step-00000020" / "latents.json").read_text())
    assert now["mean"] == before["mean"]  # the network goes on in the scale that it has learnt
    assert now["order"] != before["order"]
    again = copy_of(run, tmp_path / "again", 16)
    assert "going on from" in finish(again.start(*both, "restart_order=true", "steps=20", ranks=1))
    assert run.losses() == again.losses()
    for one in (run, again):
        assert checkpoint.open_checkpoint(one.store, checkpoint.step_name(20)).run()["counters"]["order_origin"] == 12


def test_averages_of_any_length_are_made_of_a_run_and_used_like_one(undisturbed, tmp_path, latents):
    run = Run(tmp_path, latents)
    averages = "ema.averages=[{name: short, sigma_rel: 0.05}, {name: long, sigma_rel: 0.1}, {name: none, decay: 0}]"
    chosen = ("ema.snapshot_every=5", "optimizer.schedule=edm2", "optimizer.text_learning_rate_ratio=0.5", averages)
    finish(run.start(*chosen, "steps=12", ranks=1))
    assert [found.step for found in checkpoint.find(snapshot_store(run.store))] == [12, 10, 5]
    finish(run.start(*chosen, "checkpoint.keep=9", ranks=1))  # longer, from step 12 on
    assert [found.step for found in checkpoint.find(snapshot_store(run.store))] == [30, 25, 20, 15, 12, 10, 5]
    back = copy_of(run, tmp_path / "back", 24)
    said = finish(back.start(*chosen, "steps=26", ranks=1))
    assert "deleted 2 snapshots of averages later than step 24: their course was left behind" in said
    assert [found.step for found in checkpoint.find(snapshot_store(back.store))] == [26, 25, 20, 15, 12, 10, 5]
    made = reconstruct(str(run.output), 0.08, str(tmp_path / "made"))
    assert made.error < 0.03
    short, long, between = (
        torch.cat([p.flatten() for p in load_trained(address, name).model.parameters()])
        for address, name in ((str(run.output), "short"), (str(run.output), "long"), (made.output, ""))
    )
    assert (between - (short + long) / 2).abs().max() < (short - long).abs().max()
    raw, none = (load_trained(str(run.output), name).model.state_dict() for name in ("raw", "none"))
    assert all(torch.equal(raw[name], none[name]) for name in raw)
    refused = finish(run.start(*chosen, f"output={made.output}", "steps=31", ranks=1), 4)
    assert "step-00000030 cannot be trained on: it has no weight, exp_avg" in refused
    assert "error: " in finish(undisturbed.start("ema.averages.0.decay=0.5", "steps=40", ranks=1), 2)


def test_the_checkpoint_comes_before_the_snapshot_which_is_taken_later_where_it_failed(tmp_path, latents):
    run = Run(tmp_path, latents)
    chosen = ("ema.averages=[{name: long, sigma_rel: 0.1}]", "ema.snapshot_every=4", "steps=8")
    snapshots = snapshot_store(run.store)
    for step in (4, 8):
        in_the_way = run.output / "ema" / checkpoint.step_name(step)
        in_the_way.parent.mkdir(parents=True, exist_ok=True)
        in_the_way.write_bytes(b"no folder")
        started = time.monotonic()
        said = finish(run.start(*chosen), code=StorageError.exit_code)
        assert time.monotonic() - started < 60
        assert "Traceback" not in said
        assert "Not a directory" in said
        assert run.steps()[0] == step
        in_the_way.unlink()
    assert [found.step for found in checkpoint.find(snapshots)] == [4]
    assert f"going on from {run.output}/step-00000008" in finish(run.start(*chosen, ranks=1))
    assert [found.step for found in checkpoint.find(snapshots)] == [8, 4]
    assert "finished already" in finish(run.start(*chosen, ranks=1))


def test_a_finished_run_says_so(undisturbed, capfd):
    fit(runfile.load(TrainConfig, str(undisturbed.file)))
    assert capfd.readouterr().err == f"finished already: {undisturbed.output}/step-00000030 has all 30 steps\n"


def test_a_checkpoint_of_another_model_is_refused_by_field(undisturbed):
    assert finish(undisturbed.start("text.layers=2", "steps=40", ranks=1), 2) == (
        f"error: text.layers: 2, but the checkpoint {undisturbed.output}/step-00000030 has 1\n"
        "  set text.layers=1, or train into another output\n"
    )
