"""A training run as a folder that diffusers opens as a StableDiffusionPipeline, with no code of ours behind it.

Everything that Lathe does around the UNet is folded into stock parts, without loss: the text tower becomes a
CLIPTextModel, whitening of latents becomes part of the autoencoder's 1x1 convolutions, the objective
is a scheduler's config.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from pipeline.config import ExportConfig, ObjectiveConfig
from pipeline.diffusion.objective import EPSILON_LOG_SNR, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN
from pipeline.diffusion.path import LINEAR_BETAS, SCALED_LINEAR_BETAS, TABLE_ROWS
from pipeline.errors import DataError
from pipeline.model_card import model_card, training_pictures
from pipeline.models.autoencoder import downscale
from pipeline.models.text import PAD, TextTower, Tokenizer
from pipeline.models.unet import TextToImage
from pipeline.storage import Store, open_store
from pipeline.train.trained_model import load_trained

_INDEX = "model_index.json"
_BLOCK = {  # open_clip's names within a block -> transformers'
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BETAS: dict[str, dict[str, str | float]] = {  # our schedules in diffusers' words
    "linear": {"beta_schedule": "linear", "beta_start": LINEAR_BETAS[0], "beta_end": LINEAR_BETAS[1]},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": SCALED_LINEAR_BETAS[0],
        "beta_end": SCALED_LINEAR_BETAS[1],
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
_PREDICTION = {"velocity": "flow_prediction", "epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def export(config: ExportConfig) -> str:
    """Write averaged weights of a training run as a pipeline's folder; returns a line that says where it is.

    Raises:
        DataError: no checkpoint, another autoencoder than the training's, or one that cannot be exported.
        StorageError: run, autoencoder or output cannot be read or written.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers loads DeepSpeed to save, which would wonder aloud
    trained = load_trained(config.run, config.weights)
    autoencoder = trained.load_autoencoder(config.autoencoder)
    manifests = trained.manifests
    pictures = training_pictures([manifest.samples("train") for manifest in manifests], trained.config.sources)
    card = model_card(
        resolution=trained.manifest.fingerprint.resolution,
        context_length=trained.manifest.context_length,
        objective=trained.config.objective,
        guidance=config.guidance,
        steps=25,
        attributions=[manifest.attribution for manifest in manifests],
        trained_on=f"{trained.step} steps of {trained.config.global_batch} on {pictures}",
    )
    with tempfile.TemporaryDirectory(prefix="lathe-export-") as temporary:
        folder = Path(temporary) / "pipeline"
        write_pipeline(
            folder,
            model=trained.model,
            objective=trained.config.objective,
            autoencoder=autoencoder,
            mean=trained.mean,
            std=trained.std,
            tokenizer=trained.tokenizer,
            card=card,
        )
        upload_folder(folder, open_store(config.output))
    return f"{config.output} opens with diffusers: DiffusionPipeline.from_pretrained(...)"


