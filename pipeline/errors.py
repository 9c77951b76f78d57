"""The exceptions a user may meet: one line that says what is wrong, one that says what to do about it."""

from __future__ import annotations


class LatheError(Exception):
    """A problem that the user can mend. The command line prints message and remedy, and no traceback.

    Args:
        message: one line, naming the field, file or address concerned.
        remedy: one line, what to do next.
    """

    exit_code = 1
    leaves_at_once = False
    """Of one rank alone: collectives may be under way with others, for which an ordinary end of a process waits."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class ConfigError(LatheError):
    """A run file or a command-line override that cannot be used."""

    exit_code = 2


class StorageError(LatheError):
    """A path, bucket or object that cannot be read or written."""

    exit_code = 3


class DataError(LatheError):
    """Shards, manifests or checkpoints whose content cannot be used."""

    exit_code = 4


class SetupError(LatheError):
    """The machine, its packages or the launch do not fit what was asked for."""

    exit_code = 5
