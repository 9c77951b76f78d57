"""From the addresses users write to stores, files and lists of shards."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import DataError, StorageError
from pipeline.storage.base import Store, checked_name
from pipeline.storage.local import LocalStore

_S3 = "s3://"
_BRACES = re.compile(r"\{([^{}]*)\}")
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{3,255}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_NAMES = 1_000_000


def open_store(url: str, environment: Mapping[str, str] | None = None) -> Store:
    """A store on a local folder or on `s3://bucket/prefix`; nothing is contacted yet.

    Args:
        url: a path, or an address that begins with `s3://`.
        environment: AWS_* variables that stand in for the process's own. By default endpoint, region and keys
            come from the standard chain: AWS_* variables, profiles, instance roles.

    Raises:
        StorageError: another scheme, or no bucket.
    """
    if url.startswith(_S3):
        bucket, _, prefix = url.removeprefix(_S3).rstrip("/").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise StorageError(f"{url} names no bucket that S3 can have", "write s3://BUCKET or s3://BUCKET/PREFIX")
        if prefix:
            checked_name(prefix)
        from pipeline.storage.s3 import S3Store  # slow import: only who uses S3 pays for it

        return S3Store(bucket, prefix, environment or {})
    if "://" in url or not url:
        raise StorageError(
            f"{url!r} is neither a folder nor an s3:// address", "use a local path or s3://BUCKET/PREFIX"
        )
    return LocalStore(local_path(url))


def local_path(path: str) -> Path:
    """A path as users write it, `~` included. Raises StorageError when no path can be meant."""
    try:
        if "\0" not in path:
            return Path(path).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{path}: there is no such home folder", "write the whole path") from error
    raise StorageError(f"{path!r} has a NUL character in it", "write the path anew")


def split(url: str) -> tuple[str, str]:
    """Parent and last name of a file's address: `s3://b/x/y.json` -> (`s3://b/x`, `y.json`).

    Raises:
        StorageError: there is no name, as in `s3://bucket`.
    """
    scheme = _S3 if url.startswith(_S3) else ""
    parent, slash, name = url.removeprefix(scheme).rstrip("/").rpartition("/")
    if not name or name in (".", "..") or (scheme and not parent):
        raise StorageError(f"{url!r} names no file", "give the file's whole address")
    return scheme + (parent or slash or "."), name


def read_file(url: str) -> bytes:
    """One file, by its address. Raises StorageError."""
    parent, name = split(url)
    return open_store(parent).read(name)


def find_shards(pattern: str) -> list[str]:
    """Addresses of shards, sorted.

    Args:
        pattern: a folder or prefix (its own `*.tar`), or a file's address with `*`, `?`, `[...]`, `{000..010}`
            and `{a,b}` in it; `*` does not reach into sub-folders.

    Raises:
        DataError: nothing matches, or a file that braces name is not there.
        StorageError: the place cannot be read.
    """
    found: set[str] = set()
    for parent, names in _by_parent(pattern).items():
        store = open_store(parent)
        there = {entry.name for entry in store.list(_common_start(names)) if "/" not in entry.name}
        for name in names:
            matching = fnmatch.filter(there, name) if _is_glob(name) else there & {name}
            if not matching and not _is_glob(name):
                raise DataError(f"{parent}/{name}: no such shard", f"check the pattern {pattern!r}")
            found.update(f"{parent.rstrip('/')}/{match}" for match in matching if not match.startswith("."))
    if not found:
        raise DataError(
            f"no shards match {pattern!r}",
            "give a folder that holds *.tar, or a pattern such as s3://bucket/shards/*.tar",
        )
    return sorted(found)


def fetch_folder(url: str, local: Path) -> Path:
    """A local copy of everything under an `s3://` prefix; a local folder is returned as it is.

    Raises:
        StorageError: nothing is there.
    """
    if not url.startswith(_S3):
        folder = local_path(url)
        if not folder.is_dir():
            raise StorageError(f"{url}: no such folder", "check the path")
        return folder
    store = open_store(url)
    names = [entry.name for entry in store.list()]
    if not names:
        raise StorageError(f"{url} holds no files", "check the address")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.download(name, local / checked_name(name)), names))
    return local


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.{x,y}` -> `a-08.x`, `a-08.y`, `a-09.x`, ... A range keeps its first number's width.

    Raises:
        DataError: more than a million names.
    """
    pieces = _BRACES.split(pattern)  # text, braces, text, braces, ..., text
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_NAMES:
        raise DataError(f"{pattern!r} stands for {count} names", "use * in place of the braces")
    return ["".join(names) for names in itertools.product(*choices)]


def _choices(piece: str) -> list[str]:
    numbers = _RANGE.fullmatch(piece)
    if numbers is None:
        return piece.split(",") if "," in piece else [f"{{{piece}}}"]
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= _MAX_NAMES:
        raise DataError(f"{{{piece}}} stands for {abs(last - first) + 1} names", "use * in place of the braces")
    step = 1 if last >= first else -1
    return [str(n).zfill(len(numbers[1])) for n in range(first, last + step, step)]


def _by_parent(pattern: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for address in expand_braces(pattern):
        is_folder = not _is_glob(address) and not address.endswith(".tar")
        parent, name = (address, "*.tar") if is_folder else split(address)
        if _is_glob(parent):
            raise DataError(f"{pattern!r} has a wildcard in a folder's name", "use wildcards in the last part only")
        groups.setdefault(parent, []).append(name)
    return groups


def _common_start(names: list[str]) -> str:
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return re.split(r"[*?\[]", low[:same], maxsplit=1)[0]


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")
