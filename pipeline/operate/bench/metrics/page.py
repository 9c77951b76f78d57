"""The figures of `lathe bench metrics` for a person: a table in the terminal, or a page in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from pipeline.operate.bench.metrics.job import added_milliseconds, over
from pipeline.operate.bench.tables import Rows, aligned, markdown, passed, setting_rows

MOST_OVER_OFF = 1.01
MOST_MILLISECONDS = 0.5

_HEAD = """# Metrics, measured

Written by `lathe bench metrics`: what does it cost a step to be told of?
"""
_HOW = """
Two trainers of the same network and latents take turns in one process, step by step: **on** is
`lathe train` as it comes, with its parts timed, losses by noise level, operations counted, the reduction over ranks and
a line of the log; **off** has none of these. Ratios and differences are of rounds of {steps} steps of each, with one
line of the log, as by default; their medians are told, with 95 % intervals by bootstrap.

- **reference**: a UNet of {parameters:,} parameters, {batch} samples a rank and step; {ranks} rank(s) on {device},
  {threads} thread(s) each; {pairs} rounds.
- **tiny**: the same with {tiny[batch]} sample(s); {tiny[pairs]} rounds. CPU time is that of all threads.
- a **scrape** is the CPU time of both sides, in one process; Prometheus asks every 15 s or so.
"""
_AGAIN = """## How to repeat it

```
{command}
```
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    return f"{aligned(_rows(result))}\n\n" + "\n".join(_verdicts(result)) + "\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: figures, what they mean, machine, versions, and the command that measures them again."""
    sizes = result["sizes"]
    reference = sizes["reference"]
    about = {**result["reference"], **reference, "tiny": sizes["tiny"]}
    parts = [
        _HEAD,
        "\n".join(f"- {verdict}" for verdict in _verdicts(result)) + "\n",
        markdown(_rows(result)),
        _HOW.format(**about),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdicts(result: dict[str, Any]) -> list[str]:
    ratio, added = over(result["reference"]["rounds"]), added_milliseconds(result["tiny"]["rounds"])
    return [
        f"metrics_on_over_off: {ratio['median']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f}), to be at most"
        f" {MOST_OVER_OFF}: {passed(ratio['high'] <= MOST_OVER_OFF)}",
        f"metrics_ms_per_step: {added['median']:.3f} ({added['low']:.3f} to {added['high']:.3f}), to be at most"
        f" {MOST_MILLISECONDS}: {passed(added['high'] <= MOST_MILLISECONDS)}",
        f"a scrape takes {result['scrape_ms']:.2f} ms of CPU time",
    ]


def _rows(result: dict[str, Any]) -> Rows:
    rows = [["network", "ms a step, on", "off", "CPU ms a step, on", "off"]]
    for kind in ("reference", "tiny"):
        rounds = result[kind]["rounds"]
        medians = [
            statistics.median(turns[name][figure] for turns in rounds)
            for figure in ("seconds", "cpu_seconds")
            for name in ("on", "off")
        ]
        rows.append([kind, *(f"{1e3 * seconds:.2f}" for seconds in medians)])
    return rows
