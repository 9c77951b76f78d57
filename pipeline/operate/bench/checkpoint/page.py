"""The figures of `lathe bench checkpoint` for a person: a few tables in the terminal, or a page in Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.operate.bench.tables import Rows, aligned, listed, markdown, passed, setting_rows

MOST_OVER_COPY = 1.2

_HEAD = """# Checkpoints, measured

Written by `lathe bench checkpoint`: how long does training stand still for a checkpoint, and what does it cost until it
is stored?
"""
_STALL = """## The stall

One rank of plain DDP with {parameters:.1f} M parameters: {state:.0f} MiB of weights, moments and one average.

- **copy**: all of that state, tensor by tensor, into memory that was used before; the mean of one before and one after.
- **stall**: what the training loop waits for a save to begin: the same copy, into the layout of the checkpoint's file,
  and the small files beside it. The rest is done by another thread.
- Medians of {pairs} pairs. The first save of all: {first:.3f} of a copy.
"""
_COST = """## Until it is stored

Steps of {batch} samples of {side}x{side}, {steps} without a save, then as many as a save takes; medians of {rounds}
rounds. The S3 server runs on the same cores.

- **save**: from the first copy to the completion marker.
- **memory**: that each rank holds for the copy, always: {memory:.1f} MiB, {share:.3f} of its state. What is added while
  a save is stored is in the table.
"""
_AGAIN = """## How to repeat it

```
{command}
```

Nothing else should run on the machine: the load average before the start is above.
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    return f"{aligned(_stall_rows(result))}\n\n{aligned(_cost_rows(result))}\n\n{_verdict(result)}\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: figures, what they mean, machine, versions, and the command that measures them again."""
    sizes, state = result["sizes"], result["state_bytes"]
    facts = {
        "parameters": result["parameters"] / 1e6,
        "state": state / 2**20,
        "memory": result["file_bytes"] / 2**20,
        "share": result["file_bytes"] / state,
        "first": result["first"]["stall_over_copy"],
    }
    parts = [
        _HEAD,
        f"- {_verdict(result)}\n",
        _STALL.format(**facts | {"pairs": sizes["pairs"]}),
        markdown(_stall_rows(result)),
        f"Pair by pair: {listed(one['stall_over_copy'] for one in result['pairs'])}.\n",
        _COST.format(**sizes | facts),
        markdown(_cost_rows(result)),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdict(result: dict[str, Any]) -> str:
    over = result["stall_over_copy"]
    return f"stall_over_copy: {over:.3f}, to be at most {MOST_OVER_COPY}: {passed(over <= MOST_OVER_COPY)}"


def _stall_rows(result: dict[str, Any]) -> Rows:
    rows = [["stall", "ms", "GB/s"]]
    for name, key in (("copy", "copy_seconds"), ("stall", "stall_seconds")):
        rows.append([name, f"{1e3 * result[key]:.1f}", f"{result['state_bytes'] / 1e9 / result[key]:.2f}"])
    return rows


def _cost_rows(result: dict[str, Any]) -> Rows:
    rows = [["store", "step ms", "while storing", "slow-down", "save s", "MB/s", "added MiB"]]
    for name in ("folder", "s3"):
        one = result[name]
        milliseconds = (f"{1e3 * one[key]:.0f}" for key in ("step_seconds", "step_seconds_while_storing"))
        figures = [f"{one['slow_down']:.2f}", f"{one['save_seconds']:.2f}", f"{one['mb_per_second']:.0f}"]
        rows.append([name, *milliseconds, *figures, f"{one['added_bytes'] / 2**20:.0f}"])
    return rows
