"""`lathe evaluate`: do pictures follow their prompts, what does the autoencoder lose, what of captions never seen?"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig
from pipeline.data import images
from pipeline.data.manifest import Fingerprint, Manifest, load_manifest
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.data.split_arrays import SplitArrays, read_split
from pipeline.errors import DataError
from pipeline.evaluate import scores
from pipeline.generate import Sampled, generate
from pipeline.models.autoencoder import AutoencoderKL, decode
from pipeline.storage import find_shards, open_store, read_file
from pipeline.train.trained_model import TrainedModel, load_trained

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class PromptScore:
    """One training caption as a prompt; rank 1 = its own training picture is the nearest of all."""

    key: str
    caption: str
    rank: int


@dataclass(frozen=True)
class HoldoutScore:
    """One held-out picture: what the autoencoder loses of it, and how near its caption alone comes to it."""

    key: str
    caption: str
    psnr_db: float
    psnr_nonwhite_db: float
    colour_delta_e: float  # CIELAB distance of mean colours, 0 = equal
    shape_iou: float  # overlap of the non-white areas, 0 to 1


@dataclass(frozen=True)
class Evaluation:
    """Every score of a run; pictures lie beside it as uint8 arrays [N, H, W, 3]."""

    step: int
    how: Sampled
    prompt_retrieval_top1: float
    prompt_retrieval_top5: float
    prompt_retrieval_candidates: int
    reconstruction_psnr_db: float | None  # None: nothing was held out
    reconstruction_psnr_nonwhite_db: float | None
    prompts: tuple[PromptScore, ...]
    holdout: tuple[HoldoutScore, ...]

    def __str__(self) -> str:
        top1, top5, candidates = (
            self.prompt_retrieval_top1,
            self.prompt_retrieval_top5,
            self.prompt_retrieval_candidates,
        )
        text = f"step {self.step} ({self.how}), {len(self.prompts)} prompts: {top1:.1%} gave their own picture"
        text += f" out of {candidates}, {top5:.1%} had it among the nearest 5"
        if self.reconstruction_psnr_db is not None:
            text += f"; held-out reconstruction {self.reconstruction_psnr_db:.2f} dB PSNR"
        return text


def evaluate(config: EvaluateConfig, progress: Callable[[float, int], None] | None = None) -> Evaluation:
    """Score a run, and write `evaluation.json` and the pictures as `.npy` arrays to the output folder.

    Raises:
        DataError: no complete checkpoint, another autoencoder or other latents than the run's, or no training sample.
        StorageError: a place cannot be read or written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trained = load_trained(config.run, config.weights, config.towers)
    _check_data(config, trained.manifest, load_manifest(config.manifest))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = trained.load_autoencoder(config.autoencoder).to(device)
    train = read_split(config.manifest, "train")
    holdout = read_split(config.manifest, "holdout", limit=config.holdout_pictures)
    if not train.keys:
        raise DataError(f"{config.manifest} has no training sample", "encode pictures first")
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(train.keys))[: config.prompts])
    captions = [train.captions[i] for i in drawn] + holdout.captions
    latents, pictures = generate(
        trained.model.to(device),
        autoencoder,
        trained.mean,
        trained.std,
        trained.prompts,
        captions,
        objective=trained.objective,
        sampling=config,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=progress,
    )
    originals = _originals(
        config.shards, trained.manifest.fingerprint, {*(train.keys[i] for i in drawn), *holdout.keys}
    )
    ranks = _ranks(latents[: len(drawn)].numpy(), train, drawn, trained)
    placed = zip(drawn, ranks.tolist(), strict=True)
    prompts = tuple(PromptScore(train.keys[i], train.captions[i], rank) for i, rank in placed)
    arrays = {
        "prompts_generated": pictures[: len(drawn)],
        "prompts_training": _stack([originals[train.keys[i]] for i in drawn], pictures),
        "holdout_generated": pictures[len(drawn) :],
        "holdout_original": _stack([originals[key] for key in holdout.keys], pictures),
        "holdout_reconstruction": _reconstructions(holdout, autoencoder, config.batch_size, pictures),
    }
    rows = _holdout_scores(holdout, arrays)
    result = Evaluation(
        step=trained.step,
        how=Sampled.by(config, trained.weights),
        prompt_retrieval_top1=scores.share_within(ranks, 1),
        prompt_retrieval_top5=scores.share_within(ranks, 5),
        prompt_retrieval_candidates=len(train.keys),
        reconstruction_psnr_db=float(np.mean([r.psnr_db for r in rows])) if rows else None,
        reconstruction_psnr_nonwhite_db=float(np.nanmean([r.psnr_nonwhite_db for r in rows])) if rows else None,
        prompts=prompts,
        holdout=rows,
    )
    _write(config.output, result, arrays)
    return result


