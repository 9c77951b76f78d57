"""Folders and S3 prefixes: does the store answer, is its clock ours, may we write, read and delete there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.storage import local_path, open_store
from pipeline.storage.local import translated

_S3 = "s3://"
_RETRY_VARIABLE, _RETRY_SECONDS = "LATHE_STORAGE_RETRY_SECONDS", 4.0
_SKEW_FAILS_SECONDS = 600.0  # S3 refuses requests beyond 15 minutes, and clocks drift
_SKEW_WARNS_SECONDS = 30.0
PROBE_PREFIX = ".lathe-doctor-"
"""How names of probes begin; the encode role may delete these (infra/terraform)."""
_PROBE = b"written by lathe doctor, and deleted at once\n"
_SECONDS = 30.0


@contextmanager
def impatient() -> Iterator[None]:
    """A server that is silent is not waited for as long as a run would: who asks sits before the terminal."""
    before = os.environ.get(_RETRY_VARIABLE)
    with suppress(ValueError):  # whoever reads it next says that it is no number
        os.environ[_RETRY_VARIABLE] = str(min(float(before or _RETRY_SECONDS), _RETRY_SECONDS))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_RETRY_VARIABLE, None)
        else:
            os.environ[_RETRY_VARIABLE] = before


def checks(addresses: Sequence[str], output: str) -> list[Check]:
    """Of the S3 server, if the run has to do with one, and of the output.

    Args:
        addresses: all that the run file names.
        output: where the run writes; of several folders, the one around them.
    """
    remote = [address for address in addresses if is_remote(address)]
    found = []
    if remote:
        found += [
            Check("storage", lambda: answers(remote[0]), seconds=_SECONDS),
            Check("clock", lambda: clock(remote[0]), ("storage",), _SECONDS),
        ]
    found.append(Check("output", lambda: rights(output), grounds(output), _SECONDS))
    return found


def is_remote(address: str) -> bool:
    """Whether it is on S3."""
    return address.startswith(_S3)


def grounds(*addresses: str) -> tuple[str, ...]:
    """The check that those on S3 come after."""
    return ("storage",) if any(map(is_remote, addresses)) else ()


def answers(url: str) -> str:
    """Whether the server says anything. Raises StorageError."""
    _seconds_ahead(url)
    return f"the S3 server answers ({os.environ.get('AWS_ENDPOINT_URL', 'of the default endpoint')})"


def clock(url: str) -> str | Doubt:
    """Whether this machine's clock and the server's agree, by its Date header. Raises StorageError."""
    ahead = _seconds_ahead(url)
    if ahead is None:
        return Doubt("the S3 server tells no time", "compare this machine's clock with another's: date -u")
    behind = "behind" if ahead > 0 else "ahead of"
    said = f"this machine's clock is {abs(ahead):.0f} s {behind} the S3 server's"
    remedy = "set it by NTP (timedatectl set-ntp true, or chronyc makestep), on every machine"
    if abs(ahead) >= _SKEW_FAILS_SECONDS:
        raise StorageError(f"{said}: signed requests are refused from 15 minutes on", remedy)
    if abs(ahead) >= _SKEW_WARNS_SECONDS:
        return Doubt(said, remedy)
    return f"within {max(1, round(abs(ahead)))} s of the S3 server's"


def rights(url: str) -> str:
    """Whether a file can be written beneath an address once and not twice, read, and deleted; nothing stays there.

    Raises:
        StorageError: it cannot; it says which.
    """
    missing = [] if is_remote(url) else _missing_folders(local_path(url).absolute())
    store, name = open_store(url), f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    try:
        store.write(name, _PROBE, if_absent=True)
        try:
            if store.read(name) != _PROBE:
                raise StorageError(f"{url}: what is written is not what is read", "look at the disk, or at the server")
            if store.write(name, _PROBE, if_absent=True):
                raise StorageError(
                    f"{url}: the store writes over what it was asked to leave (If-None-Match), so two runs could not"
                    " tell of each other",
                    "use a store with conditional writes: AWS S3, MinIO, Ceph, SeaweedFS in recent releases",
                )
        finally:
            store.delete([name])
        if store.exists(name):
            raise StorageError(
                f"{url}: {name} is still there after it was deleted", "check that the keys may delete in this bucket"
            )
    finally:
        for folder in missing:  # nobody has begun a run there
            with suppress(OSError):
                folder.rmdir()
    return f"{url}: written, read and deleted"


def _seconds_ahead(url: str) -> float | None:
    from pipeline.storage.s3 import S3Store  # slow import: only who uses S3 pays for it

    store = open_store(url)
    assert isinstance(store, S3Store)  # noqa: S101
    return store.seconds_ahead()


def _missing_folders(folder: Path) -> list[Path]:
    """Those that a write would make, the innermost first. Raises StorageError."""
    with translated(folder):  # of a name that is too long, or a folder that may not be looked into
        return [path for path in (folder, *folder.parents) if not path.exists()]
