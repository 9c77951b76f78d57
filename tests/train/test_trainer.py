"""`lathe train` as a user starts it, on two real ranks: killed, stopped, resumed, refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time

import psutil
import pytest
import small_models
import torch
from support import fingerprint
from training_run import SMALL, STEPS, Run, copy_of, finish, ranks_of, same_in_the_end

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.data import images
from pipeline.errors import DataError, StorageError
from pipeline.metrics import read_log
from pipeline.models import autoencoder
from pipeline.train import checkpoint
from pipeline.train.post_hoc import reconstruct
from pipeline.train.snapshots import snapshot_store
from pipeline.train.trained_model import load_trained
from pipeline.train.trainer import fit

pytestmark = pytest.mark.ranks


def test_what_a_newcomer_sees(undisturbed):
    assert re.fullmatch(
        r"  parameters  UNet [\d.]+ M, text tower [\d.]+ M\n"
        r"  samples     40 of 4x4x4\n"
        r"  steps       0 to 30 of 8 samples, 6.0 epochs\n"
        r"  ranks       2 on \w+, 1 threads each\n"
        r"  engine      DeepSpeedEngine, ZeRO stage 2, float32 \(checked\)\n"
        r"  metrics     http://127\.0\.0\.1:\d+/metrics\n"
        r"  output      .*/run\n"
        r"(train: \d+/30 steps after \d+ s, .* left  loss .*\n)*"
        r"train: 30/30 steps after \d+ s  loss \d\.\d{4}  rate .*  norm .*  images/s \d+  wait \d+%  epoch 6\.00\n"
        r"finished: .*/run/step-00000030\n",
        undisturbed.said,
    )


def test_log_and_checkpoints_of_a_run(undisturbed):
    assert undisturbed.steps() == list(range(STEPS, 0, -1))
    last = read_log(undisturbed.store)[-1]
    assert {"loss", "learning_rate", "gradient_norm", "images_per_second", "data_wait_seconds", "epoch"} <= last.keys()
    logged = {key for line in read_log(undisturbed.store) for key in line}
    assert {"checkpoint_seconds", "checkpoint_stall_seconds"} <= logged
    assert last["checkpoint_failures"] == 0
    assert last["samples_seen"] == STEPS * 8
    assert last["epoch"] == pytest.approx(STEPS * 8 / 40)
    assert all(1.5 < loss < 3.5 for loss in undisturbed.losses())  # of noise that nothing can be learned from


def test_killed_then_resumed_then_asked_to_stop_is_the_undisturbed_run_so_far(
    undisturbed, tmp_path, latents, monkeypatch
):
    run = Run(tmp_path, latents)
    killed = run.launch()
    run.wait_for_step(6, killed)
    ranks_of(killed)[1].kill()
    assert finish(killed, 128 + signal.SIGKILL).endswith("was ended by SIGKILL, and the other ranks with it\n")
    last = run.steps()[0]
    assert last in (4, 8, 12)  # every fourth is saved

    requeue_file = tmp_path / "requeue.json"
    requeue_file.write_text("of an earlier start")
    monkeypatch.setenv("LATHE_REQUEUE_FILE", str(requeue_file))
    resumed = run.launch("checkpoint.keep=1")
    run.wait_for_step(last + 2, resumed)
    assert not requeue_file.exists()
    ranks, asked = ranks_of(resumed), time.monotonic()
    ranks[1].send_signal(signal.SIGTERM)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    assert time.monotonic() - asked < 20  # 3 s where nothing else runs
    said = finish(resumed, 128 + signal.SIGTERM)
    assert f"going on from {run.output}/{checkpoint.step_name(last)}\n" in said
    stopped = re.search(r"stopped by SIGTERM after step (\d+); .*/step-0+\1\n", said)
    assert stopped is not None
    step = int(stopped[1])
    assert run.steps() == [step]
    assert run.losses() == undisturbed.losses()[:step]
    assert run.state(step) == undisturbed.state(step)
    told = {"step": step, "steps": STEPS, "signal": "SIGTERM", "checkpoint": f"{run.output}/step-{step:08d}"}
    assert json.loads(requeue_file.read_text()) == told


def test_a_launcher_passes_signals_on_and_a_second_one_disturbs_nothing(tmp_path, latents, monkeypatch):
    requeue_file = tmp_path / "requeue.json"
    monkeypatch.setenv("LATHE_REQUEUE_FILE", str(requeue_file))
    run = Run(tmp_path, latents, steps=100000, engine={**SMALL["engine"], "zero_stage": 0})
    launcher = run.launch("checkpoint.every=100000")
    run.wait_for_step(3, launcher)
    asked = time.monotonic()
    launcher.send_signal(signal.SIGUSR1)
    while launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)  # while it stops, saves and leaves
        time.sleep(0.05)
    assert time.monotonic() - asked < 25  # by itself the agent kills after 30 s
    said = finish(launcher, 128 + signal.SIGUSR1)
    (step,) = run.steps()
    assert f"stopped by SIGUSR1 after step {step}; the same command goes on from" in said
    assert json.loads(requeue_file.read_text())["signal"] == "SIGUSR1"

    early = run.launch("steps=200000")  # before the ranks listen to signals there is nothing to save
    while not (ranks := ranks_of(early)):
        time.sleep(0.05)
    asked = time.monotonic()
    early.send_signal(signal.SIGTERM)
    finish(early, 128 + signal.SIGTERM)
    assert time.monotonic() - asked < 25
    assert psutil.wait_procs(ranks, timeout=1)[1] == []
    assert json.loads(requeue_file.read_text()) == {"step": None, "steps": None, "signal": "SIGTERM", "checkpoint": ""}


def test_one_rank_goes_on_where_two_were(undisturbed, tmp_path, latents):
    run = Run(tmp_path, latents)
    shutil.copytree(undisturbed.output, run.output)
    for step in (STEPS - 1, STEPS):
        shutil.rmtree(run.output / checkpoint.step_name(step))
    assert "going on from" in finish(run.start("engine.zero_stage=1", ranks=1))
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    assert run.losses()[: STEPS - 2] == undisturbed.losses()[: STEPS - 2]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (["engine.zero_stage=3"], "DeepSpeedEngine, ZeRO stage 3, float32 (checked)"),
        (
            ["engine.zero_stage=1", "engine.accumulation=2", "engine.activation_checkpointing=true"],
            "DeepSpeedEngine, ZeRO stage 1, float32 (checked), 2 micro batches a step",
        ),
        (["engine.zero_stage=0", "engine.channels_last=true"], "DistributedDataParallel, float32 (checked)"),
    ],
)
def test_other_engines_go_on_where_zero_2_was(undisturbed, tmp_path, how, said):
    run = copy_of(undisturbed, tmp_path, STEPS - 20)
    told = finish(run.start(*how))
    assert f"engine      {said}\n" in told
    assert "Warning" not in told
    parameters = re.compile("  parameters  .*\n")
    assert parameters.search(told)[0] == parameters.search(undisturbed.said)[0]
    assert run.losses()[: STEPS - 20] == undisturbed.losses()[: STEPS - 20]
    assert run.losses() == pytest.approx(undisturbed.losses(), rel=1e-4)
    same_in_the_end(run, undisturbed)


def test_validation_is_not_noticed_and_says_the_same_in_every_engine(undisturbed, tmp_path, make_latents):
    decoder = small_models.autoencoder()
    decoder.save_pretrained(tmp_path / "vae")
    mark = fingerprint(
        resolution=32, context_length=8, holdout=0.0, autoencoder_weights=autoencoder.weights_hash(decoder)
    )
    run = Run(
        tmp_path / "validated",
        make_latents(tmp_path / "latents", mark),
        validation={
            "every": 12,
            "samples": 5,
            "noise_levels": 2,
            "prompts": ["a cat", "a dog", "a bird"],
            "autoencoder": str(tmp_path / "vae"),
            "sampling": {"steps": 2},
        },
    )
    said = finish(run.start())
    assert run.losses() == undisturbed.losses()
    assert run.state(STEPS) == undisturbed.state(STEPS)
    assert re.search(r"\nvalidation after step 24: main \d\.\d{4}, raw \d\.\d{4}, in \d s\n", said)
    found, pictures = run.validations(), "samples/step-00000030.png"
    assert list(found) == [12, 24, STEPS]
    assert found[12]["validation_loss"] != found[24]["validation_loss"]
    assert [list(levels) for levels in found[12]["validation_level_loss"].values()] == [
        ["0_0.00-0.71", "1_0.71-1.00"]
    ] * 2
    for name, ranks, how in (("alone", 1, "engine.zero_stage=0"), ("cut", 2, "engine.zero_stage=3")):
        other = copy_of(run, tmp_path / name, 28)
        (other.output / pictures).unlink()
        finish(other.start(how, ranks=ranks))
        for weights in ("main", "raw"):
            ours, theirs = (one.validations()[STEPS]["validation_loss"][weights] for one in (other, run))
            assert ours == pytest.approx(theirs, rel=1e-4)
        pair = [images.decode((one.output / pictures).read_bytes()).astype(int) for one in (other, run)]
        assert abs(pair[0] - pair[1]).max() <= 2


def test_validation_is_broken_off_on_all_ranks_by_a_signal_to_one(tmp_path, latents):
    averages = [{"name": f"a{number}", "decay": 0.9} for number in range(9)]
    names = [average["name"] for average in averages]
    validation = {"every": 2, "noise_levels": 100, "weights": names}
    run = Run(tmp_path, latents, validation=validation, ema={"averages": averages})
    child = run.launch("engine.zero_stage=0")
    run.wait_for_step(2, child)
    ranks_of(child)[1].send_signal(signal.SIGTERM)
    said = finish(child, 128 + signal.SIGTERM)
    assert said.count("validation after step 2 was broken off\n") == 1
    assert re.search(r"stopped by SIGTERM after step [34];", said)
    assert run.validations() == {}


def test_a_damaged_block_ends_all_ranks_with_one_message(undisturbed, tmp_path, make_latents):
    run = Run(tmp_path, make_latents(tmp_path / "latents"))
    (receipt,) = (tmp_path / "latents").glob("*.receipt.json")
    block = json.loads(receipt.read_text())["blocks"][4]
    shard = tmp_path / "latents" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[block["offset"] + 600] ^= 1
    shard.write_bytes(data)
    started = time.monotonic()
    said = finish(run.launch(), code=DataError.exit_code)
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
    chosen = (
        "ema.averages=[{name: long, sigma_rel: 0.1}]",
        "ema.snapshot_every=4",
        "steps=8",
        "checkpoint.max_failures=1",
    )
    snapshots = snapshot_store(run.store)
    for step in (4, 8):
        in_the_way = run.output / "ema" / checkpoint.step_name(step)
        in_the_way.parent.mkdir(parents=True, exist_ok=True)
        in_the_way.write_bytes(b"no folder")
        started = time.monotonic()
        said = finish(run.start(*chosen, ranks=1), code=StorageError.exit_code)
        assert time.monotonic() - started < 60
        assert "Traceback" not in said
        assert "Not a directory" in said
        assert run.steps()[0] == step
        in_the_way.unlink()
    assert [found.step for found in checkpoint.find(snapshots)] == [4]
    assert f"going on from {run.output}/step-00000008" in finish(run.start(*chosen, ranks=1))
    assert [found.step for found in checkpoint.find(snapshots)] == [8, 4]
    assert "finished already" in finish(run.start(*chosen, ranks=1))


def test_a_run_begins_with_another_ones_weights_and_then_has_its_own(undisturbed, tmp_path, make_latents):
    run = Run(tmp_path, make_latents(tmp_path / "other", seed=1), init_from={"run": str(undisturbed.output)})
    how = ("engine.zero_stage=0", "objective={kind: ddpm}", "metrics.tensorboard=true")
    said = finish(run.start(*how, "steps=4", "optimizer.learning_rate=1e-9", ranks=1))
    source = f"{undisturbed.output}/step-00000030"
    assert f"beginning with weights main of {source}, which learned rectified_flow velocity; steps and" in said
    assert run.steps() == [4]
    before, after = (load_trained(str(one.output), "main").model.state_dict() for one in (undisturbed, run))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
    said = finish(run.start(*how, "steps=6", ranks=1))
    assert f"going on from {run.output}/step-00000004, without init_from\n" in said
    noted = checkpoint.open_checkpoint(run.store, checkpoint.step_name(6)).read("init_from.json")
    assert json.loads(noted) == {"checkpoint": source, "weights": "main", "step": STEPS}
    assert len(list((run.output / "tensorboard").iterdir())) == 2


def test_a_finished_run_says_so(undisturbed, capfd):
    fit(runfile.load(TrainConfig, str(undisturbed.file)))
    assert capfd.readouterr().err == f"finished already: {undisturbed.output}/step-00000030 has all 30 steps\n"


def test_a_checkpoint_of_another_model_is_refused_by_field(undisturbed):
    assert finish(undisturbed.start("text.layers=2", "steps=40", ranks=1), 2) == (
        f"error: text.layers: 2, but the checkpoint {undisturbed.output}/step-00000030 has 1\n"
        "  set text.layers=1, or train into another output\n"
    )
