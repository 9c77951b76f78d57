"""The export against Lathe's own forward, in a process that has nothing of Lathe."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support import fingerprint, provenance

from pipeline.config import (
    AutoencoderModelConfig,
    DataSetConfig,
    ExportConfig,
    ObjectiveConfig,
    SamplingConfig,
    TextConfig,
    TrainConfig,
    UNetConfig,
)
from pipeline.data.manifest import BucketCount, Manifest, ShardEntry
from pipeline.diffusion.objective import objective_of
from pipeline.errors import ConfigError, DataError
from pipeline.export.autoencoder import fold_whitening
from pipeline.export.job import export, write_pipeline
from pipeline.export.scheduler import scheduler_of
from pipeline.export.text import clip_tokenizer
from pipeline.generate import generate
from pipeline.model_card import model_card, training_pictures
from pipeline.models import autoencoder, unet
from pipeline.models.autoencoder import AutoencoderKL
from pipeline.models.conditioning import TokenIds
from pipeline.models.text import TextTower, Tokenizer
from pipeline.models.unet import TextToImage
from pipeline.storage import open_store
from pipeline.train.trained_model import TrainedModel

LENGTH = 12
OBJECTIVE = ObjectiveConfig()
PROMPTS = [
    "a red apple",
    "Wow! It's 3 o'clock!!",
    "",
    "ΑΒΣ ÉCOLE 日本 👩‍🚒",
    "word " * 40,
    "! ! <|endoftext|> &amp; \u2019",
]
MEAN, STD = torch.tensor([1.3, -0.7, 0.2, 0.0]), torch.tensor([2.5, 0.4, 1.0, 0.9])

# Runs by itself, as a stranger would use the folder; argv: folder, inputs, outputs.
STRANGER = """
import sys, torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, inputs, outputs = sys.argv[1:]
given, prompts = load_file(inputs), PROMPTS
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe).__name__ == "StableDiffusionPipeline"
pipe.set_progress_bar_config(disable=True)
picture = pipe("a red apple!", num_inference_steps=3, guidance_scale=2.0).images[0]
assert picture.size == (16, 16), picture.size
pipe(["a", "b"], num_inference_steps=2)
variant = AutoPipelineForImage2Image.from_pretrained(folder)
variant.set_progress_bar_config(disable=True)
picture = variant("a", image=picture, strength=0.5, num_inference_steps=4, guidance_scale=2.0).images[0]
assert picture.size == (16, 16), picture.size
with torch.no_grad():
    ids = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    velocity = pipe.unet(given["noisy"], given["timestep"], pipe.text_encoder(ids)[0]).sample
    images = pipe.vae.decode(given["whitened"] / pipe.vae.config.scaling_factor).sample
    latents = pipe.vae.encode(given["images"]).latent_dist.mean * pipe.vae.config.scaling_factor
    sampled = pipe(
        prompts[:2], latents=given["noise"], num_inference_steps=60, guidance_scale=2.0, output_type="latent"
    ).images
