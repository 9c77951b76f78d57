"""Which kind of run stands at an address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.manifest import ENCODING, MANIFEST, RECEIPT_SUFFIX, REJECTS
from pipeline.errors import DataError, StorageError
from pipeline.metrics import LOG, PARTS, LogFollower
from pipeline.operate.runs.record import DamagedError, read_record
from pipeline.storage import GIVE_UP_VARIABLE, RETRY_VARIABLE, Entry, Store, local_path, open_store, split

Kind = Literal["train", "first_stage", "encode"]
KINDS: dict[Kind, str] = {"train": "training", "first_stage": "first stage", "encode": "encode job"}
"""As a person calls them."""
RUN_FILE, STARTS, MARKER = "run.yaml", "starts.json", "first_stage.json"
_WANTED = "give the output of lathe train, train-vae or encode: a folder or an s3:// prefix"
_GIVE_UP_SECONDS = "5"  # who looks is told soon that a server is away
SHEET = re.compile(r"samples/step-(\d{8,})\.png")
_FOLDERS = re.compile(r"step-\d{8,}|checkpoints(/step-\d+)?|samples|metrics|\d+")
_FILES = re.compile(
    rf"{LOG}|{RUN_FILE}|{STARTS}|{MARKER}|{MANIFEST}|{ENCODING}|{REJECTS}|lease\.json|.*{RECEIPT_SUFFIX}"
)
_CHECKPOINT, _FIRST_STAGE = re.compile(r"step-\d{8,}/"), re.compile(r"checkpoints/step-\d+/")
_ENCODED = re.compile(rf"(\d+/)?({re.escape(ENCODING)}|{re.escape(MANIFEST)})|[^/]*{re.escape(RECEIPT_SUFFIX)}")
_OF_CHECKPOINTS = {"complete.json", "run.json", "state.safetensors"}
_SUBFOLDERS = "checkpoints|ema"  # that hold some in a run
_FEW = 6


@dataclass(frozen=True)
class Listing:
    """What an output holds."""

    entries: Sequence[Entry]
    left_out: dict[str, str] = field(default_factory=dict)
    """Names that runs have, of what is no file or cannot be listed, and why."""


@dataclass(frozen=True)
class Found:
    """A run, and what its output holds."""

    address: str
    kind: Kind
    store: Store
    listing: Listing


def find(address: str) -> Found:
    """The run at an address: of its output, or of a file in it.

    Raises:
        StorageError: nothing is there, or it cannot be read.
        DataError: it is no run; what it holds is named.
    """
    url = _folder_of(address)
    store = open_to_look(url)
    listing = list_run(store)
    names = {entry.name for entry in listing.entries}
    if names & _OF_CHECKPOINTS:
        run = re.sub(f"/({_SUBFOLDERS})$", "", split(url)[0])
        raise DataError(f"{address} is a checkpoint of a run", f"give {run}")
    kind = _kind(store, listing)
    if kind is None:
        raise _no_run(address, url)
    return Found(address, kind, store, listing)


def list_run(store: Store, *, known: bool = False) -> Listing:
    """The files of an output, in the folders that runs have; of a run that is `known`, whatever is fastest.

    Raises:
        StorageError: it cannot be read.
    """
    if known and "://" in store.url:  # a request for each folder, or one for a thousand files
        return Listing(store.list())
    left_out: dict[str, str] = {}

    def note(name: str, why: str) -> None:
        if _is_of_runs(name) or _FOLDERS.fullmatch(name):
            left_out[name] = why

    def into(name: str) -> bool:
        if _is_of_runs(name):
            note(name, "a folder, and no file")
        return _FOLDERS.fullmatch(name) is not None

    return Listing(store.list(into=into, left_out=note), left_out)


def _is_of_runs(name: str) -> bool:
    return bool(_FILES.fullmatch(name) or SHEET.fullmatch(name))


def open_to_look(url: str) -> Store:
    """A store, as whoever looks at runs opens it: a server that is away is told soon, unless the user is patient."""
    return open_store(url, {} if RETRY_VARIABLE in os.environ else {GIVE_UP_VARIABLE: _GIVE_UP_SECONDS})


def _folder_of(address: str) -> str:
    """An address without the file at its end, where one was given that runs have."""
    name = address.rstrip("/").rpartition("/")[2]
    is_file = _FILES.fullmatch(name) is not None and not ("://" not in address and local_path(address).is_dir())
    return split(address)[0] if is_file else address


def _kind(store: Store, listing: Listing) -> Kind | None:
    names = {*(entry.name for entry in listing.entries), *listing.left_out}
    if any(_ENCODED.fullmatch(name) for name in names):
        return "encode"
    if MARKER in names or any(_FIRST_STAGE.match(name) for name in names):
        return "first_stage"
    if any(_CHECKPOINT.match(name) for name in names):
        return "train"
    if RUN_FILE in names and (kind := _job(store)):
        return kind
    parts = [entry for entry in listing.entries if entry.name.startswith(PARTS)]
    if LOG in names or parts:
        return _kind_of_log(store, parts)
    return "train" if "lease.json" in names else None


def _job(store: Store) -> Kind | None:
    try:
        tree = read_record(store, RUN_FILE)
    except DamagedError:
        return None
    except StorageError:  # of a folder it is told later, beside what can be read
        if "://" in store.url:
            raise
        return None
    jobs: dict[object, Kind] = {"train": "train", "train-vae": "first_stage"}
    return jobs.get(tree.get("job")) if isinstance(tree, dict) else None


def _kind_of_log(store: Store, parts: Sequence[Entry]) -> Kind:
    """By what only the first stage logs; a log without a line is of a training that was just begun."""
    try:
        first = next(LogFollower(store).lines(parts[:1]), {})
    except OSError as error:
        raise StorageError(f"{store.url}/{LOG}: {error.strerror}", "mend its rights") from error
    return "first_stage" if "reconstruction_loss" in first else "train"


def _no_run(address: str, url: str) -> Exception:
    store = open_to_look(url)
    left_out: list[str] = []
    entries = store.list(into=lambda name: "/" not in name, left_out=lambda name, _: left_out.append(name))
    there = sorted({re.sub("/.*", "/", name) for name in [*(entry.name for entry in entries), *left_out]})
    if not there:
        if "://" not in url and local_path(url).is_file():
            return DataError(f"{address} is a file, and no run", _WANTED)
        if "://" not in url and local_path(url).is_dir():
            return DataError(f"{address} is empty: nothing has run there yet", _WANTED)
        return StorageError(f"{address}: nothing is there", "check the address")
    runs = [name for name in there if name.endswith("/") and _is_run(f"{url.rstrip('/')}/{name[:-1]}")]
    if runs:
        return DataError(
            f"{address} is no run, but holds some: {_few(runs)}", f"give one of them: {url}/{runs[0][:-1]}"
        )
    return DataError(f"{address} is no run; it holds {_few(there)}", _WANTED)


def _is_run(url: str) -> bool:
    store = open_to_look(url)
    return _kind(store, list_run(store)) is not None


def _few(names: Iterable[str]) -> str:
    shown = [name.rstrip("/") for name in names]
    return ", ".join(shown[:_FEW]) + (", ..." if len(shown) > _FEW else "")
