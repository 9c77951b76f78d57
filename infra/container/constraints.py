"""Pin what images hold: `python -m infra.container.constraints [FILE]`, in an environment with Lathe and hatchling.

Every package that Lathe, its extra `parquet` and its build need there, with the version that this environment has.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("constraints.txt")
_HEAD = "# Written by python -m infra.container.constraints, for Linux on x86-64 and Python 3.11\n"


def main(arguments: Sequence[str]) -> int:
    """Write the pins; 1 = a package is not installed here."""
    try:
        pins = pinned(wanted())
    except PackageNotFoundError as error:
        print(f"error: {error.name} is not installed here\n  pip install -e '.[parquet]' hatchling", file=sys.stderr)
        return 1
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    (Path(arguments[0]) if arguments else FILE).write_text(_HEAD + "".join(lines), encoding="utf-8")
    return 0


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for by itself."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = about["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["parquet"], *about["build-system"]["requires"]]
    return [Requirement(line) for line in lines]


def pinned(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Versions by name of these packages and of all that they need here.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = list(requirements)
    while left:
        package = left.pop()
        name = canonicalize_name(package.name)
        for extra in {"", *package.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                installed = distribution(name)
                found[name] = installed.version
                needs = [Requirement(line) for line in installed.requires or ()]
                left += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
