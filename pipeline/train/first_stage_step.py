"""One step of the first stage after another: weights, their average, two optimizers, keyed randomness."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import FirstStageConfig
from pipeline.data.images import normalise, to_uint8
from pipeline.latents import LOG_VARIANCE_RANGE
from pipeline.models import autoencoder
from pipeline.models.autoencoder import AutoencoderKL
from pipeline.randomness import Purpose, normal, uniform
from pipeline.train.ema_profiles import constant_decay
from pipeline.train.learning_rate import learning_rate
from pipeline.train.muon import Muon
from pipeline.train.pictures import Pictures

# Where the result goes and how it is watched: changing these does not change the autoencoder.
_FREE = {"root", "output", "threads", "checkpoint", "metrics", "log_every"}
_EDGES = ("conv_in", "conv_out", "quant_conv")  # layers that Muon is not for
_VALIDATION_BATCH = 32


class Training:
    """Weights, their average, optimizers and counters: all that goes on from one step to the next.

    Args:
        config: the run file.
        pictures: those to train on.
    """

    def __init__(self, config: FirstStageConfig, pictures: Pictures) -> None:
        self.config = config
        self.pixels = pictures.train
        self.pictures_digest = pictures.digest
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _new_model(config, pictures.train).to(self.device).train()
        self.ema = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        named = dict(self.model.named_parameters())
        kernels = [name for name, w in named.items() if w.ndim > 1 and not any(edge in name for edge in _EDGES)]
        rest = [weight for name, weight in named.items() if name not in set(kernels)]
        chosen = config.optimizer
        self.muon = Muon(
            [named[name] for name in kernels], config.kernel_learning_rate, weight_decay=chosen.weight_decay
        )
        self.adamw = torch.optim.AdamW(
            rest, chosen.learning_rate, betas=chosen.betas, eps=chosen.epsilon, weight_decay=0.0
        )
        self.steps_done = 0
        self.seconds = 0.0
        self.summed = 0  # steps since the last logged one
        self.sums: dict[str, Tensor] = {}  # of their metrics
        self.last: dict[str, Tensor] = {}

    def step(self) -> None:
        """One optimizer step of both optimizers, then of the average."""
        started = time.monotonic()
        rate = learning_rate(self.steps_done, self.config.optimizer, self.config.steps)
        self.adamw.param_groups[0]["lr"] = rate
        share = rate / self.config.optimizer.learning_rate
        self.muon.param_groups[0]["lr"] = self.config.kernel_learning_rate * share
        values = self._losses(self._batch())
        values["loss"].backward()  # type: ignore[no-untyped-call]
        clip = self.config.optimizer.gradient_clip or math.inf
        values["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._average()
        self.last = {name: value.detach() for name, value in values.items()}
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in self.last.items()}
        self.summed += 1
        self.seconds += time.monotonic() - started

    def take_means(self) -> dict[str, float]:
        """Of the metrics since the last call, or since the first step; what follows is summed anew."""
        means = {name: float(value) / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the weights' shape, as `KIND:NAME`; what `restore` takes back."""
        found = {f"ema:{name}": average for name, average in self.ema.items()}
        for name, weight in self.model.named_parameters():
            found[f"weight:{name}"] = weight.detach()
            state = self.muon.state.get(weight) or self.adamw.state[weight]
            found |= {f"{key}:{name}": tensor for key, tensor in state.items() if key != "step"}
        return found

    def facts(self) -> dict[str, Any]:
        """The counters, for JSON."""
        return {
            "step": self.steps_done,
            "seconds": self.seconds,
            "summed": self.summed,
            "sums": {name: float(value) for name, value in self.sums.items()},
            "pictures": self.pictures_digest,
            "settings": settings(self.config),
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a checkpoint's tensors and facts."""
        self.steps_done, self.seconds = facts["step"], facts["seconds"]
        self.summed = facts.get("summed", 0)  # older ones do not say of how many steps their sums are
        kept = facts["sums"] if self.summed else {}
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in kept.items()}
        muon = {id(weight) for group in self.muon.param_groups for weight in group["params"]}
        for name, weight in self.model.named_parameters():
            here = {key: tensors[f"{key}:{name}"].to(self.device) for key in _state_keys(id(weight) in muon)}
            weight.copy_(here.pop("weight"))
            self.ema[name] = here.pop("ema")
            if id(weight) in muon:
                self.muon.state[weight] = here
            else:
                self.adamw.state[weight] = {"step": torch.tensor(float(self.steps_done)), **here}

    def _batch(self) -> Tensor:
        """Pixels of this step's pictures, some mirrored: float32 [B, 3, H, W] in [-1, 1]."""
        config, step = self.config, self.steps_done
        images = normalise(self.pixels[batch_indices(len(self.pixels), config.batch_size, config.seed, step)])
        if config.flip:
            mirrored = uniform(config.seed, Purpose.FLIP, step, torch.arange(len(images)), ()) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images.to(self.device)

    def _losses(self, images: Tensor) -> dict[str, Tensor]:
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            mean, log_variance = autoencoder.encode_moments(self.model, images).float().chunk(2, 1)
            log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
            places = torch.arange(len(images), device=self.device)
            noise = normal(config.seed, Purpose.POSTERIOR, self.steps_done, places, tuple(mean.shape[1:]))
            restored = autoencoder.decode(self.model, mean + (0.5 * log_variance).exp() * noise)
        difference = restored.float() - images
        squared = difference.square().mean()
        reconstruction = config.l1_weight * difference.abs().mean() + config.l2_weight * squared
        # Kingma & Welling 2014, appendix B, mean over latent elements
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return {
            "loss": reconstruction + config.kl_weight * kl,
            "reconstruction_loss": reconstruction,
            "kl_loss": kl,
            "psnr_db": -10.0 * (squared / 4.0).log10(),
        }

    @torch.no_grad()
    def _average(self) -> None:
        decay = constant_decay(self.steps_done, self.config.ema_decay)
        for name, weight in self.model.named_parameters():
            self.ema[name].lerp_(weight, 1.0 - decay)


