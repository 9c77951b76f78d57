"""The small files that runs leave, as trees: whatever became of them, they are read in bounded time and memory."""

from __future__ import annotations

import json
from typing import Any

import yaml

from pipeline.errors import StorageError
from pipeline.storage import Store

_MOST_BYTES = 16 << 20  # of ours some kB; a thousand starts are 1 MB
_MOST_YAML = 1 << 20  # PyYAML takes 10 s for it
_DEEPEST = 40
_LARGEST_INTEGER = 1 << 1000  # that a float has, and that can be printed


class DamagedError(ValueError):
    """What was read is no tree of ours."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases, by which few lines may be a tree without an end; it is left where it is nested too deep."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise DamagedError("it has an alias")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise DamagedError("it is nested too deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_record(store: Store, name: str) -> Any:
    """The tree in a file of a run, YAML or JSON by its name.

    Raises:
        StorageError: it cannot be read.
        DamagedError: it is too large, no tree, nested too deep, or has numbers that nobody counts to.
    """
    data = store.read(name, 0, _MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DamagedError("it is too large")
    return tree_of(data, is_yaml=name.endswith(".yaml"))


def read_or_tell(store: Store, name: str, kind: type, problems: list[str]) -> Any:
    """A record of a kind, dict or list; None where it cannot be used, which is added to `problems`.

    Raises:
        StorageError: S3 does not give it.
    """
    try:
        tree = read_record(store, name)
    except DamagedError:
        tree = None
    except StorageError as error:
        if store.exists(name):  # else deleted since it was listed, as checkpoints are
            problems.append(cannot_read(store, name, error))
        return None
    if not isinstance(tree, kind):
        problems.append(f"{name} is damaged, and left out")
        return None
    return tree


def cannot_read(store: Store, name: str, error: StorageError) -> str:
    """What is told of a file that a folder does not give; of S3, which may be away, the error is raised."""
    if "://" in store.url:
        raise error
    return f"{name} cannot be read, and is left out: {error.message.rpartition(': ')[2]}"


def tree_of(data: bytes, *, is_yaml: bool = False) -> Any:
    """A tree from its bytes. Raises DamagedError."""
    try:
        if is_yaml and len(data) > _MOST_YAML:
            raise DamagedError("it is too large")
        text = data.decode("utf-8", "replace")
        tree = yaml.load(text, _Loader) if is_yaml else json.loads(text)  # noqa: S506  it is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    level = [tree]
    for _ in range(_DEEPEST):
        if any(isinstance(one, int) and abs(one) >= _LARGEST_INTEGER for one in level):
            raise DamagedError("it has a number that nobody counts to")
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return tree
    raise DamagedError("it is nested too deep")


def _inside(one: Any) -> list[Any]:
    if isinstance(one, dict):
        return [*one, *one.values()]
    return list(one) if isinstance(one, list | tuple | set) else []
