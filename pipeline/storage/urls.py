"""From the addresses users write to stores and files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.storage.base import Store, checked_name
from pipeline.storage.local import LocalStore

_S3 = "s3://"
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{3,255}")


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
