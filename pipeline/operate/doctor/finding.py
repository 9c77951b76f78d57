"""What a check finds, and how checks are made: each in its time, and none ends by a stack."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import LatheError

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found, on one rank or, with `ranks`, on some of them."""

    check: str
    verdict: Verdict
    said: str
    remedy: str = ""
    ranks: str = ""
    """Whose it is, where the others found something else; empty = everybody's."""


@dataclass(frozen=True)
class Doubt:
    """What a run may get along with, or not."""

    said: str
    remedy: str


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        name: by which findings, documentation and tests know it.
        look: says what it found in a line, or what is doubtful; raises LatheError where the run would fail.
        after: checks without which this one has nothing to look at.
        seconds: that it may take.
        if_late: what to do where it takes longer.
    """

    name: str
    look: Callable[[], str | Doubt]
    after: tuple[str, ...] = ()
    seconds: float = 20.0
    if_late: str = "look at the disks and the network that it needs; then run it again"


def examine(checks: Sequence[Check]) -> list[Finding]:
    """Look at one after the other; those whose grounds have failed are passed over, with a warning."""
    found: list[Finding] = []
    unknown: dict[str, str] = {}  # what cannot be relied on, and the check that failed
    for check in checks:
        lacking = next((unknown[name] for name in check.after if name in unknown), None)
        if lacking is not None:
            found.append(Finding(check.name, "warn", f"not looked at, since {lacking} failed", f"mend {lacking} first"))
            unknown[check.name] = lacking
            continue
        found.append(_in_time(check))
        if found[-1].verdict == "fail":
            unknown[check.name] = check.name
    return found


def _in_time(check: Check) -> Finding:
    """A check that hangs, as on a network file system that is away, is left alone in its thread."""
    answers: list[Finding] = []
    thread = threading.Thread(target=lambda: answers.append(_look(check)), name=f"doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    if answers:
        return answers[0]
    return Finding(check.name, "fail", f"no answer within {check.seconds:.0f} s", check.if_late)


def _look(check: Check) -> Finding:
    try:
        answer = check.look()
    except LatheError as error:
        return Finding(check.name, "fail", error.message, error.remedy)
    except Exception as error:  # whatever a library raises on a machine that is not well
        first = (str(error).strip() or "no more is said").splitlines()[0]
        said = f"the check itself failed: {type(error).__name__}: {first}"
        return Finding(check.name, "fail", said, "mend what it names, or report it if there is nothing to mend")
    if isinstance(answer, Doubt):
        return Finding(check.name, "warn", answer.said, answer.remedy)
    return Finding(check.name, "pass", answer)
