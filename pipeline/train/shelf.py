"""Which checkpoints stay, and where those go that do not. Only rank 0 has a shelf."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.storage import Store
from pipeline.train import checkpoint

Rule = Callable[[Sequence[int]], set[int]]
"""Steps of complete checkpoints, in order -> those that stay."""


def newest_and_every(keep: int | None, every: int | None = None) -> Rule:
    """The newest `keep` (None = all); and of each stretch of `every` steps the first one, for good (None = of none)."""

    def staying(steps: Sequence[int]) -> set[int]:
        stay = set(steps[-keep:] if keep else steps)
        if every:
            first: dict[int, int] = {}
            for step in steps:
                first.setdefault(step // every, step)
            stay |= set(first.values())
        return stay

    return staying


class Shelf:
    """The checkpoints of a store, as the run that writes them knows them: nothing is listed while it saves.

    Args:
        store: where they lie.
        rule: which of them stay.
    """

    def __init__(self, store: Store, rule: Rule) -> None:
        self._store, self._rule = store, rule
        self.steps: list[int] = []
        """Of complete checkpoints, in order."""
        self._useless: set[int] = set()  # of damaged ones, and of saves that failed

    def open(self, step: int) -> list[str]:
        """Look what is there, before the first save; delete what killed runs did not finish, and what is later.

        Args:
            step: gone on from. The course of what is later was left behind.

        Returns:
            names of the complete checkpoints that were deleted.
        """
        whole = sorted(found.step for found in checkpoint.find(self._store, warn=False))
        files = [*(entry.name for entry in self._store.list("step-")), *self._store.leftovers()]
        names = {name for name in (file.partition("/")[0] for file in files) if checkpoint.is_name(name)}
        marked = {name for name in names if f"{name}/{checkpoint.COMPLETE}" in files}
        for name in names:
            if checkpoint.step_of(name) > step or name not in marked:
                checkpoint.clear(self._store, name)
        self.steps = [found for found in whole if found <= step]
        self._useless = {found for found in map(checkpoint.step_of, marked) if found <= step} - set(self.steps)
        return [checkpoint.step_name(found) for found in whole if found > step]

    def add(self, step: int) -> None:
        """A checkpoint was completed: delete those that are too old now, and what is not whole."""
        self._useless.discard(step)
        self.steps = sorted({*self.steps, step})
        stay = self._rule(self.steps)
        for old in [found for found in self.steps if found not in stay]:
            checkpoint.clear(self._store, checkpoint.step_name(old))
            self.steps.remove(old)
        self._sweep()

    def give_up(self, step: int) -> None:
        """A save of this step failed: delete what it left, now or, where the store fails at that too, later."""
        self._useless.add(step)
        self._sweep()

    def _sweep(self) -> None:
        for step in sorted(self._useless):
            checkpoint.clear(self._store, checkpoint.step_name(step))
            self._useless.discard(step)
