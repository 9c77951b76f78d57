"""How far a run is: what of it changes with its steps and is not in the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.train.examples import Counted
from pipeline.train.skipped_steps import SkippedSteps


@dataclass
class Progress:
    """All of a run's state but that of the engine. Randomness and data order are functions of it.

    Legend: C latent channels.
    """

    mean: Sequence[float]  # [C], latents are whitened by these to the last step
    std: Sequence[float]  # [C]
    step: int = 0  # optimizer steps done, skipped ones included
    order_origin: int = 0  # the step with which the samples' order began
    skips: list[list[int]] = field(default_factory=list)  # blocks of latents that no rank counts, as of the last start
    counted: Counted = field(default_factory=Counted)
    skipped: SkippedSteps = field(default_factory=SkippedSteps)

    def counters(self) -> dict[str, int]:
        """What of it a checkpoint holds as numbers, beside the step."""
        return {
            "skipped": self.skipped.total,
            "skipped_in_a_row": self.skipped.in_a_row,
            "order_origin": self.order_origin,
            "drawn": self.counted.drawn,
            "drawn_in_vain": self.counted.in_vain,
        }

    def go_on_from(self, counters: Mapping[str, int]) -> None:
        """Take over the numbers of a checkpoint; whether its order goes on is told apart."""
        self.step = counters["step"]
        self.skipped = SkippedSteps(counters["skipped"], counters.get("skipped_in_a_row", 0))
        self.counted = Counted(counters["drawn"], counters["drawn_in_vain"])
