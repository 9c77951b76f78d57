"""A device that takes its time and none of the host's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data import images
from pipeline.data.manifest import Environment, Fingerprint, Tower
from pipeline.models.text import Tokenizer


class SimulatedDevice:
    """An encoder whose device takes a fixed time per picture, one batch after another, and none of the host's.

    Args:
        resolution: of the pictures, in pixels.
        seconds: per picture; 0 = the host is all that takes time.
    """

    channels, downsampling_factor, scaling_factor, shift_factor = 4, 8, 0.18215, 0.0
    environment: Environment = {"device": "simulated"}  # noqa: RUF012

    def __init__(self, resolution: int, seconds: float) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        side = resolution // self.downsampling_factor
        rng = np.random.default_rng(0)
        self._moments = rng.normal(size=(2 * self.channels, side, side)).astype(np.float16)
        self._tokenizer = Tokenizer(77)

    def fingerprint(self, resolution: int) -> Fingerprint:
        """Of no real encoder."""
        return Fingerprint(
            autoencoder_weights="simulated",
            autoencoder_config="simulated",
            precision="float32",
            tiling=False,
            normalisation=images.NORMALISATION,
            resize_filter=images.RESIZE_FILTER,
            crop_rule=images.CROP_RULE,
            resolution=resolution,
            buckets=((resolution, resolution),),
            max_upscale=2.0,
            flip=False,
            background=(255, 255, 255),
            filters="{}",
            text_mode="joint",
            text_padding="full",
            text_precision="float32",
            text_towers=(Tower(name="clip", tokenizer="simulated", context_length=77),),
            caption_field="caption",
            dtype="float16",
            holdout=0.0,
        )

    def empty(self) -> dict[str, npt.NDArray[Any]]:
        """Token ids of the empty prompt."""
        return {"tokens.clip": self._tokenizer.empty}

    def text(self, captions: Sequence[str]) -> list[dict[str, npt.NDArray[Any]]]:
        """Real token ids."""
        return [{"tokens.clip": row} for row in self._tokenizer(captions)]

    def start(self, pixels: images.Pixels, flip: bool) -> _Served:
        """Queue a batch; it is done when the ones before it and its own service time have passed."""
        del flip
        self._free_at = max(time.monotonic(), self._free_at) + len(pixels) * self._seconds
        return _Served(self._free_at, np.broadcast_to(self._moments, (len(pixels), *self._moments.shape)))


@dataclass(frozen=True)
class _Served:
    done_at: float
    moments: npt.NDArray[np.float16]

    def result(self) -> tuple[npt.NDArray[np.float16], None]:
        time.sleep(max(0.0, self.done_at - time.monotonic()))
        return self.moments, None
