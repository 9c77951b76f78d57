"""Run by every rank of the tests beside it: many checks in one pair of processes; rank r leaves `WHAT-r.json`.

Usage: two_ranks.py FOLDER {first,write,read,matrix,cost}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rank_checks import averages, beginning, cost, elastic, memory, nets, saving, sizes, skipping, starting, swapping

from pipeline.config import EngineConfig
from pipeline.errors import SetupError
from pipeline.runtime import process
from pipeline.runtime.process import Process
from pipeline.train import checkpoint

TIMEOUT = 250  # seconds; no step is noted here, which a watchdog would tell of


def flags(ranks: Process) -> list[int]:
    """Rank 1 asks to stop in the second step: all hear of it there."""
    found = []
    for step in range(3):
        ranks.post(15 if ranks.rank == 1 and step == 1 else 0)
        found.extend(ranks.posted())
    return found


def differing(ranks: Process) -> list[list[str]]:
    """Values that the ranks compare: all alike, the second and the third other on each rank."""
    alike = {"a": 1, "b": (0.1, "x")}
    return [ranks.differing(alike), ranks.differing({**alike, "b": (0.1, ranks.rank), "c": -ranks.rank})]


def time_outs(ranks: Process) -> list[float]:
    """Seconds that each group waits for a rank: the side group, and the one that the engine reduces over."""
    groups = (ranks.side_group, nets.build(ranks, 2)._zero.dp_process_group)
    return [group._get_backend(ranks.device).options._timeout.total_seconds() for group in groups]


def wrong_world() -> str:
    from accelerate.state import PartialState

    try:
        process.start(EngineConfig(world_size=3))
    except SetupError as error:
        PartialState._reset_state()  # a second try in one process; users start a new one
        return str(error)
    return ""


def by_two(ranks: Process, folder: Path) -> dict[str, Any]:
    elastic.write(ranks, folder)
    return {
        "starting": starting.checks(ranks),
        "sizes": sizes.checks(ranks, folder),
        "averages": averages.checks(ranks),
        "skipping": skipping.checks(ranks),
        "elastic": elastic.read(ranks, folder, 2, elastic.ALL) | elastic.read(ranks, folder, 1, elastic.ONE_EACH),
        "beginning": beginning.checks(ranks, folder),
        "accumulated": elastic.accumulated(ranks),
        "scaled": elastic.scaled(ranks, folder),
        "memory": memory.checks(ranks),
        "swapping": swapping.checks(ranks),
        "own_rate": saving.own_rate(ranks, folder),
        "snapshotting": saving.snapshotting(ranks, folder),
        "saving": saving.saving(ranks, folder),
        "failing_save": saving.failing_save(ranks, folder),
        "damaged": [saving.damaged(ranks, folder, file) for file in (checkpoint.RUN, saving.OF_THE_LAST_RANK)],
        "flags": flags(ranks),
        "differing": differing(ranks),
        "time_outs": time_outs(ranks),
    }


def by_one(ranks: Process, folder: Path) -> dict[str, Any]:
    return {
        "refused": skipping.refused(ranks),
        "elsewhere": saving.elsewhere(ranks, folder),
        "averages": averages.checks(ranks),
        "elastic": elastic.read(ranks, folder, 2, elastic.ONE_EACH) | elastic.read(ranks, folder, 1, elastic.ONE_EACH),
    }


def main(folder: Path, what: str) -> None:
    refused = wrong_world() if what == "read" else ""
    config = EngineConfig(threads_per_rank=1, timeout_seconds=TIMEOUT, stall_seconds=TIMEOUT - 1)
    ranks = process.start(config)
    nets.prepare()
    result: dict[str, Any] = {"world_size": ranks.world_size, "wrong_world": refused}
    if what == "first":
        elastic.write(ranks, folder)
    elif what == "write":
        result |= by_two(ranks, folder)
    elif what == "read":
        result |= by_one(ranks, folder)
    elif what == "cost":
        result |= cost.checks(ranks)
    else:
        result["elastic"] = {
            k: v for world in (1, 2) for k, v in elastic.read(ranks, folder, world, elastic.ALL).items()
        }
        result["compiled"] = elastic.compiled(ranks)
    (folder / f"{what}-{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(result))
    ranks.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
