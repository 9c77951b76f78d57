"""Python and packages, against the bounds that Lathe's own metadata has."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline import __version__
from pipeline.errors import SetupError
from pipeline.operate.doctor.finding import Check, Doubt

_OWN = "lathe-ldm"
_NOT_INSTALLED = Doubt(
    f"{_OWN} is not installed, only found on the path: its bounds are not known", "pip install it, or `make develop`"
)


def checks() -> list[Check]:
    """Of the interpreter and of what is installed in it."""
    return [Check("python", python), Check("packages", packages)]


def python() -> str | Doubt:
    """Whether this Python is one that Lathe takes. Raises SetupError."""
    try:
        bounds = metadata(_OWN)["Requires-Python"]
    except PackageNotFoundError:
        return _NOT_INSTALLED
    here = platform.python_version()
    if not SpecifierSet(bounds).contains(here, prereleases=True):
        raise SetupError(f"Python {here}, and Lathe wants {bounds}", f"make an environment with Python {bounds}")
    return f"Python {here} ({bounds})"


def packages() -> str | Doubt:
    """Whether each dependency is there, in a release that Lathe takes. Raises SetupError, naming all that are not."""
    try:
        wanted = list(_requirements())
    except PackageNotFoundError:
        return _NOT_INSTALLED
    wrong = {str(need): said for need in wanted if (said := _problem(need))}
    if wrong:
        raise SetupError("; ".join(wrong.values()), f"pip install {' '.join(map(repr, wrong))}")
    return f"lathe {__version__}, {len(wanted)} packages within their bounds, torch {version('torch')}"


def _requirements() -> Iterator[Requirement]:
    """Those without which Lathe is not installed; extras are asked for where they are used."""
    for line in metadata(_OWN).get_all("Requires-Dist") or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            need.marker = None
            yield need


def _problem(need: Requirement) -> str:
    try:
        here = version(need.name)
    except PackageNotFoundError:
        return f"{need.name} is not installed ({need.specifier} is wanted)"
    if need.specifier.contains(here, prereleases=True):
        return ""
    return f"{need.name} {here}, and {need.specifier} is wanted"
