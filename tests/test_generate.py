from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from pipeline.config import AutoencoderModelConfig, ObjectiveConfig, SamplingConfig, TextConfig, UNetConfig
from pipeline.data.images import to_uint8
from pipeline.diffusion.objective import objective_of
from pipeline.generate import generate
from pipeline.models import autoencoder, unet
from pipeline.models.conditioning import TokenIds
from pipeline.models.text import TextTower, Tokenizer
from pipeline.models.unet import TextToImage

MEAN, STD = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.5])
PROMPTS = ["a red apple", "", "a blue house"]
HOW = {
    "objective": objective_of(ObjectiveConfig()),
    "sampling": SamplingConfig(guidance=2.0, steps=3),
    "seed": 0,
    "batch_size": 3,
}
SAMPLINGS = [
    {"sampler": "heun"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "dpm++", "grid": "log_snr"},
    {"sampler": "ode", "tolerance": 0.01},
    {"guidance_rescale": 0.7},
    {"guidance_interval": (0.2, 3.0)},
]


def sampling(**changed: Any) -> SamplingConfig:
    return SamplingConfig(**{"guidance": 2.0, "steps": 3} | changed)


@pytest.fixture(scope="module")
def parts() -> tuple[TextToImage, AutoencoderKL, torch.Tensor, torch.Tensor, TokenIds]:
    torch.manual_seed(0)
    vae = autoencoder.build(AutoencoderModelConfig(latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4))
    net = unet.build(UNetConfig(block_out_channels=(16, 32), attention_head_dim=2, norm_num_groups=8), 2, 4, 16)
    model = TextToImage(net, TextTower(TextConfig(width=16, layers=1, heads=2, context_length=8)))
    return model.eval(), vae.eval(), MEAN, STD, TokenIds(Tokenizer(8))


def test_pictures_are_the_decoded_raw_latents(parts) -> None:  # type: ignore[no-untyped-def]
    latents, pictures = generate(*parts, PROMPTS, **HOW)
    assert latents.shape == (3, 2, 4, 4)
    assert pictures.shape == (3, 8, 8, 3)
    assert pictures.dtype == np.uint8
    with torch.no_grad():
        raw = latents * STD.view(1, 2, 1, 1) + MEAN.view(1, 2, 1, 1)
        np.testing.assert_array_equal(pictures, to_uint8(autoencoder.decode(parts[1], raw)))


def test_batch_size_does_not_change_a_picture(parts) -> None:  # type: ignore[no-untyped-def]
    together, _ = generate(*parts, PROMPTS, **HOW)
    alone, _ = generate(*parts, PROMPTS, **HOW | {"batch_size": 1})
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", [{}, {"kind": "ddpm"}, {"kind": "edm"}], ids=str)
@pytest.mark.parametrize("changed", SAMPLINGS, ids=str)
def test_every_sampler_makes_the_same_pictures_in_any_batch(parts, changed, objective) -> None:  # type: ignore[no-untyped-def]
    how = HOW | {"objective": objective_of(ObjectiveConfig(**objective)), "sampling": sampling(**changed)}
    together, _ = generate(*parts, PROMPTS, **how)
    alone, _ = generate(*parts, PROMPTS, **how | {"batch_size": 1})
    plain, _ = generate(*parts, PROMPTS, **how | {"sampling": sampling()})
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together[0], plain[0], atol=1e-5)


def test_seed_prompt_and_guidance_change_the_picture(parts) -> None:  # type: ignore[no-untyped-def]
    base, _ = generate(*parts, PROMPTS, **HOW)
    for changed in (
        generate(*parts, PROMPTS, **HOW | {"seed": 1})[0],
        generate(*parts, PROMPTS[::-1], **HOW)[0],
        generate(*parts, PROMPTS, **HOW | {"sampling": sampling(guidance=4.0)})[0],
    ):
        assert not torch.allclose(base[0], changed[0], atol=1e-5)


def test_guidance_does_not_change_the_empty_prompt(parts) -> None:  # type: ignore[no-untyped-def]
    guided, _ = generate(*parts, PROMPTS, **HOW | {"sampling": sampling(guidance=4.0)})
    plain, _ = generate(*parts, PROMPTS, **HOW | {"sampling": sampling(guidance=1.0)})
    torch.testing.assert_close(guided[1], plain[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(guided[0], plain[0], atol=1e-5)


def test_progress_counts_pictures(parts) -> None:  # type: ignore[no-untyped-def]
    seen: list[tuple[float, int]] = []
    generate(
        *parts,
        PROMPTS,
        objective=HOW["objective"],
        sampling=sampling(guidance=1.0, steps=1),
        seed=0,
        batch_size=2,
        progress=lambda done, all_: seen.append((done, all_)),
    )
    assert seen == [(2, 3), (3, 3)]
