"""Counts over many receipts: what was used, what could not be, what nobody wanted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.data import filters, images, samples
from pipeline.data.manifest import FILTERED, Receipt
from pipeline.data.samples import SHARD_DAMAGED
from pipeline.encode.takedown.keys import REASON as REMOVED
from pipeline.errors import DataError

NON_FINITE_LATENT, NON_FINITE_TEXT = "non_finite_latent", "non_finite_text"
REASONS = (*samples.REASONS, *images.REASONS, NON_FINITE_LATENT, NON_FINITE_TEXT, *filters.REASONS, REMOVED)
"""Why samples are left out."""
_MIN_SEEN = 100
_HOPELESS = 0.5


@dataclass
class Tally:
    """Samples of the receipts that were added."""

    shards: int = 0
    samples: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of every sample that was left out

    def add(self, receipt: Receipt) -> None:
        """Count one receipt."""
        self.shards += 1
        self.samples += receipt.samples()
        self.reasons.update(reject.reason for reject in receipt.rejects)

    @property
    def rejects(self) -> Counter[str]:
        """Samples that could not be used, by reason."""
        return Counter({reason: count for reason, count in self.reasons.items() if not unwanted(reason)})

    @property
    def seen(self) -> int:
        """Samples of the image shards, used or not. Many are rejected before a filter could leave them out."""
        return self.samples + self.reasons.total()

    @property
    def unwanted(self) -> int:
        """Samples that the filters or a takedown left out."""
        return sum(count for reason, count in self.reasons.items() if unwanted(reason))

    @property
    def removed(self) -> int:
        """Samples that a takedown left out."""
        return self.reasons[REMOVED]


def unwanted(reason: str) -> bool:
    """Whether a sample was left out by the user's own wish, and is no sign of trouble."""
    return reason.startswith(FILTERED) or reason == REMOVED


def check_rejects(tally: Tally, limit: float) -> None:
    """Whether few enough samples were unusable, and few enough image shards damaged: of those, nobody knows the loss.

    Raises:
        DataError: either share is above `limit`; the message has the commonest reasons.
    """
    rejects, damaged = tally.rejects, tally.reasons[SHARD_DAMAGED]
    seen = tally.seen
    if rejects.total() > limit * seen:
        said = ", ".join(f"{reason}: {count}" for reason, count in rejects.most_common(3))
        raise DataError(
            f"{rejects.total()} of {seen} pictures were rejected ({said}), more than max_reject_rate={limit}",
            "look at the rejects in the receipts; mend the shards, or raise max_reject_rate: finished shards are kept",
        )
    if damaged > limit * tally.shards:
        raise DataError(
            f"{damaged} of {tally.shards} image shards are damaged, more than max_reject_rate={limit}",
            "fetch or write them anew (the receipts name them), or raise max_reject_rate: finished shards are kept",
        )


def check_rejects_so_far(tally: Tally, limit: float) -> None:
    """Whether there is a point in going on: of one worker's share, whose mistakes may be made up for by the others'.

    Raises:
        DataError: of the first samples more than half were unusable, as where a field's name is mistyped.
    """
    if tally.seen >= _MIN_SEEN and tally.rejects.total() > max(limit, _HOPELESS) * tally.seen:
        check_rejects(tally, limit)
