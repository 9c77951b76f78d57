"""`lathe report`: runs to one HTML file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from pipeline.console import printable
from pipeline.errors import ConfigError
from pipeline.operate.report.document import GENERATOR
from pipeline.operate.report.markup import tag
from pipeline.operate.report.run_page import Seen, run_page
from pipeline.operate.runs.find import find, open_to_look
from pipeline.operate.runs.run import open_runs
from pipeline.operate.runs.state import look_at, states_of
from pipeline.storage import local_path, split

_LINE_OF_OURS = tag("meta", name="generator", content=GENERATOR).encode()
_HEAD_BYTES = 4096


def report(addresses: Sequence[str], output: str, progress: Callable[[int, int], None] | None = None) -> str:
    """Write the page of some runs, and say so in a line.

    Args:
        addresses: outputs of `lathe train`, `train-vae` or `encode`.
        output: the page's file or address; a page that was written before is replaced, another file is not.
        progress: called with (parts read, parts to read).

    Raises:
        ConfigError: `output` is a file of somebody else's, or a folder.
        DataError: an address holds no run.
        StorageError: a run cannot be read, or the page cannot be written.
    """
    parent, name = split(output)
    if not name.endswith((".html", ".htm")):
        raise ConfigError(
            f"--output {output}: a page's name ends in .html", f"write --output {output.rstrip('/')}/report.html"
        )
    store = open_to_look(parent)
    if "://" not in output and os.path.lexists(local_path(output)) and not local_path(output).is_file():
        raise ConfigError(f"--output {output} is there, and no file", "give another name, or delete it")
    if store.exists(name) and _LINE_OF_OURS not in store.read(name, 0, _HEAD_BYTES):
        raise ConfigError(f"--output {output} is there, and no report", "give another name, or delete it")
    runs = open_runs([find(address) for address in addresses])
    looks = []
    for run in runs:
        run.refresh(progress, run.found.listing)
        looks.append(look_at(run, time.time()))
    seen = [Seen(run, state) for run, state in zip(runs, states_of(looks, time.sleep), strict=True)]
    page = run_page(seen, time.time()).encode()
    store.write(name, page)
    states = ", ".join(f"{one.run.name} {one.state.word}" for one in seen)
    return printable(f"{output}: {states}; {len(page) / 2**20:.1f} MiB", one_line=True)
