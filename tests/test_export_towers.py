"""Models on frozen text towers as stock pipelines: what SD 1.5, SD 2.1 and SDXL are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from small_models import autoencoder, clip, save_clip

from pipeline.config import ObjectiveConfig, SamplingConfig, TowerConfig, UNetConfig
from pipeline.diffusion.objective import objective_of
from pipeline.errors import ConfigError
from pipeline.export.autoencoder import fold_whitening
from pipeline.export.job import write_pipeline
from pipeline.generate import generate
from pipeline.models import unet
from pipeline.models.conditioning import Conditioning, FrozenTowers
from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer
from pipeline.models.unet import TextToImage

LENGTH, SIDE = 77, 4
PROMPTS = ["a red apple", "Wow! It's 3 o'clock!!"]
MEAN, STD = torch.tensor([0.3, -0.7, 0.2, 0.0]), torch.tensor([2.5, 0.4, 1.0, 0.9])
LIKE: dict[str, list[dict[str, Any]]] = {
    "sd15": [{"model": "l", "pad": "end"}],
    "sd21": [{"model": "g", "layer": "penultimate"}],
    "sdxl": [
        {"name": "clip_l", "model": "l", "layer": "penultimate", "final_norm": False, "pad": "end"},
        {"name": "clip_g", "model": "g", "layer": "penultimate", "final_norm": False, "pooled": True},
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("towers")
    wide = {"text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}}
    save_clip(place / "l", clip(0, quick_gelu=True), quick_gelu=True)
    save_clip(place / "g", clip(1, **wide), **wide)
    return place


def prompts_of(folders: Path, like: list[dict[str, Any]], trimmed: bool = False) -> FrozenTowers:
    configs = [TowerConfig(**{**fields, "model": str(folders / fields["model"])}) for fields in like]
    return FrozenTowers({c.name: (Tokenizer(LENGTH, c.pad), FrozenTower(c)) for c in configs}, trimmed)


def network(prompts: FrozenTowers, sees_sizes: bool) -> TextToImage:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32),
        attention_head_dim=2,
        norm_num_groups=8,
        addition_embed_type="text_time" if sees_sizes else None,
        addition_time_embed_dim=8,
    )
    return TextToImage(unet.build(config, 4, SIDE, prompts.width, prompts.pooled_width), None).eval()


def parts(folders: Path, name: str) -> tuple[TextToImage, AutoencoderKL, FrozenTowers]:
    prompts = prompts_of(folders, LIKE[name])
    return network(prompts, name == "sdxl"), autoencoder(), prompts


@pytest.mark.parametrize("name", LIKE)
def test_a_stock_pipeline_reads_prompts_and_makes_pictures_as_we_do(
    folders: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vae, prompts = parts(folders, name)
    objective = ObjectiveConfig(kind="ddpm")
    write_pipeline(
        tmp_path, model=model, objective=objective, autoencoder=vae, mean=MEAN, std=STD, prompts=prompts, card=""
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline")

    with torch.no_grad():
        states, empty, *pooled = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    told = [(states, prompts(PROMPTS).text), (empty, prompts(["", ""]).text)]
    if pooled:
        told += [(pooled[0], prompts(PROMPTS).pooled), (pooled[1], prompts(["", ""]).pooled)]
    for theirs, ours in told:
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)

    if name != "sdxl":
        return  # from the same states, tests/test_export.py compares pictures
    noise = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    how = {"num_inference_steps": 20, "guidance_scale": 2.0, "output_type": "latent"}
    theirs = pipe(PROMPTS, latents=noise, **how).images
    monkeypatch.setattr("pipeline.generate.normal", lambda *_, **__: noise)
    sampling = SamplingConfig(sampler="dpm++", guidance=2.0, steps=20)
    ours, _ = generate(
        model,
        vae,
        MEAN,
        STD,
        prompts,
        PROMPTS,
        objective=objective_of(objective),
        sampling=sampling,
        seed=0,
        batch_size=2,
    )
    assert (theirs - ours).norm() < 0.05 * (ours - noise).norm()


def test_guidance_and_sizes_reach_the_network(folders: Path) -> None:
    model, vae, prompts = parts(folders, "sdxl")
    seen: list[Conditioning] = []
    forward = model.forward

    def watched(x: torch.Tensor, t: torch.Tensor, *shown: torch.Tensor) -> torch.Tensor:
        seen.append(Conditioning(*shown))
        return forward(x, t, *shown)

    model.forward = watched  # type: ignore[method-assign]
    objective, sampling = objective_of(ObjectiveConfig()), SamplingConfig(guidance=2.0, steps=1)
    generate(model, vae, MEAN, STD, prompts, PROMPTS, objective=objective, sampling=sampling, seed=0, batch_size=2)
    side = float(SIDE * 8)
    assert seen[0].time_ids.tolist() == [[side, side, 0, 0, side, side]] * 4
    torch.testing.assert_close(seen[0].pooled[2], prompts([""]).pooled[0])
    assert seen[0].mask is None


def test_trimmed_prompts_have_a_mask(folders: Path) -> None:
    shown = prompts_of(folders, LIKE["sdxl"], trimmed=True)([*PROMPTS, ""])
    assert shown.mask.sum(1).tolist() == [5, 11, 2]
    assert shown.mask[:, :2].all()


@pytest.mark.parametrize(
    ("like", "said"),
    [
        (LIKE["sdxl"], "StableDiffusionPipeline reads one tower"),
        ([{**LIKE["sd21"][0], "final_norm": False}], "StableDiffusionPipeline reads one tower"),
        ([LIKE["sdxl"][1]], "StableDiffusionXLPipeline reads"),
    ],
)
def test_what_no_stock_pipeline_reads_is_refused(
    folders: Path, tmp_path: Path, like: list[dict[str, Any]], said: str
) -> None:
    prompts = prompts_of(folders, like)
    model = network(prompts, sees_sizes="XL" in said)
    with pytest.raises(ConfigError, match=rf"^text\.towers: {said}") as error:
        write_pipeline(
            tmp_path / "out",
            model=model,
            objective=ObjectiveConfig(),
            autoencoder=autoencoder(),
            mean=MEAN,
            std=STD,
            prompts=prompts,
            card="",
        )
    assert "\n" not in error.value.message
    assert not (tmp_path / "out").exists()


def test_the_autoencoders_own_scale_stays_its_scaling_factor() -> None:
    vae = autoencoder("sd3")  # without quant_conv
    folded = fold_whitening(vae, torch.zeros(16), torch.full((16,), 1 / 0.25))
    assert folded.config.scaling_factor == pytest.approx(0.25)
    assert vae.config.shift_factor
    assert folded.config.shift_factor is None
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), vae.parameters(), strict=True))
