"""Which samples are wanted: by caption, by size, by a condition on KEY.json. Reasons begin with `manifest.FILTERED`."""

from __future__ import annotations

from pipeline.config import FiltersConfig
from pipeline.data.condition import Condition
from pipeline.data.manifest import FILTERED
from pipeline.data.samples import ImageSample

CAPTION = FILTERED + "caption"
WHERE = FILTERED + "where"
MIN_SIDE = FILTERED + "min_side"
ASPECT = FILTERED + "aspect"
UPSCALE = FILTERED + "upscale"  # it would have to grow more than `max_upscale` for its bucket
REASONS = (CAPTION, WHERE, MIN_SIDE, ASPECT, UPSCALE)


class Filters:
    """The filters of a run file.

    Raises:
        ConfigError: `where` is no condition.
    """

    def __init__(self, config: FiltersConfig) -> None:
        self._config = config
        self._where = Condition(config.where) if config.where.strip() else None

    def captions(self, sample: ImageSample) -> tuple[str, ...]:
        """Those of the sample's captions whose length, in characters, is within the limits."""
        shortest, longest = self._config.min_caption_chars, self._config.max_caption_chars
        return tuple(c for c in sample.captions if shortest <= len(c) and (longest is None or len(c) <= longest))

    def of_sample(self, sample: ImageSample) -> str | None:
        """Why the sample is not wanted, its picture unseen: `filtered_caption`, `filtered_where`, or None."""
        if not self.captions(sample):
            return CAPTION
        return None if self._where is None or self._where.holds(sample.metadata) else WHERE

    def of_size(self, height: int, width: int) -> str | None:
        """Why a picture of this size is not wanted: `filtered_min_side`, `filtered_aspect`, or None."""
        short, long = sorted((height, width))
        if self._config.min_side is not None and short < self._config.min_side:
            return MIN_SIDE
        if self._config.max_aspect is not None and long > self._config.max_aspect * short:
            return ASPECT
        return None
