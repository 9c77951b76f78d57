"""`lathe sample`: prompts to pictures, from averaged weights of a training run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.config import SampleConfig
from pipeline.data import images
from pipeline.generate import Sampled, generate
from pipeline.storage import open_store
from pipeline.train.trained_model import load_trained

SHEET = "sheet.png"
_PICTURE = re.compile(r"\d{4}-[a-z0-9-]+\.png")  # of an earlier call, maybe with more prompts
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class SampleSummary:
    """What was made, and where it lies."""

    pictures: int
    folder: str
    step: int
    how: Sampled

    def __str__(self) -> str:
        return f"{self.pictures} pictures from step {self.step} ({self.how}) in {self.folder}, together in {SHEET}"


def sample(config: SampleConfig, progress: Callable[[float, int], None] | None = None) -> SampleSummary:
    """Make one picture per prompt, and a contact sheet of all with their prompts.

    Args:
        config: run file.
        progress: called with (pictures done, pictures in all); done may be a fraction.

    Raises:
        DataError: no complete checkpoint, or the autoencoder is not the run's.
        StorageError: a place cannot be read or written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trained = load_trained(config.run, config.weights, config.towers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, pictures = generate(
        trained.model.to(device),
        trained.load_autoencoder(config.autoencoder).to(device),
        trained.mean,
        trained.std,
        trained.prompts,
        config.prompts,
        objective=trained.objective,
        sampling=config,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=progress,
    )
    store = open_store(config.output)
    store.delete([entry.name for entry in store.list() if _PICTURE.fullmatch(entry.name)])
    for number, (prompt, picture) in enumerate(zip(config.prompts, pictures, strict=True)):
        store.write(f"{number:04d}-{_slug(prompt)}.png", images.png(picture))
    store.write(SHEET, images.contact_sheet(pictures, SHEET_COLUMNS, config.prompts))
    return SampleSummary(len(pictures), store.url, trained.step, Sampled.by(config, trained.weights))


def _slug(prompt: str) -> str:
    """A prompt as part of a file name: letters, digits and dashes, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
