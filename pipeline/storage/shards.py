"""From what users write to the shards that are meant: folders, wildcards, braces, lists."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.storage.base import Entry
from pipeline.storage.urls import open_store, read_file, split

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_NAMES = 1_000_000
_LIST = ".txt"
_SHARD = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTINGS_AT_ONCE = 8


@dataclass(frozen=True, order=True)
class ShardAddress:
    """A shard's address, its size in bytes and its version (see `Entry`), as the listing of its folder says."""

    url: str
    size: int
    version: str = ""


@dataclass(frozen=True)
class _Wanted:
    """One address without braces: `path`, which may have wildcards, below `root`, which has none."""

    said: str  # what the user wrote, and where
    root: str
    path: tuple[str, ...]


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Addresses of shards, sorted, each once. See `find_shard_entries`."""
    return [shard.url for shard in find_shard_entries(patterns)]


def find_shard_entries(patterns: str | Sequence[str]) -> list[ShardAddress]:
    """Shards with their sizes and versions, sorted by address, each once. Each folder is listed once.

    Args:
        patterns: one or several of
            - a folder or prefix: its own `*.tar`;
            - a file's address with `*`, `?`, `[...]`, `{000..010}` and `{a,b}` in it, in folders' names too; `*`
              does not reach into sub-folders, `**` stands for any number of folders, and names that begin with
              a dot are not met by wildcards;
            - the address of a `.txt` file with one of these a line; blank lines and lines that begin with `#` are
              passed over.

    Raises:
        DataError: a pattern or line matches nothing, a file named without wildcards is not there, or a list
            cannot be used.
        StorageError: a place cannot be read.
    """
    wanted = [_wanted(said, address) for said, address in _patterns(patterns)]
    by_root: dict[str, list[_Wanted]] = {}
    for want in wanted:
        by_root.setdefault(want.root, []).append(want)
    with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
        listings = dict(zip(by_root, pool.map(_listing, by_root, by_root.values()), strict=True))
    found: set[ShardAddress] = set()
    missed: dict[str, bool] = {}
    for want in wanted:
        met = list(_met(want, listings[want.root]))
        found.update(ShardAddress(f"{want.root.rstrip('/')}/{e.name}", e.size, e.version) for e in met)
        missed[want.said] = missed.get(want.said, True) and not met
    for said in (said for said, is_missed in missed.items() if is_missed):
        raise DataError(
            f"no shards match {said}",
            "give a folder that holds *.tar, or a pattern such as s3://bucket/shards/*.tar",
        )
    return sorted(found)


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


def _patterns(given: str | Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every address that is meant, after what the user wrote and where. Lists are read, braces expanded."""
    for pattern in [given] if isinstance(given, str) else given:
        for address in expand_braces(pattern):
            if address.endswith(_LIST):
                yield from _lines(address)
            else:
                yield repr(pattern), address


def _lines(url: str) -> Iterator[tuple[str, str]]:
    if _is_glob(url):
        raise DataError(f"{url!r}: a list's address takes no wildcards", "name the lists one by one")
    try:
        lines = read_file(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not text in UTF-8", "write one address a line") from error
    count = 0
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            said = f"{line!r} (line {number} of {url})"
            if line.endswith(_LIST):
                raise DataError(f"{said}: a list takes no lists", "write the other list's own lines")
            for address in expand_braces(line):
                yield said, address
            count += 1
    if not count:
        raise DataError(f"{url} lists no shards", "write one address a line")


def _wanted(said: str, address: str) -> _Wanted:
    is_s3 = address.startswith("s3://")
    first = address.split("/")[2] if is_s3 else address.strip("/")
    if not first or (is_s3 and _is_glob(first)):
        raise DataError(
            f"{said} names no folder or bucket", "give a folder or a file, such as s3://bucket/shards/*.tar"
        )
    if address.endswith(("/", "/**")) or not (_is_glob(address) or address.endswith(_SHARD)):
        address = f"{address.rstrip('/')}/*.tar"
    root, name = split(address)
    path = [name]
    while _is_glob(root):
        root, name = split(root)
        path.insert(0, name)
    return _Wanted(said, root, tuple(path))


def _listing(root: str, wanted: list[_Wanted]) -> dict[str, Entry]:
    """What is there by name, of the folders that may hold something wanted."""

    def into(folder: str) -> bool:
        return any(_may_hold(folder.split("/"), want.path[:-1]) for want in wanted)

    entries = open_store(root).list(_common_start(["/".join(want.path) for want in wanted]), into=into)
    return {entry.name: entry for entry in entries}


def _met(want: _Wanted, there: dict[str, Entry]) -> Iterator[Entry]:
    path = "/".join(want.path)
    if _is_glob(path):
        yield from (entry for name, entry in there.items() if _fits(name.split("/"), want.path))
    elif path in there:
        yield there[path]
    else:
        raise DataError(f"{want.root.rstrip('/')}/{path}: no such shard", f"check the pattern {want.said}")


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (_is_met(parts[0], "*") and _fits(parts[1:], pattern))
    return _is_met(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _may_hold(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a folder may be on the way to files whose own folders fit a pattern."""
    if not folder or not pattern:
        return not folder
    if pattern[0] == "**":
        return _may_hold(folder, pattern[1:]) or (_is_met(folder[0], "*") and _may_hold(folder[1:], pattern))
    return _is_met(folder[0], pattern[0]) and _may_hold(folder[1:], pattern[1:])


def _is_met(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _common_start(names: list[str]) -> str:
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return re.split(r"[*?\[]", low[:same], maxsplit=1)[0]


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")
