from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from small_models import KINDS
from small_models import autoencoder as small_autoencoder

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


def test_a_local_folder_needs_no_network(model: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    autoencoder.save(model, open_store(str(tmp_path)))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    autoencoder.load(str(tmp_path))


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


@pytest.mark.parametrize("kind", KINDS)
def test_autoencoders_of_every_kind_are_loaded(kind: str, tmp_path: Path) -> None:
    model = small_autoencoder(kind)
    model.save_pretrained(tmp_path / "vae")
    loaded = autoencoder.load(str(tmp_path / "vae"))
    assert autoencoder.downscale(loaded) == 8
    assert loaded.config.scaling_factor == KINDS[kind]["scaling_factor"]
    assert loaded.config.shift_factor == KINDS[kind].get("shift_factor")
    assert autoencoder.weights_hash(loaded) == autoencoder.weights_hash(model)
    with torch.no_grad():
        moments = autoencoder.encode_moments(loaded, torch.zeros(1, 3, 32, 48))
    assert moments.shape == (1, 2 * KINDS[kind]["latent_channels"], 4, 6)


def test_the_autoencoder_of_a_pipelines_folder_is_loaded(model: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    autoencoder.save(model, open_store(str(tmp_path / "vae")))
    assert autoencoder.weights_hash(autoencoder.load(str(tmp_path))) == autoencoder.weights_hash(model)


def test_of_a_pipeline_on_s3_the_autoencoder_alone_is_fetched(model: AutoencoderKL, s3_url: str) -> None:
    store = open_store(s3_url)
    store.write("model_index.json", b"{}")
    store.write("unet/diffusion_pytorch_model.safetensors", b"large")
    autoencoder.save(model, open_store(f"{s3_url}/vae"))
    for url in (s3_url, f"{s3_url}/vae"):
        assert autoencoder.weights_hash(autoencoder.load(url)) == autoencoder.weights_hash(model)


def test_the_autoencoder_of_a_pipeline_on_the_hub_is_loaded(
    model: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def from_pretrained(place: str, subfolder: str = "", **options: object) -> object:
        asked.append((place, subfolder))
        if not subfolder:
            raise OSError(f"{place} does not appear to have a file named config.json.")
        return model, {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    assert autoencoder.load("someone/pipeline") is model
    assert asked == [("someone/pipeline", ""), ("someone/pipeline", "vae")]


def test_folder_without_an_autoencoder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json, nor vae/config\.json"):
        autoencoder.load(str(tmp_path))


def test_weights_that_are_not_the_configs_are_refused(model: AutoencoderKL, tmp_path: Path) -> None:
    """diffusers makes up what is missing, at random, and only warns."""
    autoencoder.save(model, open_store(str(tmp_path)))
    weights = load_file(tmp_path / autoencoder.WEIGHTS)
    bias = weights.pop("encoder.conv_in.bias")
    save_file(weights, tmp_path / autoencoder.WEIGHTS, {"format": "pt"})
    with pytest.raises(DataError, match=r"lack encoder\.conv_in\.bias"):
        autoencoder.load(str(tmp_path))
    save_file(
        {**weights, "encoder.conv_in.bias": bias, "odd": bias + 1}, tmp_path / autoencoder.WEIGHTS, {"format": "pt"}
    )
    with pytest.raises(DataError, match="have a strange odd"):
        autoencoder.load(str(tmp_path))


def test_autoencoder_of_other_pictures_is_refused(tmp_path: Path) -> None:
    AutoencoderKL(in_channels=4, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="takes 4 channels"):
        autoencoder.load(str(tmp_path))


def test_pickled_weights_are_refused(model: AutoencoderKL, tmp_path: Path) -> None:
    autoencoder.save(model, open_store(str(tmp_path)))
    (tmp_path / autoencoder.WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        autoencoder.load(str(tmp_path))


def test_what_is_stored_keeps_diffusers_range_of_log_variance_and_shows_what_is_not_finite() -> None:
    values = torch.tensor([-1e9, -31.0, 0.5, 21.0, 1e9, torch.inf, torch.nan])
    moments = torch.stack([values, values]).view(1, 2, 1, -1)
    mean, log_variance = autoencoder.to_float16(moments)[0, :, 0].numpy()
    np.testing.assert_array_equal(mean, np.array([-np.inf, -31, 0.5, 21, np.inf, np.inf, np.nan], np.float16))
    np.testing.assert_array_equal(log_variance, np.array([-30, -30, 0.5, 20, 20, np.inf, np.nan], np.float16))


def test_tiles_are_diffusers_own_and_must_meet(tmp_path: Path) -> None:
    model = small_autoencoder()
    images = torch.rand(1, 3, 128, 160) * 2 - 1
    with torch.no_grad():
        whole = autoencoder.encode_moments(model, images)
        autoencoder.use_tiling(model)
        tiled = autoencoder.encode_moments(model, images)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    for side in (40, [64, 64]):
        with pytest.raises(DataError, match="tiles would not meet"):
            autoencoder.use_tiling(small_autoencoder(sample_size=side))


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
