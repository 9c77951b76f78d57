"""Other projects' programs: sbatch, scontrol, kubectl. Nothing is given to a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from pipeline.errors import SetupError

_SECONDS = 120
_PREFIX = re.compile(r"^(\w+: )?(error: |fatal: )?")


def found(program: str, remedy: str) -> str:
    """The path of a program. Raises SetupError, with the remedy, where it is not there."""
    path = shutil.which(program)
    if path is None:
        raise SetupError(f"{program} is not on the PATH", remedy)
    return path


def said_by(
    command: Sequence[str],
    *,
    stdin: str | None = None,
    folder: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str, str]:
    """Run a program to its end: exit code, standard output, standard error.

    Raises:
        SetupError: it cannot be started, or does not end.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except OSError as error:
        raise SetupError(f"{command[0]} cannot be started: {error.strerror}", "check the installation") from error
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{command[0]} has not answered within {_SECONDS} s", "try again later") from error
    return done.returncode, done.stdout, done.stderr


def complaint(stderr: str, code: int = 0) -> str:
    """What a program says is wrong, as one line without its own name: the last that it said, else how it ended."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if lines:
        return _PREFIX.sub("", lines[-1])
    return f"ended by signal {-code}, and has said nothing" if code < 0 else f"exit code {code}, and not a word"
