"""`lathe sample`: prompts to pictures, from the EMA weights of a training run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import SampleConfig
from pipeline.data import images
from pipeline.errors import StorageError
from pipeline.generate import generate
from pipeline.train.trained_model import load_trained

SHEET = "sheet.png"


@dataclass(frozen=True)
class SampleSummary:
    """What was made, and where it lies."""

    pictures: int
    folder: Path
    step: int

    def __str__(self) -> str:
        return f"{self.pictures} pictures from step {self.step} in {self.folder}, together in {SHEET}"


def sample(config: SampleConfig, progress: Callable[[int, int], None] | None = None) -> SampleSummary:
    """Make one picture per prompt, and a contact sheet of all with their prompts.

    Args:
        config: run file.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError: no complete checkpoint, or the autoencoder is not the run's.
        StorageError: a place cannot be read or written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    trained = load_trained(config.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, pictures = generate(
        trained.model.to(device),
        trained.load_autoencoder(config.autoencoder).to(device),
        trained.mean,
        trained.std,
        trained.tokenizer,
        config.prompts,
        guidance=config.guidance,
        steps=config.steps,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=progress,
    )
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (prompt, picture) in enumerate(zip(config.prompts, pictures, strict=True)):
            (folder / f"{number:04d}-{_slug(prompt)}.png").write_bytes(images.png(picture))
        columns = min(8, len(pictures))
        (folder / SHEET).write_bytes(images.contact_sheet(pictures, columns, config.prompts))
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}", "choose another output folder") from error
    return SampleSummary(len(pictures), folder, trained.step)


def _slug(prompt: str) -> str:
    """A prompt as part of a file name: letters, digits and dashes, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
