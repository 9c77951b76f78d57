"""The encoder against diffusers' own preprocessing and encoding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import KINDS, autoencoder, clip, save_clip, transformers_twin

from pipeline.config import EncodeConfig
from pipeline.data.buckets import bucket_sizes
from pipeline.encode import encoder as encoder_module
from pipeline.encode.encoder import Encoder, find_device
from pipeline.errors import ConfigError, SetupError
from pipeline.models.text import Tokenizer

LAST_PLACES = {"rtol": 2e-3, "atol": 2e-3}  # two units of float16's last place


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an autoencoder of each kind."""
    place = tmp_path_factory.mktemp("encoder")
    for kind in KINDS:
        autoencoder(kind).save_pretrained(place / kind)
    return place


def settings_of(place: Path, kind: str = "sd", **fields) -> EncodeConfig:
    tree = {
        "images": {"shards": "unused", "resolution": 64},
        "autoencoder": str(place / kind),
        "output": "unused",
        "batch_size": 4,
        "threads": 1,
        "text": {"context_length": 16},
    }
    return EncodeConfig(**{**tree, **fields})


def pictures(count: int, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Noise on several scales, no two alike."""
    rng = np.random.default_rng((seed, height, width))
    coarse = rng.integers(0, 200, (count, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    return (coarse + rng.integers(0, 56, (count, height, width, 3))).astype(np.uint8)


@torch.no_grad()
def by_diffusers(folder: Path, pixels: np.ndarray, batch: int = 1) -> np.ndarray:
    """Mean and log-variance, as a pipeline of diffusers makes them from PIL images."""
    model, processor = AutoencoderKL.from_pretrained(folder), VaeImageProcessor(vae_scale_factor=8)
    found = []
    for start in range(0, len(pixels), batch):
        images = processor.preprocess([Image.fromarray(p) for p in pixels[start : start + batch]])
        posterior = model.encode(images).latent_dist
        found.append(torch.cat([posterior.mean, posterior.logvar], 1))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
def test_latents_are_those_of_diffusers_whatever_the_batch(place, kind, height, width):
    pixels = pictures(7, height, width)
    expected = by_diffusers(place / kind, pixels)
    assert np.ptp(expected[:, : expected.shape[1] // 2]) > 1
    encoder = Encoder(settings_of(place, kind))
    for batch in (1, 2, 3, 7):
        found = [encoder.start(pixels[i : i + batch], flip=False).result() for i in range(0, 7, batch)]
        assert all(flipped is None for _, flipped in found)
        moments = np.concatenate([moments for moments, _ in found])
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments.astype(np.float32), expected, **LAST_PLACES)


def test_config_of_each_kind_is_read(place):
    encoder = Encoder(settings_of(place, "sd3"))
    assert (encoder.channels, encoder.downsampling_factor) == (16, 8)
    assert (encoder.scaling_factor, encoder.shift_factor) == (1.5305, 0.0609)
    encoder = Encoder(settings_of(place, "sd"))
    assert (encoder.channels, encoder.scaling_factor, encoder.shift_factor) == (4, 0.18215, 0.0)


@cache
def shared_encoder(folder: str) -> tuple[Encoder, np.ndarray, np.ndarray]:
    pixels = pictures(12, seed=1)
    encoder = Encoder(settings_of(Path(folder)))
    return encoder, pixels, encoder.start(pixels, flip=False).result()[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=9))
def test_neighbours_in_the_batch_do_not_matter(place, rows):
    encoder, pixels, alone = shared_encoder(str(place))
    moments, _ = encoder.start(pixels[rows], flip=False).result()
    np.testing.assert_allclose(moments.astype(np.float32), alone[rows].astype(np.float32), **LAST_PLACES)


def test_flipped_latents_are_those_of_the_mirrored_pixels(place):
    pixels = pictures(3, 32, 64)
    encoder = Encoder(settings_of(place))
    moments, flipped = encoder.start(pixels, flip=True).result()
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    np.testing.assert_allclose(flipped.astype(np.float32), by_diffusers(place / "sd", mirrored), **LAST_PLACES)
    np.testing.assert_array_equal(moments, encoder.start(pixels, flip=False).result()[0])
    assert np.abs(flipped.astype(np.float32) - moments).max() > 0.1
    assert np.abs(flipped[..., ::-1].astype(np.float32) - moments).max() > 0.01  # not the mirrored latent


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_and_its_hash_the_same(place, precision):
    pixels = pictures(3)
    exact, rough = Encoder(settings_of(place)), Encoder(settings_of(place, precision=precision))
    found = [encoder.start(pixels, flip=False).result()[0].astype(np.float32) for encoder in (exact, rough)]
    assert 0 < np.abs(found[0] - found[1]).max() < 0.3
    assert rough.fingerprint(64).difference(exact.fingerprint(64)) == ["precision"]


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """An autoencoder whose first layer leaves float16's range on bright pictures, and float32's never."""
    model = autoencoder()
    with torch.no_grad():
        model.encoder.conv_in.weight.copy_(4000 + 1000 * torch.rand_like(model.encoder.conv_in.weight))
        model.encoder.conv_in.bias.zero_()
    place = tmp_path_factory.mktemp("fragile")
    model.save_pretrained(place / "sd")
    return place


def bright_and_grey() -> np.ndarray:
    pixels = (pictures(5) // 32 + 124).astype(np.uint8)
    pixels[[1, 4]] = 255 - pictures(2) // 16
    return pixels


def test_what_overflows_float16_is_encoded_again_in_float32(fragile, monkeypatch):
    pixels = bright_and_grey()
    encoder = Encoder(settings_of(fragile, precision="float16"))
    again = []
    retry = encoder._again
    monkeypatch.setattr(encoder, "_again", lambda rows: (again.append(len(rows)), retry(rows))[1])
    moments, flipped = encoder.start(pixels, flip=True).result()
    assert again == [1, 1, 1, 1]  # two bright pictures and their mirrored ones
    assert np.isfinite(moments).all()
    assert np.isfinite(flipped).all()
    exact = Encoder(settings_of(fragile))
    expected, expected_flipped = exact.start(pixels, flip=True).result()
    np.testing.assert_allclose(moments[[1, 4]], expected[[1, 4]], **LAST_PLACES)
    np.testing.assert_allclose(flipped[[1, 4]], expected_flipped[[1, 4]], **LAST_PLACES)
    assert not np.array_equal(moments[[0, 2, 3]], expected[[0, 2, 3]])  # these are float16's


def test_grey_pictures_alone_are_not_encoded_twice(fragile, monkeypatch):
    encoder = Encoder(settings_of(fragile, precision="float16"))
    monkeypatch.setattr(encoder, "_again", lambda rows: pytest.fail("encoded again"))
    encoder.start(bright_and_grey()[[0, 2, 3]], flip=False).result()


def test_bfloat16_that_is_not_finite_is_encoded_again_too(place, monkeypatch):
    pixels = pictures(3)
    encoder = Encoder(settings_of(place, precision="bfloat16"))
    whole = encoder_module.autoencoder.encode_moments

    def overflowing(model, batch):
        moments = whole(model, batch)
        if model.dtype == torch.bfloat16:
            moments[1, -1, 0, 0] = torch.inf  # in a log-variance, which is clamped where it is finite
        return moments

    monkeypatch.setattr(encoder_module.autoencoder, "encode_moments", overflowing)
    moments, _ = encoder.start(pixels, flip=False).result()
    expected, _ = Encoder(settings_of(place)).start(pixels[1:2], flip=False).result()
    np.testing.assert_array_equal(moments[1:2], expected)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_what_float32_cannot_make_finite_or_float16_hold_stays_so(tmp_path, precision):
    model = autoencoder()
    with torch.no_grad():
        model.quant_conv.bias[0] = 1e6  # a mean that float16 cannot hold
        model.quant_conv.bias[1] = torch.nan
    model.save_pretrained(tmp_path / "sd")
    moments, _ = Encoder(settings_of(tmp_path, precision=precision)).start(pictures(2), flip=False).result()
    assert np.isinf(moments[:, 0]).all()
    assert np.isnan(moments[:, 1]).all()
    assert np.isfinite(moments[:, 2:]).all()


def test_slicing_changes_last_places_at_most(place):
    pixels = pictures(4)
    whole, sliced = (Encoder(settings_of(place, slicing=on)) for on in (False, True))
    assert sliced.fingerprint(64) == whole.fingerprint(64)
    np.testing.assert_allclose(
        sliced.start(pixels, flip=False).result()[0], whole.start(pixels, flip=False).result()[0], **LAST_PLACES
    )


def test_tiles_are_those_of_diffusers(place):
    pixels = pictures(2, 128, 96)
    encoder = Encoder(settings_of(place, tiling=True))
    moments, _ = encoder.start(pixels, flip=False).result()
    reference = AutoencoderKL.from_pretrained(place / "sd")
    reference.enable_tiling()
    images = VaeImageProcessor(vae_scale_factor=8).preprocess([Image.fromarray(p) for p in pixels])
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], 1).numpy()
    np.testing.assert_allclose(moments.astype(np.float32), expected, **LAST_PLACES)
    assert encoder.fingerprint(128).difference(Encoder(settings_of(place)).fingerprint(128)) == ["tiling"]


def test_fingerprint_says_what_the_bytes_depend_on(place):
    images = {"shards": "unused", "resolution": [64, 128], "buckets": {"step": 16}, "flip": True, "holdout": 0.25}
    images |= {"filters": {"where": "a < 1", "min_side": 9}, "background": (1, 2, 3), "max_upscale": 1.5}
    encoder = Encoder(settings_of(place, images=images))
    config = settings_of(place, images=images)
    found = encoder.fingerprint(128)
    assert found.resolution == 128
    assert found.buckets == bucket_sizes(128, config.images.buckets)
    assert json.loads(found.filters) == config.images.filters.model_dump(mode="json")
    assert (found.flip, found.holdout, found.background, found.max_upscale) == (True, 0.25, (1, 2, 3), 1.5)
    assert (found.text_mode, found.text_padding, found.text_precision) == ("joint", "full", "float32")
    assert [tower.name for tower in found.text_towers] == ["clip"]
    assert set(found.difference(encoder.fingerprint(64))) == {"resolution", "buckets"}
    plain = Encoder(settings_of(place)).fingerprint(64)
    changed = {"buckets", "max_upscale", "flip", "background", "filters", "holdout"}
    assert set(plain.difference(encoder.fingerprint(64))) == changed
    assert set(plain.difference(Encoder(settings_of(place, "sdxl")).fingerprint(64))) == {"autoencoder_config"}
    assert set(plain.difference(Encoder(settings_of(place, "sd3")).fingerprint(64))) == {
        "autoencoder_weights",
        "autoencoder_config",
    }


def test_fingerprint_does_not_know_where_the_autoencoder_was(place, tmp_path):
    AutoencoderKL.from_pretrained(place / "sd").save_pretrained(tmp_path / "pipeline" / "vae")
    one = Encoder(settings_of(place)).fingerprint(64)
    assert Encoder(settings_of(tmp_path, "pipeline")).fingerprint(64) == one


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ({"resolution": 60}, r"images\.resolution: 60 is not a multiple of 8"),
        ({"resolution": [64, 100]}, r"images\.resolution: 100 is not a multiple of 8"),
        ({"resolution": 64, "buckets": {"step": 12}}, r"images\.buckets\.step: 12 is not a multiple of 8"),
    ],
)
def test_sizes_that_the_autoencoder_cannot_halve_are_refused(place, images, named):
    with pytest.raises(ConfigError, match=named) as caught:
        Encoder(settings_of(place, images={"shards": "unused", **images}))
    assert "use " in caught.value.remedy


def test_environment_tells_what_last_places_depend_on(place):
    environment = Encoder(settings_of(place, slicing=True)).environment
    assert environment.items() >= {"threads": 1, "batch_size": 4, "slicing": 1, "compile": 0}.items()
    assert {"lathe", "torch", "diffusers", "device"} <= environment.keys()


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory on cpu", "batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "out of memory", "tiling"),
        (RuntimeError("\"conv\" not implemented for 'Half'"), "does not run on cpu", "float32"),
    ],
)
def test_what_the_machine_cannot_do_is_told(place, monkeypatch, error, said, remedy):
    encoder = Encoder(settings_of(place))

    def fail(*_):
        raise error

    monkeypatch.setattr(encoder_module.autoencoder, "encode_moments", fail)
    with pytest.raises(SetupError, match=said) as caught:
        encoder.start(pictures(1), flip=False)
    assert remedy in caught.value.remedy


def test_compiling_begins_with_a_size_that_covers_all_and_its_failure_is_told(place, monkeypatch):
    compiled, seen = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    whole = encoder_module.autoencoder.encode_moments

    def encode(model, batch):
        seen.append(tuple(batch.shape))
        return whole(model, batch)

    monkeypatch.setattr(encoder_module.autoencoder, "encode_moments", encode)
    images = {"shards": "unused", "resolution": 64, "buckets": {"step": 16}}
    encoder = Encoder(settings_of(place, compile=True, images=images))
    assert compiled == [(encoder._model.encoder, {"dynamic": True})]
    assert seen == [(2, 3, *bucket_sizes(64, encoder._config.images.buckets)[0])]
    assert encoder._model is not encoder._float32
    assert encoder.environment["compile"] == 1

    def fail(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(encoder_module.autoencoder, "encode_moments", fail)
    with pytest.raises(SetupError, match=r"torch\.compile failed: no C\+\+ compiler"):
        Encoder(settings_of(place, compile=True))


def test_other_errors_of_torch_are_not_hidden(place):
    with pytest.raises(RuntimeError, match="expected input"):
        Encoder(settings_of(place)).start(np.zeros((1, 64, 64, 4), np.uint8), flip=False)


def test_each_local_rank_gets_its_own_gpu(monkeypatch):
    assert find_device({}).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_device({}).index == 0
    assert find_device({"LOCAL_RANK": "3"}).index == 3
    assert find_device({"SLURM_LOCALID": "6"}).index == 2
    assert find_device({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}).index == 1


def test_captions_and_the_empty_prompt_go_through_the_towers(place, tmp_path):
    """SDXL's two towers, as its pipeline in diffusers would join them."""
    first, second = clip(quick_gelu=True), clip(seed=1)
    towers = [
        {"name": "l", "model": save_clip(tmp_path / "l", first, quick_gelu=True), "pad": "end"},
        {"name": "g", "model": save_clip(tmp_path / "g", second), "pooled": True},
    ]
    text = {"mode": "cached", "towers": [{**t, "layer": "penultimate", "final_norm": False} for t in towers]}
    encoder = Encoder(settings_of(place, text=text))
    captions = ["a cat", "two dogs, asleep"]
    found = encoder.text(captions)
    with torch.no_grad():
        for name, model, pad in (("l", first, "end"), ("g", second, "zero")):
            ids = torch.from_numpy(Tokenizer(77, pad)(captions).astype(np.int64))
            expected = transformers_twin(model)(ids, output_hidden_states=True)
            for i, arrays in enumerate(found):
                assert set(arrays) == {"text.l", "text.g", "pooled.g"}
                np.testing.assert_allclose(arrays[f"text.{name}"], expected.hidden_states[-2][i].numpy(), **LAST_PLACES)
            if name == "g":
                pooled = np.stack([arrays["pooled.g"] for arrays in found])
                np.testing.assert_allclose(pooled, expected.text_embeds.numpy(), **LAST_PLACES)
    empty = encoder.empty()
    assert {name: array.shape for name, array in empty.items()} == {
        "text.l": (77, 32),
        "text.g": (77, 32),
        "pooled.g": (24,),
    }
