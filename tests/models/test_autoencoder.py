from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from pipeline.config import AutoencoderModelConfig
from pipeline.errors import DataError
from pipeline.models import autoencoder
from pipeline.storage import open_store

TINY = AutoencoderModelConfig(latent_channels=4, block_out_channels=(8, 8, 16), norm_num_groups=4)


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return autoencoder.build(TINY).eval()


def test_moments_are_mean_and_log_variance_of_the_posterior(model: AutoencoderKL) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = autoencoder.encode_moments(model, images)
        posterior = model.encode(images).latent_dist
    assert moments.shape == (2, 8, 4, 4)
    torch.testing.assert_close(moments[:, :4], posterior.mean)
    torch.testing.assert_close(moments[:, 4:], posterior.logvar)
    assert autoencoder.decode(model, moments[:, :4]).shape == images.shape
    assert autoencoder.downscale(model) == 4


def test_what_is_saved_is_loaded(model: AutoencoderKL, tmp_path: Path) -> None:
    autoencoder.save(model, open_store(str(tmp_path / "vae")))
    assert sorted(p.name for p in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = autoencoder.load(str(tmp_path / "vae"))
    assert not loaded.training
    assert loaded.config.scaling_factor == 1.0
    assert autoencoder.weights_hash(loaded) == autoencoder.weights_hash(model)


def test_hash_sees_one_bit_and_dtype(model: AutoencoderKL) -> None:
    before = autoencoder.weights_hash(model)
    bias = model.decoder.conv_out.bias
    with torch.no_grad():
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    after = autoencoder.weights_hash(model)
    assert after != before
    assert autoencoder.weights_hash(model.half()) != after


def test_new_autoencoder_starts_with_little_noise_around_the_mean_colour(model: AutoencoderKL) -> None:
    colour = torch.tensor([0.5, -0.25, 0.0])
    autoencoder.initialise(model, colour)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        moments = autoencoder.encode_moments(model, images)
        block = model.decoder.mid_block.resnets[0]
        features = torch.randn(1, 16, 4, 4)
        torch.testing.assert_close(block(features, None), features)
    assert (moments[:, 4:] + 6).abs().max() < 1
    torch.testing.assert_close(model.decoder.conv_out.bias.detach(), colour)


def test_folder_of_a_whole_pipeline_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        autoencoder.load(str(tmp_path))


def test_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        autoencoder.load(str(tmp_path / "vae"))


def test_damaged_weights_are_explained(model: AutoencoderKL, tmp_path: Path) -> None:
    autoencoder.save(model, open_store(str(tmp_path)))
    (tmp_path / autoencoder.WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{not safetensors")
    with pytest.raises(DataError, match="cannot be loaded"):
        autoencoder.load(str(tmp_path))


def test_unknown_hub_id_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="lathe-tests/no-such-autoencoder cannot be loaded"):
        autoencoder.load("lathe-tests/no-such-autoencoder")
