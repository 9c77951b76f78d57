"""Out of memory: the figure, and settings that fit the run. The allocations are real ones."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_run import Run

from pipeline.config import TrainConfig
from pipeline.runtime.watchdog import Watchdog
from pipeline.train.memory_advice import out_of_memory, settings_to_change


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"manifest": "m", "output": "o", "global_batch": 24, **changes})


def ranks(device: str = "cpu", step: int = 0, world_size: int = 2) -> Any:
    watch = Watchdog()
    watch.note("computes" if step else "starts", step)
    return SimpleNamespace(rank=1, world_size=world_size, device=torch.device(device), watch=watch)


def failure(work: Callable[[], object]) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    ("work", "figure"),
    [
        (lambda: torch.empty(1 << 50, dtype=torch.uint8), ": 1 PiB more were asked for"),
        (lambda: np.zeros(1 << 50, np.uint8), ": 1 PiB more were asked for"),
        (lambda: bytearray(1 << 60), ""),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_failures_on_the_host(work, figure):
    found = out_of_memory(failure(work), config(), ranks(step=12))
    assert found is not None
    assert found.message == f"rank 1 ran out of the host's memory at step 12{figure}"
    assert found.remedy == (
        "as many of these as it takes, in this order: engine.accumulation=2 or 3, engine.activation_checkpointing=true,"
        " engine.zero_stage=3, shuffle_window=64, fewer ranks on each machine, more ranks, a smaller model"
    )


def test_of_a_gpu_in_building_and_in_a_step():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of ...")
    built = out_of_memory(error, config(engine={"zero_stage": 1}), ranks("cuda:3"))
    assert built is not None
    assert built.message == (
        "rank 1 ran out of cuda:3's memory as model and optimizer were built: 2.5 GiB more were asked for"
    )
    assert built.remedy == (
        "as many of these as it takes, in this order: engine.precision=bfloat16, engine.zero_stage=2 or 3,"
        " engine.offload_optimizer=true, more ranks, a smaller model"
    )
    step = out_of_memory(error, config(), ranks("cuda:3", step=1))
    assert step is not None
    assert ": engine.accumulation=2 or 3, engine.activation_checkpointing=true, engine.precision=bfl" in step.remedy


def test_what_is_set_already_is_not_proposed():
    engine = {"zero_stage": 3, "precision": "bfloat16", "accumulation": 12, "activation_checkpointing": True}
    given = config(engine={**engine, "offload_optimizer": True, "offload_parameters": True})
    assert settings_to_change(given, 2, building=False, on_gpu=True, on_host=False) == [
        "more ranks",
        "a smaller model",
    ]
    assert settings_to_change(given, 2, building=False, on_gpu=True, on_host=True) == [
        "engine.offload_parameters=false",
        "engine.offload_optimizer=false",
        "shuffle_window=64",
        "fewer ranks on each machine",
    ]


def test_in_a_validation_it_is_the_pictures():
    standing = ranks("cuda:3", step=7)
    standing.watch.note("validates, pass 12", 7)
    prompts = {"every": 5, "prompts": ["a cat"], "autoencoder": "vae"}
    found = out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), config(validation=prompts), standing)
    assert found is not None
    assert found.message == "rank 1 ran out of cuda:3's memory in the validation after step 7"
    assert ": fewer or no validation.prompts, " in found.remedy


def test_another_error_is_none_of_these():
    assert out_of_memory(RuntimeError("shapes do not fit"), config(), ranks()) is None


@pytest.mark.ranks
def test_a_model_that_does_not_fit_is_one_line(tmp_path, latents):
    run = Run(tmp_path, latents)
    wide = ("unet.block_out_channels=[400000]", "engine.zero_stage=0")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "train", str(run.file), *wide], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: rank 0 ran out of the host's memory as model and optimizer were built: [\d.]+ [GT]iB more were asked"
        r" for\n  as many .*: more ranks, with engine.zero_stage=3, a smaller model\n",
        done.stderr,
    ), done.stderr
