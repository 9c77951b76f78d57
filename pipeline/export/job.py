"""A training run as a folder that diffusers opens as a Stable Diffusion pipeline, with no code of ours behind it.

Everything that Lathe does around the UNet is folded into stock parts, without loss: text towers become CLIP text
models, the scale of latents becomes part of the autoencoder, the objective is a scheduler's config.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers.utils import logging as transformers_logging

from pipeline.config import ExportConfig, ObjectiveConfig
from pipeline.errors import ConfigError
from pipeline.export.autoencoder import fold_whitening
from pipeline.export.scheduler import scheduler_of
from pipeline.export.text import text_parts
from pipeline.model_card import model_card, training_pictures
from pipeline.models.autoencoder import downscale
from pipeline.models.conditioning import FrozenTowers, TokenIds
from pipeline.models.unet import TextToImage
from pipeline.storage import Store, local_path, open_store
from pipeline.train.trained_model import load_trained

_INDEX = "model_index.json"
_ORIGIN = "lathe.json"


def export(config: ExportConfig) -> str:
    """Write averaged weights of a training run as a pipeline's folder; returns a line that says where it is.

    Raises:
        DataError: no checkpoint, another autoencoder than the training's, or one that cannot be exported.
        ConfigError: the run's text towers are missing, are not its own, or no stock pipeline reads them so; or the
            output holds anything but an earlier export of this run.
        StorageError: run, autoencoder or output cannot be read or written.
    """
    store = open_store(config.output)
    _check_output(store, config.run)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers loads DeepSpeed to save, which would wonder aloud
    trained = load_trained(config.run, config.weights, config.towers)
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
        padding=trained.manifest.fingerprint.text_padding,
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
            prompts=trained.prompts,
            card=card,
        )
        store.write(_ORIGIN, json.dumps(_origin(config.run)).encode())
        upload_folder(folder, store)
    return f"{config.output} opens with diffusers: DiffusionPipeline.from_pretrained(...)"


def _origin(run: str) -> dict[str, str]:
    return {"run": run if "://" in run else str(local_path(run).absolute())}


def _check_output(store: Store, run: str) -> None:
    """What others have put into an output stays theirs."""
    known = None
    if store.exists(_ORIGIN):
        with suppress(ValueError):  # it is somebody else's
            known = json.loads(store.read(_ORIGIN))
    elif not store.list():
        return
    if known != _origin(run):
        raise ConfigError(f"{store.url} holds files, and no export of {run}", "choose another output, or delete it")


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
    prompts: TokenIds | FrozenTowers,
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
        prompts: what the model is shown of prompts.
        card: text of README.md.

    Raises:
        DataError: the autoencoder has no 1x1 convolutions to fold the whitening into.
        ConfigError: no stock pipeline reads text towers so.
    """
    vae = fold_whitening(autoencoder, mean, std)
    vae.register_to_config(sample_size=model.unet.config.sample_size * downscale(vae))
    text = text_parts(model, prompts)
    own = (
        {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
        if text.is_xl
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    kind = StableDiffusionXLPipeline if text.is_xl else StableDiffusionPipeline
    pipeline = kind(
        vae=vae, unet=model.unet, scheduler=scheduler_of(objective), **text.encoders, **text.tokenizers, **own
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    with _no_progress_bars():
        pipeline.save_pretrained(folder, safe_serialization=True)
    text.rewrite_for_older_transformers(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
