"""Counted operations of a step, against torch's counter on the network itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_run import SMALL

from pipeline.config import TrainConfig
from pipeline.data.manifest import load_manifest
from pipeline.diffusion.loss import weighted_loss
from pipeline.runtime.peak import peak_flops
from pipeline.train.model_flops import device_peak, step_flops
from pipeline.train.network import build_network


@pytest.fixture
def job(latents):
    settings = TrainConfig.model_validate({"manifest": latents, "output": "o", **SMALL})
    manifest = load_manifest(latents)
    inputs = torch.randn(2, 4, 4, 4), torch.ones(2), torch.ones(2, 8, dtype=torch.int64), None, None, None
    return settings, manifest, inputs


def test_they_are_those_of_a_real_step(job):
    settings, manifest, inputs = job
    state = torch.random.get_rng_state()
    told = step_flops(settings, manifest, None, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    network = build_network(settings, manifest)
    with FlopCounterMode(display=False) as counter:
        weighted_loss(network(*inputs), torch.zeros(2, 4, 4, 4), torch.ones(2)).backward()
    assert told == pytest.approx(counter.get_total_flops(), rel=0.05)  # inputs have no gradient
    assert told > counter.get_total_flops() / 2


def test_a_network_that_looks_at_values_is_not_counted(job, monkeypatch):
    monkeypatch.setattr("pipeline.train.model_flops.build_network", lambda *_: lambda x, *_: x.sum().item())
    assert step_flops(job[0], job[1], None, job[2]) == 0


def test_the_peak_is_given_or_known_by_name(job, monkeypatch):
    settings = job[0]
    ranks = SimpleNamespace(device=torch.device("cpu"))
    assert device_peak(settings, ranks) is None
    given = TrainConfig.model_validate({**settings.model_dump(), "metrics": {"peak_flops": 1e12}})
    assert device_peak(given, ranks) == 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert device_peak(settings, gpu) is None  # in float32
    half = TrainConfig.model_validate({**settings.model_dump(), "engine": {"precision": "bfloat16"}})
    assert device_peak(half, gpu) == peak_flops("A100", "bfloat16") == 312e12
