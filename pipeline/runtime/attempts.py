"""May a job that has ended start again? Asked by the script that a scheduler runs, decided by how and where it ended.

A start is worth it where the job was asked to stop, and where something was lost that another start may find again,
as long as starts bring it on. A mistake in the run file, the data or the set-up is there at the next start too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.console import printable, tell, without_logins
from pipeline.errors import ConfigError, DataError, LatheError, SetupError, StorageError
from pipeline.storage import open_store

START_AGAIN = 75
"""What `main` returns where the job is to be started again at once: `EX_TEMPFAIL` of sysexits.h."""
LONGEST_PAUSE = 5
"""`main` returns up to so much more where a pause is to come before: what is away may be back after it."""
RETRIES = 3
_THERE_AT_THE_NEXT_START = {
    ConfigError.exit_code: "the run file",
    DataError.exit_code: "the data",
    SetupError.exit_code: "the set-up",
}


@dataclass(frozen=True)
class Record:
    """What the last decision left to the next one.

    Args:
        job: the scheduler's name of it; another job begins to count anew.
        progress: the farthest that it had come; -1 = nowhere.
        fruitless: failed starts since then that brought it no further.
    """

    job: str = ""
    progress: int = -1
    fruitless: int = 0


@dataclass(frozen=True)
class End:
    """How a start ended.

    Args:
        job: as in `Record`.
        code: exit code.
        asked: whether it was asked to stop, and left in order.
        progress: a number that rises as the job gets on; -1 = nowhere yet, None = storage does not tell.
    """

    job: str
    code: int
    asked: bool
    progress: int | None


@dataclass(frozen=True)
class Decision:
    """Whether to start again, why, and what to remember of it.

    Args:
        again: whether.
        why: in words.
        record: for the next decision.
        pause: before that start: 0 = none, and from 1 to `LONGEST_PAUSE` each one longer than the one before.
    """

    again: bool
    why: str
    record: Record
    pause: int = 0


def decide(end: End, before: Record, retries: int = RETRIES) -> Decision:
    """Whether a job is started again. At most `retries` starts in a row after failures that brought it no further."""
    progress = before.progress if end.progress is None else end.progress
    if before.job != end.job:  # checkpoints may have been deleted in between
        before = Record(end.job, min(progress, before.progress))
    has_come_on = progress > before.progress
    record = Record(end.job, max(progress, before.progress), 0 if has_come_on else before.fruitless)
    if end.code == 0:
        return Decision(False, "it has finished", record)
    if end.code in _THERE_AT_THE_NEXT_START:
        where = _THERE_AT_THE_NEXT_START[end.code]
        return Decision(False, f"exit code {end.code}: {where} must be mended first", record)
    if end.asked:
        return Decision(True, "it was asked to stop", record)
    if has_come_on:
        return Decision(True, f"exit code {end.code}, and it has come on since the last start", record)
    record = replace(record, fruitless=before.fruitless + 1)
    if record.fruitless > retries:
        said = f"exit code {end.code}, and {record.fruitless} starts in a row have not brought it on"
        return Decision(False, said, record)
    said = f"exit code {end.code}, no progress: start {record.fruitless} of {retries} after that"
    return Decision(True, said, record, min(record.fruitless, LONGEST_PAUSE))


class Notes:
    """A record in a folder or on S3. One that is damaged or not there says nothing.

    Args:
        address: of the folder or prefix.
        name: of the file.
        spare: where the record is kept while this place is away.
    """

    def __init__(self, address: str, name: str, spare: Notes | None = None) -> None:
        self._store, self._name, self._spare = open_store(address), name, spare

    def read(self) -> Record:
        """The last record. Raises StorageError where no place can be read."""
        if self._spare is None:
            return self._parsed()
        kept = self._spare.read()
        if not kept.job:
            with suppress(StorageError):
                return self._parsed()
        return kept

    def write(self, record: Record) -> None:
        """Keep a record. Raises StorageError where no place takes it."""
        try:
            self._store.write(self._name, (json.dumps(asdict(record)) + "\n").encode())
        except StorageError:
            if self._spare is None:
                raise
            self._spare.write(record)
        else:
            if self._spare is not None:
                self._spare.forget()

    def forget(self) -> None:
        """Delete it. Raises StorageError."""
        self._store.delete([self._name])

    def _parsed(self) -> Record:
        if not self._store.exists(self._name):
            return Record()
        try:
            found = json.loads(self._store.read(self._name))
            return Record(str(found["job"]), int(found["progress"]), int(found["fruitless"]))
        except (ValueError, KeyError, TypeError):
            return Record()


Outcome = Callable[[str, list[str], Path], tuple[bool, int | None, Notes]]
"""Of a run file, overrides and `--record`: was the job asked to stop, its progress, and where its record is."""


def main(arguments: Sequence[str], outcome: Outcome) -> int:
    """Decide, say why, and remember it; see `_parse` for the arguments.

    Returns:
        `START_AGAIN` and the pause before it, or else the exit code that the start had.
    """
    given = _parse(arguments)
    try:
        if given.code in _THERE_AT_THE_NEXT_START:  # where nothing else can be relied on either
            decision = decide(End(given.job, given.code, asked=False, progress=None), Record())
        else:
            asked, progress, notes = outcome(given.config, given.overrides, given.record)
            end = End(given.job, given.code, asked or given.asked, progress)
            decision = decide(end, notes.read(), given.retries)
            notes.write(decision.record)
    except LatheError as error:
        tell(f"not started again, since that cannot be decided: {printable(without_logins(str(error)))}")
        return int(given.code)
    tell(f"{'starting again' if decision.again else 'not started again'}: {decision.why}")
    return START_AGAIN + decision.pause if decision.again else int(given.code)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Whether a job starts again. Exit code {START_AGAIN}: at once; {START_AGAIN + 1} to "
        f"{START_AGAIN + LONGEST_PAUSE}: after a pause, the longer the higher the code; any other: not at all."
    )
    parser.add_argument("--code", type=int, required=True, help="exit code of the start that has ended")
    parser.add_argument("--job", required=True, help="the scheduler's name of the job, the same for all of its starts")
    parser.add_argument("--record", type=Path, required=True, help="a file of the job's, seen by all of its starts")
    parser.add_argument("--retries", type=int, default=RETRIES, help="starts in a row that bring it no further")
    parser.add_argument("--asked", action="store_true", help="it was asked to stop, and left in order")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*")
    return parser.parse_args(arguments)
