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


def _looks(x, *_):
    return x.sum().item()


def _refuses(*_):
    raise AssertionError("no weights")


@pytest.mark.parametrize("build", [lambda *_: _looks, lambda *_: _refuses, lambda *_: 7, _refuses])
def test_a_network_that_cannot_be_counted_ends_nothing(job, monkeypatch, build):
    monkeypatch.setattr("pipeline.train.model_flops.build_network", build)
    assert step_flops(job[0], job[1], None, job[2]) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100X", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI250X/MI250", 191.5e12),
        ("AMD Instinct MI250", 181e12),
    ],
)
def test_a_peak_is_that_of_the_very_device(name, peak):
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None


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
