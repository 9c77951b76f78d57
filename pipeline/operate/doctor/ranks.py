"""`--all-ranks`: what all ranks found, as one list; each thing once, with the ranks that it is about."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.operate.doctor.finding import Finding
from pipeline.runtime.watchdog import named

_OWN_NAMES = re.compile(r"\S*[\d/]\S*")  # hosts, paths, sizes: in these, findings that are alike differ
_SHOWN = 60  # characters of a field
_WORST_FIRST = ("fail", "warn")


@dataclass(frozen=True)
class Told:
    """What one rank tells.

    Attributes:
        rank: which.
        host: where it is.
        facts: that are to be the same on all: versions, the run file.
        findings: its own.
    """

    rank: int
    host: str
    facts: Mapping[str, str]
    findings: Sequence[Finding]

    def to_json(self) -> str:
        """For the way to rank 0."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Told:
        """What `to_json` made."""
        tree = json.loads(text)
        return cls(**{**tree, "findings": tuple(Finding(**one) for one in tree["findings"])})


def together(told: Sequence[Told], world_size: int, seconds: float) -> list[Finding]:
    """All ranks' findings as one list, in the order of checks.

    Args:
        told: by those ranks that told something.
        world_size: ranks that there should be.
        seconds: that were waited for them.
    """
    found = [_all_there(told, world_size, seconds), *_alike(told)]
    names = dict.fromkeys(finding.check for one in told for finding in one.findings)
    for name in names:
        found += _of_check(name, told)
    return found


def _all_there(told: Sequence[Told], world_size: int, seconds: float) -> Finding:
    missing = set(range(world_size)) - {one.rank for one in told}
    hosts = {one.host for one in told}
    if missing:
        said = f"{len(missing)} of {world_size} told nothing within {seconds:.0f} s"
        return Finding(
            "ranks", "fail", said, "look at their machines, and at what they have printed", named(sorted(missing))
        )
    return Finding("ranks", "pass", f"{world_size} on {len(hosts)} machine{'s' * (len(hosts) > 1)}")


def _alike(told: Sequence[Told]) -> list[Finding]:
    """Whether all ranks are to run the same, by the same packages."""
    different = []
    for name in dict.fromkeys(name for one in told for name in one.facts):
        values: dict[str, list[int]] = {}
        for one in told:
            values.setdefault(one.facts.get(name, "unknown"), []).append(one.rank)
        if len(values) > 1:
            said = (f"{value[:_SHOWN]} on {named(who)}" for value, who in values.items())
            different.append(f"{name}: {', '.join(said)}")
    if not different:
        return [Finding("alike", "pass", "run file and versions are the same on all ranks")]
    remedy = "give all machines the same run file and environment"
    return [Finding("alike", "fail", "; ".join(different), remedy)]


def _of_check(name: str, told: Sequence[Told]) -> list[Finding]:
    """One finding where all that looked agree that it passes, else each other one once."""
    found = [(one.rank, finding) for one in told for finding in one.findings if finding.check == name]
    groups: dict[tuple[str, ...], list[tuple[int, Finding]]] = {}
    for rank, finding in found:
        alike = (_OWN_NAMES.sub("", finding.said), _OWN_NAMES.sub("", finding.remedy))
        groups.setdefault((finding.verdict, *alike), []).append((rank, finding))
    wrong = [group for verdict in _WORST_FIRST for key, group in groups.items() if key[0] == verdict]
    if not wrong:
        return [found[0][1]]
    return [
        replace(group[0][1], ranks="" if len(group) == len(found) else named([rank for rank, _ in group]))
        for group in wrong
    ]
