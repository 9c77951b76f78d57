"""The Dockerfile: clean by hadolint, pinned, without rights, and fit for what the manifests start."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.container import constraints
from pipeline.operate.launch.kubernetes_pod import LAUNCHER, TEMPORARY, USER

pytestmark = pytest.mark.infra
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/container"
HADOLINT = Path(sys.executable).with_name("hadolint")
PINS = dict(line.split("==") for line in constraints.FILE.read_text().splitlines() if not line.startswith("#"))


def steps(text: str | None = None) -> list[tuple[str, str]]:
    """Instructions with their words, lines joined; comments left out."""
    text = text or (FOLDER / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", re.sub("(?m)^#.*\n", "", text))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HADOLINT, "--no-color", "--config", "/dev/null", file], capture_output=True, text=True, check=False
    )


def test_hadolint_finds_nothing(tmp_path):
    done = lint(FOLDER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text((FOLDER / "Dockerfile").read_text().replace(":3.11.13-slim-bookworm AS build", " AS build"))
    assert "DL3006" in lint(worse).stdout, "it would find an image without a tag"


def test_bases_are_pinned_and_the_last_user_is_nobody_special():
    bases = [rest.split()[0] for word, rest in steps() if word == "FROM"]
    stages = [rest.split()[2] for word, rest in steps() if word == "FROM"]
    assert stages == ["build", "cpu", "cuda"]
    assert all(base in stages or re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    for image in ("cpu", "cuda"):
        own = steps()[[rest.split()[-1] for _, rest in steps()].index(image) :]
        until = next((i for i, (word, _) in enumerate(own[1:], 1) if word == "FROM"), len(own))
        assert [rest for word, rest in own[:until] if word == "USER"][-1] == f"{USER}:{USER}"
    (home,) = [m[1] for word, rest in steps() if word == "ENV" and (m := re.search(r"HOME=(\S+)", rest))]
    assert home == TEMPORARY, "the only place that a root that is read only leaves writable"


def test_the_image_has_what_manifests_start():
    copied = {rest.split()[-1]: rest.split()[-2] for word, rest in steps() if word == "COPY"}
    folder = PurePosixPath(LAUNCHER).parent
    assert copied[str(folder)] == "launchers"
    path = next(rest for word, rest in steps() if word == "ENV" and "HOME" in rest)
    assert "PATH=/opt/lathe/venv/bin:" in path, "lathe, python"
    assert any(word == "RUN" and re.search(r"install .*\btini\b", rest) for word, rest in steps())
    assert ("ENTRYPOINT", '["tini", "--"]') in steps()


def test_the_build_sees_all_that_the_package_is_made_of():
    copies = [rest.split() for word, rest in steps() if word == "COPY" and "--from" not in rest]
    sources = {source for words in copies for source in words[:-1]}
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = about["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", about["project"]["readme"], *about["project"]["license-files"], *wheel["packages"]}
    assert needed | set(wheel["force-include"]) <= sources
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == seen, "and nothing else"
    assert all((ROOT / source).exists() for source in sources)


def test_every_dependency_is_pinned_within_its_bounds():
    for requirement in constraints.wanted():
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement
    installs = [rest for word, rest in steps() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint infra/container/constraints.txt" in rest for rest in installs)


def test_pins_are_closed():
    """What a pinned package needs is pinned too, as far as this environment has the same version."""
    compared = 0
    for name, version in PINS.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version == version:
            compared += 1
            needs = [Requirement(line) for line in installed.requires or ()]
            there = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
            assert {canonicalize_name(need.name) for need in there} <= set(PINS), name
    assert compared, "another environment altogether: write the pins anew"


def test_pins_are_written_from_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constraints, "wanted", lambda: [Requirement("psutil"), Requirement("typer")])
    assert constraints.main([str(tmp_path / "pins")]) == 0
    lines = (tmp_path / "pins").read_text().splitlines()[1:]
    assert f"psutil=={distribution('psutil').version}" in lines
    assert {line.split("==")[0] for line in lines} >= {"typer", "rich", "pygments"}, "and what these need"
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    monkeypatch.setattr(constraints, "wanted", lambda: [Requirement("no-such-package")])
    assert constraints.main([str(tmp_path / "pins")]) == 1
    assert "no-such-package is not installed here" in capsys.readouterr().err
