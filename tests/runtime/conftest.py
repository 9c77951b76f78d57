"""One rank, then a pair, then one rank again: each started once, for all tests beside this file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import rank_scripts
from rank_scripts import TWO

SCRIPT = Path(__file__).with_name("two_ranks.py")
run = partial(rank_scripts.run, timeout=1500)  # seconds; the matrix takes five minutes of two cores


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Run Python with these arguments, as one rank without a launcher; returns what it said."""
    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where ranks leave what they found; one rank and a pair have run."""
    folder = tmp_path_factory.mktemp("ranks")
    run(str(SCRIPT), str(folder), "first")
    (folder / "output.txt").write_text(run(*TWO, str(SCRIPT), str(folder), "write"))
    return folder


@pytest.fixture(scope="session")
def results(folder) -> list[dict]:
    return [json.loads((folder / f"write-2-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="session")
def alone(folder) -> dict:
    run(str(SCRIPT), str(folder), "read")
    return json.loads((folder / "read-1-0.json").read_text())


@pytest.fixture(scope="session")
def cost(tmp_path_factory) -> dict[str, float]:
    """Processor time of a step on one rank: of a bare loop in milliseconds, of each engine in multiples of it."""
    folder = tmp_path_factory.mktemp("cost")
    run(str(SCRIPT), str(folder), "cost")
    return json.loads((folder / "cost-1-0.json").read_text())


@pytest.fixture(scope="session")
def matrix(folder) -> dict[str, dict]:
    """Every engine at one and at two ranks, from every engine at one and at two."""
    run(str(SCRIPT), str(folder), "matrix")
    run(*TWO, str(SCRIPT), str(folder), "matrix")
    found = [json.loads((folder / f"matrix-{size}-0.json").read_text())["elastic"] for size in (1, 2)]
    return found[0] | found[1]