assert not [name for name in sys.modules if name == "pipeline" or name.startswith("pipeline.")]
found = {"ids": ids, "velocity": velocity, "images": images, "latents": latents, "sampled": sampled}
save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)
"""


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    net = unet.build(UNetConfig(block_out_channels=(16, 32), attention_head_dim=2, norm_num_groups=8), 4, 4, 16)
    tower = TextTower(TextConfig(width=16, layers=2, heads=2, context_length=LENGTH))
    for parameter in tower.parameters():  # biases and norms start at 0 and 1, which would hide a mix-up
        parameter.data += 0.1 * torch.randn_like(parameter)
    return TextToImage(net, tower).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    config = AutoencoderModelConfig(latent_channels=4, block_out_channels=(8, 8, 16), norm_num_groups=4)
    return autoencoder.build(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(LENGTH)


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "noisy": torch.randn(len(PROMPTS), 4, 4, 4),
        "timestep": torch.linspace(0, 1000, len(PROMPTS)),
        "whitened": torch.randn(3, 4, 4, 4),
        "images": torch.rand(3, 3, 16, 16) * 2 - 1,
        "noise": torch.randn(2, 4, 4, 4),
    }


@pytest.fixture(scope="module")
def folder(
    model: TextToImage, vae: AutoencoderKL, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("export") / "pipeline"
    card = model_card(
        resolution=16,
        context_length=LENGTH,
        objective=OBJECTIVE,
        guidance=2.0,
        steps=25,
        attributions=["Ann Example, CC-BY 4.0"],
        trained_on="x",
    )
    parts = {"model": model, "autoencoder": vae, "mean": MEAN, "std": STD, "prompts": TokenIds(tokenizer)}
    write_pipeline(place, objective=OBJECTIVE, card=card, **parts)
    return place


@pytest.fixture(scope="module")
def stranger(folder: Path, given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """What the stock pipeline computed, and all it said on stderr."""
    save_file(given, folder.parent / "in.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", STRANGER.replace("PROMPTS", repr(PROMPTS)), folder, "in.safetensors", "out.safetensors"],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return load_file(folder.parent / "out.safetensors"), ran.stderr


@pytest.mark.alone
def test_stock_pipeline_makes_pictures_without_a_warning(stranger: tuple[dict[str, torch.Tensor], str]) -> None:
    lines = stranger[1].replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip() and not re.search(r"(it/s|s/it)]|\?it", line)]
    truncation = [line for line in said if "maximum sequence length" in line or "was truncated" in line]
    assert [line for line in said if line not in truncation] == []


@pytest.mark.alone
def test_ids_are_the_same(stranger: tuple[dict[str, torch.Tensor], str], tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(stranger[0]["ids"].numpy(), tokenizer(PROMPTS))


@pytest.mark.alone
def test_unet_gives_the_trainers_velocity(
    stranger: tuple[dict[str, torch.Tensor], str],
    model: TextToImage,
    tokenizer: Tokenizer,
    given: dict[str, torch.Tensor],
) -> None:
    tokens = torch.from_numpy(tokenizer(PROMPTS).astype(np.int64))
    with torch.no_grad():
        expected = model(given["noisy"], given["timestep"], tokens)
    torch.testing.assert_close(stranger[0]["velocity"], expected, atol=1e-5, rtol=0)


@pytest.mark.alone
def test_decoder_takes_whitened_latents(
    stranger: tuple[dict[str, torch.Tensor], str], vae: AutoencoderKL, given: dict[str, torch.Tensor]
) -> None:
    raw = given["whitened"] * STD.view(1, -1, 1, 1) + MEAN.view(1, -1, 1, 1)
    with torch.no_grad():
        expected = autoencoder.decode(vae, raw)
    torch.testing.assert_close(stranger[0]["images"], expected, atol=1e-4, rtol=0)


@pytest.mark.alone
def test_encoder_gives_whitened_latents(
    stranger: tuple[dict[str, torch.Tensor], str], vae: AutoencoderKL, given: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        raw = autoencoder.encode_moments(vae, given["images"])[:, :4]
    expected = (raw - MEAN.view(1, -1, 1, 1)) / STD.view(1, -1, 1, 1)
    torch.testing.assert_close(stranger[0]["latents"], expected, atol=1e-4, rtol=0)


@pytest.mark.alone
def test_stock_sampler_follows_the_same_flow(
    stranger: tuple[dict[str, torch.Tensor], str],
    model: TextToImage,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    given: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two solvers of one equation, with many steps and from the same noise, end at nearly the same latents."""
    monkeypatch.setattr("pipeline.generate.normal", lambda *_, **__: given["noise"])
    parts, sampling = (model, vae, MEAN, STD, TokenIds(tokenizer)), SamplingConfig(guidance=2.0, steps=60)
    objective = objective_of(OBJECTIVE)
    ours, _ = generate(*parts, PROMPTS[:2], objective=objective, sampling=sampling, seed=0, batch_size=2)
    moved = (ours - given["noise"]).norm()
    assert (stranger[0]["sampled"] - ours).norm() < 0.05 * moved


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "ddpm"},
        {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True},
        {"kind": "edm"},
    ],
    ids=str,
)
def test_stock_pipeline_of_other_objectives_agrees_with_our_sampler(
    folder: Path,
    model: TextToImage,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    given: dict[str, torch.Tensor],
    fields: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From one noise, with many steps: what a stock pipeline with the exported scheduler makes of the same network."""
    objective = ObjectiveConfig(**fields)
    scheduler_of(objective).save_pretrained(folder.parent / "scheduler")
    kind = type(scheduler_of(objective))
    scheduler = kind.from_pretrained(folder.parent / "scheduler")
    pipe = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    capfd.readouterr()
    how = {"num_inference_steps": 60, "guidance_scale": 2.0, "output_type": "latent"}
    theirs = pipe(PROMPTS[:2], latents=given["noise"], **how).images
    monkeypatch.setattr("pipeline.generate.normal", lambda *_, **__: given["noise"])
    parts, sampling = (model, vae, MEAN, STD, TokenIds(tokenizer)), SamplingConfig(guidance=2.0, steps=60)
    ours, _ = generate(*parts, PROMPTS[:2], objective=objective_of(objective), sampling=sampling, seed=0, batch_size=2)
    moved = (ours - objective_of(objective).path.prior_std * given["noise"]).norm()
    assert (theirs - ours).norm() < 0.05 * moved
    assert "warn" not in capfd.readouterr().err.lower()


def test_folded_posterior_has_the_whitened_variance(vae: AutoencoderKL, given: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        raw = vae.encode(given["images"]).latent_dist
        folded = fold_whitening(vae, MEAN, STD).encode(given["images"]).latent_dist
    torch.testing.assert_close(folded.std, raw.std / STD.view(1, -1, 1, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.long)])
def test_every_letter_gets_the_same_ids(tokenizer: Tokenizer, every: int) -> None:
    """Every assigned character, then random texts in many scripts, through both tokenizers.

    Of Chinese and Korean ones, which are many and alike, one in `every`.
    """
    stock = clip_tokenizer(tokenizer)
    letters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    alike = re.compile("[\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff]")
    letters = [c for number, c in enumerate(letters) if not alike.match(c) or number % every == 0]
    draw = random.Random(0)
    texts = [f"a{''.join(letters[i : i + 3])}B" for i in range(0, len(letters), 3)]
    texts += ["".join(draw.choices([*"aZ '!.&;,s\t", *draw.choices(letters, k=4)], k=12)) for _ in range(2000)]
    for first in range(0, len(texts), 5000):
        some = texts[first : first + 5000]
        ids = stock(some, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
        np.testing.assert_array_equal(np.array(ids), tokenizer(some))


def test_weights_are_safetensors_and_the_card_names_the_source(folder: Path) -> None:
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".safetensors", ".txt"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Ann Example, CC-BY" in card
    assert "guidance_scale=2" in card


def test_autoencoder_without_quant_conv_is_refused(model: TextToImage, tmp_path: Path, tokenizer: Tokenizer) -> None:
    bare = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), use_quant_conv=False)
    with pytest.raises(DataError, match="quant_conv"):
        write_pipeline(
            tmp_path / "x",
            model=model,
            objective=OBJECTIVE,
            autoencoder=bare,
            mean=MEAN,
            std=STD,
            prompts=TokenIds(tokenizer),
            card="",
        )
    assert not (tmp_path / "x").exists()


def manifest_of(weights: str, attribution: str, train: int) -> Manifest:
    about = provenance(
        fingerprint=fingerprint(autoencoder_weights=weights, resolution=16, context_length=LENGTH),
        autoencoder="the/right/one",
        latent_channels=4,
        downsampling_factor=4,
        attribution=attribution,
    )
    return Manifest(
        content_hash="",
        shards=(
            ShardEntry(
                name="0.tar",
                receipt="0",
                source="0",
                buckets=(BucketCount(bucket=(16, 16), train=train, holdout=3),),
                bytes=0,
                sha256="",
            ),
        ),
        mean=tuple(MEAN.tolist()),
        std=tuple(STD.tolist()),
        rejects={},
        environments=(),
        **vars(about),
    )


def trained(model: TextToImage, tokenizer: Tokenizer, *manifests: Manifest) -> TrainedModel:
    sources = tuple(DataSetConfig(manifest=str(number)) for number in range(len(manifests)))
    config = TrainConfig(datasets=sources, output="o")
    return TrainedModel(7, "main", config, manifests, MEAN, STD, model, TokenIds(tokenizer))


def test_export_writes_index_last_and_only_for_the_right_autoencoder(
    model: TextToImage, vae: AutoencoderKL, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder.save(vae, open_store(str(tmp_path / "vae")))
    config = ExportConfig(run="run", autoencoder=str(tmp_path / "vae"), output=str(tmp_path / "out"))
    # a checkpoint needs a training run with its engine: the demo's test goes that way
    monkeypatch.setattr(
        "pipeline.export.job.load_trained", lambda *_: trained(model, tokenizer, manifest_of("of another", "", 0))
    )
    with pytest.raises(DataError, match="the/right/one"):
        export(config)
    assert not (tmp_path / "out").exists()

    right = autoencoder.weights_hash(vae)
    both = manifest_of(right, "Ann Example, CC-BY", 1000), manifest_of(right, "Bob Example, CC-BY", 234)
    monkeypatch.setattr("pipeline.export.job.load_trained", lambda *_: trained(model, tokenizer, *both))
    assert str(tmp_path / "out") in export(config)
    files = sorted((tmp_path / "out").rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)
    assert files[-1].name == "model_index.json"
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "7 steps of 64 on 1,234 pictures of 2 data sets" in readme
    assert "Training pictures:\n\n- Ann Example, CC-BY\n- Bob Example, CC-BY\n" in readme

    export(config)  # as of a later checkpoint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for run, output in (("another", "out"), ("run", "mine")):
        with pytest.raises(ConfigError, match=f"{output} holds files, and no export of {run}"):
            export(config.model_copy(update={"run": run, "output": str(tmp_path / output)}))


@pytest.mark.parametrize(
    ("attributions", "said"),
    [
        (["A"], "Training pictures: A\n"),
        (["A", "A\n"], "Training pictures: A\n"),
        (["B", "A", "B"], "- B\n- A\n"),
        (["A\nC", "B"], "- A\n  C\n- B\n"),
        ([""], "Training pictures: not recorded. Ask whoever"),
        (["", ""], "Training pictures: not recorded. Ask whoever"),
        (["", "A", " "], "- A\n- 2 of 3 data sets: not recorded. Ask whoever"),
    ],
)
def test_the_card_names_each_source_once(attributions: list[str], said: str) -> None:
    about = {"resolution": 16, "context_length": LENGTH, "guidance": 2.0, "steps": 25, "trained_on": "x"}
    assert said in model_card(attributions=attributions, objective=OBJECTIVE, **about)


@pytest.mark.parametrize(
    ("fields", "tag", "said"),
    [
        ({}, "rectified-flow", 'knows `prediction_type="flow_prediction"`'),
        ({"prediction": "x0"}, "rectified-flow", 'knows `prediction_type="sample"`'),
        ({"kind": "ddpm", "prediction": "v"}, "ddpm", "predicts v on DDPM's scaled_linear schedule"),
        ({"kind": "edm"}, "edm", "preconditioned as EDM"),
    ],
)
def test_the_card_says_which_schedulers_fit(fields: dict, tag: str, said: str) -> None:
    about = {"resolution": 16, "context_length": LENGTH, "guidance": 2.0, "steps": 25, "trained_on": "x"}
    card = model_card(attributions=[""], objective=ObjectiveConfig(**fields), **about)
    assert f"tags: [lathe, stable-diffusion, {tag}]" in card
    assert said in card


@pytest.mark.parametrize(
    ("samples", "changes", "said"),
    [
        ([1000], [{}], "1,000 pictures"),
        ([1000], [{"share": 0.125}], "12.5% of 1,000 pictures"),
        ([1000], [{"keys": "k"}], "listed ones of 1,000 pictures"),
        ([1000, 50], [{}, {}], "1,050 pictures of 2 data sets"),
        (
            [1000, 50],
            [{}, {"share": 0.3, "keys": "k"}],
            "a part of 1,050 pictures of 2 data sets (all of 1,000, 30% of listed ones of 50)",
        ),
    ],
)
def test_the_card_says_how_many_pictures(samples: list[int], changes: list[dict], said: str) -> None:
    assert training_pictures(samples, [DataSetConfig(manifest="m", **change) for change in changes]) == said