def batch_indices(size: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """Which of `size` pictures are in batch `step`; epochs are shuffled and joined, so a batch may cross a border."""
    epochs, within = np.divmod(np.arange(step * batch, (step + 1) * batch), size)
    return np.array([_shuffled(size, seed, int(epoch))[place] for epoch, place in zip(epochs, within, strict=True)])


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = uniform(seed, Purpose.ORDER, epoch, torch.arange(size), ()).argsort(stable=True).numpy()
    return order


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, pixels: NDArray[np.uint8]) -> float:
    """Mean over pictures uint8 [N, H, W, 3] of their PSNR in dB after encoding to the posterior's mean and decoding."""
    found: list[float] = []
    for first in range(0, len(pixels), _VALIDATION_BATCH):
        originals = pixels[first : first + _VALIDATION_BATCH]
        means = autoencoder.encode_moments(model, normalise(originals).to(model.device)).chunk(2, 1)[0]
        restored = to_uint8(autoencoder.decode(model, means))
        errors = np.square(originals.astype(np.float64) - restored).mean((1, 2, 3))
        found += (20 * np.log10(255.0) - 10 * np.log10(np.maximum(errors, 1e-12))).tolist()
    return float(np.mean(found))


def settings(config: FirstStageConfig) -> dict[str, Any]:
    """What makes the autoencoder what it is: the run file without where it goes and how it is watched."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}


def _new_model(config: FirstStageConfig, pixels: NDArray[np.uint8]) -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = autoencoder.build(config.model)
    colour = torch.from_numpy(pixels.mean((0, 1, 2)) / 127.5 - 1.0)
    autoencoder.initialise(model, colour.float())
    return model


def _state_keys(muon: bool) -> tuple[str, ...]:
    return ("weight", "ema", "momentum_buffer") if muon else ("weight", "ema", "exp_avg", "exp_avg_sq")
