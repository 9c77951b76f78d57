"""One loader in a process of its own, which is asked for one epoch after another."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from threading import Timer
from types import TracebackType
from typing import Any

from pipeline.errors import SetupError
from pipeline.tether import start_tethered

ANSWER_SECONDS = 1800.0  # then it hangs


class Contestant:
    """A program that answers each line on its standard input with a line of JSON; it ends with this process.

    Args:
        name: how messages call it.
        command: the program and its arguments.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = start_tethered(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to one command.

        Raises:
            SetupError: the program ended, or does not answer; the message has its last words.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("both are pipes")
        too_long = Timer(ANSWER_SECONDS, self._process.kill)
        too_long.start()
        try:
            stdin.write(f"{command}\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            too_long.cancel()
        if not answer:
            self._process.wait()
            raise SetupError(
                f"the benchmark's {self.name} failed at `{command}`: {self._last_words()}",
                "see what it says; without the peers that need an environment of their own: --no-peers",
            )
        found: dict[str, Any] = json.loads(answer)
        return found

    def epoch(self, samples: int) -> dict[str, Any]:
        """One epoch's figures. Raises AssertionError where not every sample came."""
        answer = self.ask("epoch")
        if answer["samples"] != samples:
            raise AssertionError(f"{self.name} read {answer['samples']} samples, and there are {samples}")
        return {**answer, "samples_per_second": samples / answer["seconds"]}

    def close(self) -> None:
        """Have it end."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        return lines[-1][-400:] if lines else "it said nothing"
