"""Who is compared with whom: interpreters of the peers, and everyone's processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pipeline.errors import SetupError
from pipeline.operate.bench.loader.contestant import Contestant
from pipeline.operate.bench.loader.ours import Work
from pipeline.operate.bench.loader.peers import PEERS
from pipeline.operate.bench.own_environment import own_environment, with_requirements

HERE = ("webdataset", "torch_files")  # what we depend on anyway runs beside our own packages
APART = ("mosaicml", "litdata", "litdata_by_item")
TUNED = ("litdata_by_item",)  # away from the settings that it comes with; not among "the fastest peer"
NOT_FROM_S3 = ("torch_files",)
ALONE_ON_S3 = ("litdata", "litdata_by_item")  # 20 times as fast without worker processes as with them
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Rivals:
    """The peers' interpreters, by name."""

    pythons: Mapping[str, Path]

    def ours(self, work: Work) -> Contestant:
        """Our loader, in a process of its own."""
        command = [sys.executable, "-m", "pipeline.operate.bench.loader.ours"]
        return Contestant("own loader", [*command, json.dumps(asdict(work))])

    def peer(self, name: str, **work: Any) -> Contestant:
        """A peer, in a process of its own. `work`: see `peers.Work`."""
        command = [str(self.pythons[name]), str(_FOLDER / "peers.py"), json.dumps({"peer": name, **work})]
        return Contestant(name, command)

    def raw(self, **work: Any) -> Contestant:
        """Bare range reads, see `raw_reads`."""
        command = [sys.executable, str(_FOLDER / "raw_reads.py"), json.dumps(work)]
        return Contestant("raw reads", command)

    def about(self) -> dict[str, Any]:
        """Settings and versions of each peer."""
        return {
            name: {"settings": PEERS[name].settings, "versions": _versions(python, PEERS[name].packages)}
            for name, python in self.pythons.items()
        }


def _versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    code = (
        "import json, sys; from importlib.metadata import version; print(json.dumps(list(map(version, sys.argv[1:]))))"
    )
    told = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(zip(packages, json.loads(told), strict=True))


def cache_folder() -> Path:
    """Where the peers' environment is kept by default: in the user's cache, as XDG says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lathe" / "bench-peers"


def find_rivals(folder: Path | None) -> Rivals:
    """The peers, with their environment made where it is not yet there.

    Args:
        folder: where that is kept; None = webdataset alone, which needs none.

    Raises:
        SetupError: it cannot be made.
    """
    here = Path(sys.executable)
    if folder is None:
        return Rivals({"webdataset": here})
    linked = [*with_requirements("torch"), "torchvision"]
    with as_file(files("pipeline.operate.bench.loader") / "peers.txt") as requirements:
        try:
            programs = own_environment(folder, requirements, linked)
        except SetupError as error:
            raise SetupError(
                f"the peers cannot be installed: {error.message}", "mend that, or leave them out with --no-peers"
            ) from error
    return Rivals({**dict.fromkeys(HERE, here), **dict.fromkeys(APART, programs / "python")})
