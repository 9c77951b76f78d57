"""A real S3 server for the tests that ask for it; tests whose programs this machine lacks are skipped."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator

import pytest
from slurm import Slurm

from infra.system_packages import GROUPS, missing
from pipeline.demo.object_store import EmbeddedObjectStore

_numbers = itertools.count()
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"s3_server", "s3_url"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)
    for group in GROUPS:
        marked = [item for item in items if item.get_closest_marker(group)]
        if marked and (left := missing(group)):
            reason = f"{', '.join(left)}: not found, and infra/system_packages.py could not get it"
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection() -> None:
    """What is imported stays: sweeps of the garbage would look at a million objects in vain, and forks copy them."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under continuous integration nothing may be left out: a skipped test fails the run."""
    gc.unfreeze()  # what a library says of what it finds at the end would be about frozen objects
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("tests were skipped, which continuous integration does not allow", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _signals_are_heard_as_before() -> Iterator[None]:
    """A trainer that was asked to stop ignores further signals, and so would all that later tests start."""
    before = {number: signal.getsignal(number) for number in _ASKING}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedObjectStore]:
    """An S3 server on loopback; its address and keys are in the environment while it runs."""
    with (
        EmbeddedObjectStore(tmp_path_factory.mktemp("s3"), "lathe-tests") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.delenv("AWS_PROFILE", raising=False)
        yield server


@pytest.fixture
def s3_url(request: pytest.FixtureRequest, s3_server: EmbeddedObjectStore) -> str:
    """A prefix on the S3 server that no other test uses."""
    assert request.node.get_closest_marker("s3"), "mark it s3: the fast tests start no server"
    return f"{s3_server.url}/test-{next(_numbers)}"


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes."""
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