def read_evaluation(folder: Path) -> tuple[Evaluation, dict[str, Pixels]]:
    """What `evaluate` wrote. Raises DataError when there is none, or another format."""
    try:
        tree: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        prompts = tuple(PromptScore(**row) for row in tree.pop("prompts"))
        holdout = tuple(HoldoutScore(**row) for row in tree.pop("holdout"))
        how = Sampled(**tree.pop("how"))
        result = Evaluation(**tree, how=how, prompts=prompts, holdout=holdout)
        arrays = {file.stem: np.load(file, allow_pickle=False) for file in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} holds no evaluation that can be read", "run `lathe evaluate` again") from error
    return result, arrays


def _check_data(config: EvaluateConfig, trained: Manifest, given: Manifest) -> None:
    """Raises DataError where the run was trained on other latents."""
    if fields := trained.fingerprint.difference(given.fingerprint):
        raise DataError(
            f"{config.manifest}: the run was trained on latents that differ in {', '.join(fields)}",
            "give the manifest that it was trained on",
        )


def _ranks(
    queries: NDArray[np.float32], train: SplitArrays, own: NDArray[np.int64], trained: TrainedModel
) -> NDArray[np.int64]:
    """Place of each query's own training picture among all, by L2 distance in whitened latent space; 1 = nearest."""
    channels = trained.manifest.latent_channels
    mean, std = (t.numpy()[None, :, None, None] for t in (trained.mean, trained.std))
    targets = (train.moments[:, :channels].astype(np.float32) - mean) / std
    return scores.retrieval_ranks(queries.reshape(len(queries), -1), targets.reshape(len(targets), -1), own)


def _originals(shards: str, encoded: Fingerprint, wanted: Collection[str]) -> Mapping[str, Pixels]:
    """Pictures by key, as they were encoded. Raises DataError when the image shards lack one."""
    found: dict[str, Pixels] = {}
    for shard in find_shards(shards):
        for sample in read_image_shard(io.BytesIO(read_file(shard)), encoded.caption_field):
            if isinstance(sample, ImageSample) and sample.key in wanted:
                pixels = images.decode(sample.image_bytes, encoded.background)
                found[sample.key] = images.cover(pixels, (encoded.resolution,) * 2)
        if len(found) == len(wanted):
            return found
    missing = sorted(set(wanted) - set(found))
    raise DataError(f"{shards} lacks picture {missing[0]} of the manifest", "give the shards that were encoded")


@torch.no_grad()
def _reconstructions(holdout: SplitArrays, autoencoder: AutoencoderKL, batch: int, like: Pixels) -> Pixels:
    """The held-out pictures as the autoencoder gives them back from the mean of their stored posterior."""
    means = torch.from_numpy(holdout.moments[:, : holdout.moments.shape[1] // 2].astype(np.float32))
    means = means.to(autoencoder.device)
    return _stack(
        [image for part in torch.split(means, batch) for image in images.to_uint8(decode(autoencoder, part))], like
    )


def _holdout_scores(holdout: SplitArrays, arrays: Mapping[str, Pixels]) -> tuple[HoldoutScore, ...]:
    original, restored, generated = (arrays[f"holdout_{n}"] for n in ("original", "reconstruction", "generated"))
    inked = scores.non_white(original)
    columns = (
        scores.psnr(original, restored),
        scores.psnr_where(original, restored, inked),
        scores.colour_score(generated, original),
        scores.shape_score(generated, original),
    )
    rows = zip(holdout.keys, holdout.captions, *(column.tolist() for column in columns), strict=True)
    return tuple(HoldoutScore(*row) for row in rows)


def _stack(pictures: Sequence[Pixels], like: Pixels) -> Pixels:
    return np.stack(pictures) if len(pictures) else np.empty((0, *like.shape[1:]), np.uint8)


def _write(output: str, result: Evaluation, arrays: Mapping[str, Pixels]) -> None:
    store = open_store(output)
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array)
        store.write(f"{name}.npy", stream.getvalue())
    store.write("evaluation.json", json.dumps(asdict(result), indent=1).encode())
