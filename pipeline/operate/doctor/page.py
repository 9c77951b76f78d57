"""Findings for a person, as a table on a terminal and as lines elsewhere; and for a program."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.console import printable, say, without_logins
from pipeline.operate.doctor.finding import Finding, Verdict

_COLOURS: dict[Verdict, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def is_well(findings: Sequence[Finding], *, strict: bool = False) -> bool:
    """Whether nothing failed, or, where warnings count, nothing at all is wrong."""
    return not any(finding.verdict == "fail" or (strict and finding.verdict == "warn") for finding in findings)


def show(findings: Sequence[Finding]) -> None:
    """On standard output."""
    if not sys.stdout.isatty():
        say(lines(findings))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for finding in findings:
        said = Text(_said(finding))
        if finding.remedy:
            said.append(f"\n{_clean(finding.remedy)}", "cyan")
        table.add_row(Text(finding.verdict, _COLOURS[finding.verdict]), Text(finding.check), said)
    console = Console()
    console.print(table)
    console.print(Text(summary(findings), _COLOURS["pass" if is_well(findings, strict=True) else "warn"]))


def lines(findings: Sequence[Finding]) -> str:
    """One line for each, and one with the remedy below it."""
    width = max((len(finding.check) for finding in findings), default=0)
    told = []
    for finding in findings:
        told.append(f"{finding.verdict}  {finding.check:<{width}}  {_said(finding)}")
        if finding.remedy:
            told.append(f"{'':<{width + 8}}{_clean(finding.remedy)}")
    return "\n".join([*told, summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS)


def as_json(findings: Sequence[Finding], *, strict: bool) -> str:
    """The same for a program."""
    told = [{name: _clean(value) for name, value in asdict(finding).items()} for finding in findings]
    return json.dumps({"well": is_well(findings, strict=strict), "findings": told}, indent=1)


def _said(finding: Finding) -> str:
    who = f"{finding.ranks}: " if finding.ranks else ""
    return who + _clean(finding.said)


def _clean(text: str) -> str:
    return printable(without_logins(text), one_line=True)