def upload_folder(folder: Path, store: Store) -> None:
    """Copy a pipeline's files into the store, its index last: without it, diffusers does not take the folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (name == _INDEX, name)):
        store.upload(folder / name, name)


def write_pipeline(
    folder: Path,
    *,
    model: TextToImage,
    objective: ObjectiveConfig,
    autoencoder: AutoencoderKL,
    mean: Tensor,
    std: Tensor,
    tokenizer: Tokenizer,
    card: str,
) -> None:
    """Write the pipeline's folder; all weights as safetensors.

    Args:
        folder: where to; made if it is not there.
        model: the trained network, with the weights to export.
        objective: what it was trained with.
        autoencoder: the one that the latents came from; not changed.
        mean: of the raw latents by channel [C].
        std: of the raw latents by channel [C].
        tokenizer: the one the model was trained with.
        card: text of README.md.

    Raises:
        DataError: the autoencoder has no 1x1 convolutions to fold the whitening into.
    """
    vae = fold_whitening(autoencoder, mean, std)
    vae.register_to_config(sample_size=model.unet.config.sample_size * downscale(vae))
    text_encoder = clip_text_model(model.text)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(tokenizer),
        unet=model.unet,
        scheduler=scheduler_of(objective),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    with _no_progress_bars():
        pipeline.save_pretrained(folder, safe_serialization=True)
    _rewrite_for_older_transformers(folder, text_encoder, tokenizer)


def fold_whitening(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """A copy that encodes to whitened latents, (z - mean) / std, and decodes from them; its scaling_factor is 1.

    Both maps are affine by channel, as are `quant_conv` and `post_quant_conv`: the composition is exact.

    Args:
        autoencoder: with raw latents.
        mean: [C].
        std: [C].

    Raises:
        DataError: the autoencoder was built without `quant_conv` or `post_quant_conv`.
    """
    if autoencoder.quant_conv is None or autoencoder.post_quant_conv is None:
        raise DataError(
            "the autoencoder has no quant_conv and post_quant_conv, so a stock pipeline cannot undo the whitening",
            "use an autoencoder with use_quant_conv and use_post_quant_conv (`lathe train-vae` makes such)",
        )
    folded = copy.deepcopy(autoencoder).float().cpu().eval()
    folded.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    shift, scale = mean.double().cpu(), std.double().cpu()
    encoder, decoder = folded.quant_conv, folded.post_quant_conv
    # mean' = (mean - shift) / scale and logvar' = logvar - 2 log(scale); z = scale z' + shift
    factor = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([-shift / scale, -2 * scale.log()])
    with torch.no_grad():
        weight, bias = decoder.weight.double(), decoder.bias.double()
        decoder.bias.copy_(bias + weight.flatten(1) @ shift)
        decoder.weight.copy_(weight * scale.view(1, -1, 1, 1))
        encoder.bias.copy_(encoder.bias.double() * factor + offset)
        encoder.weight.copy_(encoder.weight.double() * factor.view(-1, 1, 1, 1))
    return folded


def clip_text_model(tower: TextTower) -> CLIPTextModel:
    """The text tower as transformers' CLIPTextModel, whose last hidden state is the tower's output."""
    inner = tower.transformer
    mlp = inner.transformer.resblocks[0].mlp
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=inner.vocab_size,
            hidden_size=inner.width,
            intermediate_size=mlp.c_fc.out_features,
            projection_dim=inner.width,
            num_hidden_layers=len(inner.transformer.resblocks),
            num_attention_heads=inner.heads,
            max_position_embeddings=inner.context_length,
            hidden_act="gelu",
            layer_norm_eps=inner.ln_final.eps,
            pad_token_id=PAD,
            bos_token_id=inner.vocab_size - 2,
            eos_token_id=inner.vocab_size - 1,
        )
    )
    weights = {
        "embeddings.token_embedding.weight": inner.token_embedding.weight,
        "embeddings.position_embedding.weight": inner.positional_embedding,
        "final_layer_norm.weight": inner.ln_final.weight,
        "final_layer_norm.bias": inner.ln_final.bias,
    }
    for number, block in enumerate(inner.transformer.resblocks):
        here = f"encoder.layers.{number}"
        for part in ("weight", "bias"):
            thirds = getattr(block.attn, f"in_proj_{part}").chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                weights[f"{here}.self_attn.{letter}_proj.{part}"] = third
            for ours, theirs in _BLOCK.items():
                weights[f"{here}.{theirs}.{part}"] = getattr(block.get_submodule(ours), part)
    clip.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in weights.items()}, strict=True)
    return clip.eval()


def clip_tokenizer(tokenizer: Tokenizer) -> CLIPTokenizer:
    """The tokenizer as transformers' CLIPTokenizer, with the same ids for any prompt.

    The pad token is `!` because its id is 0, which open_clip pads with. `split_special_tokens` keeps a `!` that is
    written in a prompt from being read as padding.
    """
    return CLIPTokenizer(
        vocab=_vocabulary(tokenizer),
        merges=_merges(tokenizer),
        pad_token="!",  # noqa: S106
        model_max_length=tokenizer.context_length,
        split_special_tokens=True,
    )


def scheduler_of(objective: ObjectiveConfig) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """DPM-Solver++ on the path that was trained, for what the UNet predicts and the times it is given."""
    if objective.kind == "edm":
        return EDMDPMSolverMultistepScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA)
    if objective.kind == "rectified_flow":
        path: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        path = _BETAS[objective.schedule or "scaled_linear"] | {
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": objective.zero_terminal_snr,
        }
        if objective.prediction == "epsilon":
            path["lambda_min_clipped"] = EPSILON_LOG_SNR / 2
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TABLE_ROWS,
        prediction_type=_PREDICTION[objective.prediction],
        steps_offset=1,  # without effect here; StableDiffusionPipeline warns of any other value
        **path,
    )


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {_SPECIAL.get(token, token): number for token, number in tokenizer.codes.encoder.items()}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return sorted(tokenizer.codes.bpe_ranks, key=tokenizer.codes.bpe_ranks.__getitem__)


def _rewrite_for_older_transformers(folder: Path, text_encoder: CLIPTextModel, tokenizer: Tokenizer) -> None:
    """Weights and vocabulary under the names that transformers 4 knows; transformers 5 reads them as well."""
    weights = {f"text_model.{name}": tensor.contiguous() for name, tensor in text_encoder.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    vocabulary = json.dumps(_vocabulary(tokenizer), ensure_ascii=False)
    (folder / "tokenizer" / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in _merges(tokenizer))
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
