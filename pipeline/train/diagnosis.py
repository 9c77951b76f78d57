"""Why steps were not finite: the latents, the weights, or neither. Nothing is looked at before a step was skipped."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.not_finite import MENDED, SampleName, listed, not_finite
from pipeline.errors import DataError, LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine, Outcome
from pipeline.runtime.process import Process
from pipeline.train.skipped_steps import LIMIT

_BEFORE = "; the last checkpoint is from before"
_NAMED = 3  # of the state that is not finite, in a message
_TOLD = 3  # skipped steps of which a rank tells that its latents are to blame
_log = logging.getLogger(__name__)


class Suspects:
    """What could be to blame for the last skipped steps, on this rank.

    Args:
        config: the run file.
        datasets: the latents.
        ranks: this rank among the others.
        engine: that trains.
        step: steps done before the first one.
        is_saved: whether there is a checkpoint, the same on all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: DataSets,
        ranks: Process,
        engine: Engine,
        *,
        step: int,
        is_saved: Callable[[], bool],
    ) -> None:
        self._config, self._datasets, self._ranks, self._engine = config, datasets, ranks, engine
        self._is_saved = is_saved
        self._known = step  # steps whose outcome was told
        self._recent: deque[Batch] = deque(maxlen=3)  # an outcome may come a step late
        self._loss = torch.zeros(())
        self._row: dict[
            int, list[SampleName]
        ] = {}  # steps since the last applied one, and what was broken of each here
        self._told = 0

    def remember(self, batch: Batch, loss: Tensor) -> None:
        """A step that was made; its loss stays on the device."""
        self._recent.append(batch)
        self._loss = loss

    def look(self, outcomes: Iterable[Outcome]) -> None:
        """Look at the batches of the steps that were skipped; all outcomes must pass here, oldest first."""
        for outcome in outcomes:
            step, self._known = self._known, self._known + 1
            if outcome is Outcome.APPLIED:
                self._row.clear()
            elif outcome is Outcome.NOT_FINITE:
                batches = [batch for batch in self._recent if batch.step == step]
                found = [name for batch in batches for name in not_finite(batch, self._datasets)]
                self._row[step] = found
                if found and self._told < _TOLD:
                    self._told += 1
                    _log.warning("step %d was skipped: not finite are the latents of %s", step + 1, listed(found))

    def explain(self, step: int) -> NoReturn:
        """Raise, on all ranks, what made the last `LIMIT` steps fail. A collective.

        Raises:
            DataError: latents are not finite: on the ranks that had them.
            LatheError: weights or optimizer are not; or loss and gradients alone. On other ranks, that these failed.
        """
        what = f"loss or gradient was not finite in {LIMIT} steps in a row, by step {step}"
        broken, here = self._broken_state(), list(self._row.values())[-LIMIT:]
        of_all = self._ranks.sum(torch.tensor([len(broken), *map(len, here)]))
        by_state, by_data = bool(of_all[0] > 0), 2 * int((of_all[1:] > 0).sum()) > len(here)
        if by_state:
            self._ranks.agree(self._state_problem(what, broken) if broken else None)
        if by_data:
            samples = [name for found in here for name in found]
            self._ranks.agree(self._data_problem(what, samples) if samples else None)
        which = "the gradient, not the loss," if math.isfinite(float(self._loss)) else "the loss itself"
        raise LatheError(f"{what}: {which} overflowed; latents and weights are finite", self._remedy())

    def _broken_state(self) -> list[str]:
        """Names of what is not finite of this rank's weights, moments and averages."""
        return [
            fragment.parameter if key == state.WEIGHT else f"{key} of {fragment.parameter}"
            for fragment in state.fragments(self._engine)
            for key, tensor in fragment.tensors.items()
            if not bool(tensor.isfinite().all())
        ]

    def _remedy(self) -> str:
        again, before = ("resume", _BEFORE) if self._is_saved() else ("begin anew", "")
        if self._config.engine.precision == "float16":
            return f"{again} with engine.precision=bfloat16 or a smaller optimizer.learning_rate{before}"
        clip = "" if self._config.optimizer.gradient_clip else ", and with optimizer.gradient_clip=1"
        return f"{again} with a smaller optimizer.learning_rate or a longer optimizer.warmup_steps{clip}{before}"

    def _data_problem(self, what: str, samples: list[SampleName]) -> DataError:
        return DataError(
            f"{what}: not finite are the latents of {listed(samples)}",
            f"`lathe verify {samples[0].dataset}` {MENDED}{_BEFORE if self._is_saved() else ''}",
        )

    def _state_problem(self, what: str, broken: list[str]) -> LatheError:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        back = "delete the newest checkpoints, whose weights are broken, to go on from one before,"
        return LatheError(
            f"{what}: weights or optimizer are not finite: {', '.join(broken[:_NAMED])}{more}",
            f"{back if self._is_saved() else 'begin anew'} with a smaller optimizer.learning_rate",
        )
