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
        self._failed: set[int] = set()  # saves of this run
        self._damaged: set[int] = set()  # complete by their marker, and passed over

    def open(self, step: int, *, clear_later: bool = False) -> list[str]:
        """Look what is there, before the first save, and delete what killed runs did not finish.

        Complete ones that the run does not go on from, since they cannot be read or are later, do not count any more.
        They stay until this run has completed one of its own.

        Args:
            step: gone on from.
            clear_later: delete at once what is later: its course was left behind.

        Returns:
            names of the later ones that were deleted.
        """
        whole = {found.step for found in checkpoint.find(self._store, warn=False) if found.step <= step}
        files = [*(entry.name for entry in self._store.list("step-")), *self._store.leftovers()]
        names = {name for name in (file.partition("/")[0] for file in files) if checkpoint.is_name(name)}
        marked = {name for name in names if f"{name}/{checkpoint.COMPLETE}" in files}
        later = {name for name in marked if clear_later and checkpoint.step_of(name) > step}
        for name in sorted(names - marked | later):
            checkpoint.clear(self._store, name)
        self.steps = sorted(whole)
        self._damaged = set(map(checkpoint.step_of, marked - later)) - whole
        return sorted(later)

    def add(self, step: int, *, retire: bool = True) -> None:
        """A checkpoint was completed: delete what is not whole and, with `retire`, those that are too old now."""
        self._damaged.discard(step)
        self.steps = sorted({*self.steps, step})
        stay = self._rule(self.steps) if retire else self.steps
        for old in [found for found in self.steps if found not in stay]:
            checkpoint.clear(self._store, checkpoint.step_name(old))
            self.steps.remove(old)
        self._drop(self._failed)
        self._drop(self._damaged)

    def give_up(self, step: int) -> None:
        """A save of this step failed: delete what it left, now or, where the store fails at that too, later."""
        self._failed.add(step)
        self._drop(self._failed)

    def _drop(self, steps: set[int]) -> None:
        for step in sorted(steps):
            checkpoint.clear(self._store, checkpoint.step_name(step))
            steps.discard(step)
