"""`lathe inspect`: what stands at an address, told to a person. Of large files only headers and beginnings are read."""

from __future__ import annotations

import json
import re

from pipeline.data.manifest import MANIFEST, RECEIPT_SUFFIX, load_receipt, parse_manifest
from pipeline.data.pack import attribution
from pipeline.errors import DataError, StorageError
from pipeline.operate.description import Description, Section, Size
from pipeline.operate.model_contents import (
    describe_autoencoder,
    describe_checkpoint,
    describe_pipeline,
    describe_run,
    describe_tensors,
)
from pipeline.operate.record_contents import (
    describe_manifest,
    describe_receipt,
    describe_resolutions,
    describe_unfinished,
)
from pipeline.operate.shard_contents import describe_shard
from pipeline.storage import Entry, Store, local_path, open_store, split

_FILES = (".json", ".tar", ".safetensors")
_KNOWN = "give a manifest, receipt, shard (.tar), run, checkpoint, autoencoder or pipeline, or a folder of shards"
_STEP = re.compile(r"step-\d{8,}")
_SHARDS = (".tar", ".tar.gz", ".tgz")


def describe(url: str, *, samples: int = 6, as_json: bool = False) -> str:
    """What stands at an address: manifest, receipt, shards, checkpoint, run, autoencoder or exported pipeline.

    Args:
        url: a local path or an s3:// address, of a file or a folder.
        samples: of a shard, how many of the first samples are shown.
        as_json: for programs: the same facts, with bytes and counts as plain numbers.

    Raises:
        DataError: nothing that Lathe knows, or it is damaged.
        StorageError: nothing is there, or it cannot be read.
    """
    is_file = url.endswith(_FILES) and not ("://" not in url and local_path(url).is_dir())
    found = _file(url, samples) if is_file else _folder(url, samples)
    return found.json() if as_json else found.text()


def _file(url: str, samples: int) -> Description:
    parent, name = split(url)
    store = open_store(parent)
    sizes = {entry.name: entry.size for entry in store.list(name)}
    if name not in sizes:
        raise StorageError(f"{url}: no such file", "check the address")
    if name.endswith(".tar"):
        return describe_shard(store, name, sizes[name], samples)
    if name.endswith(".safetensors"):
        return describe_tensors(store, name, sizes[name])
    if name.endswith(RECEIPT_SUFFIX):
        return describe_receipt(url, load_receipt(store, name))
    if name == MANIFEST:
        return describe_manifest(url, parse_manifest(store.read(name), url))
    return _record(store, name, url)


def _record(store: Store, name: str, url: str) -> Description:
    """A manifest or a receipt under another name, or a file that stands for its folder."""
    data = store.read(name)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is not JSON", _KNOWN) from error
    if isinstance(tree, dict) and {"fingerprint", "shards"} <= tree.keys():
        return describe_manifest(url, parse_manifest(data, url))
    if isinstance(tree, dict) and {"blocks", "source"} <= tree.keys():
        return describe_receipt(url, load_receipt(store, name))
    if name in ("model_index.json", "config.json", "complete.json", "run.json"):
        return _folder(store.url, 0)
    raise DataError(f"{url} is no record that Lathe knows", _KNOWN)


def _folder(url: str, samples: int) -> Description:
    store = open_store(url)
    entries = store.list()
    if not entries:
        is_file = "://" not in url and local_path(url).is_file()
        raise (
            DataError(f"{url} is a file that Lathe does not know", _KNOWN)
            if is_file
            else StorageError(f"{url}: nothing is there", "check the address")
        )
    sizes = {entry.name: entry.size for entry in entries}
    return _model(url, store, sizes) or _latents(url, store, entries) or _images(url, store, entries, samples)


def _model(url: str, store: Store, sizes: dict[str, int]) -> Description | None:
    name = url.rstrip("/").rpartition("/")[2]
    if _STEP.fullmatch(name):
        parent, name = split(url)
        return describe_checkpoint(open_store(parent), name, sizes)
    if any(_STEP.fullmatch(file.split("/")[0]) and "/" in file for file in sizes):
        return describe_run(store, sizes)
    if "model_index.json" in sizes:
        return describe_pipeline(store, sizes)
    if "config.json" in sizes and any(file.endswith(".safetensors") for file in sizes):
        return describe_autoencoder(store, sizes)
    steps = sorted(file.split("/")[1] for file in sizes if re.fullmatch(r"checkpoints/step-\d+/state\.json", file))
    if steps:
        facts = {"newest": steps[-1], "checkpoints": len(steps), "bytes": Size(sum(sizes.values()))}
        return Description("first stage in training", url, facts)
    return None


def _latents(url: str, store: Store, entries: list[Entry]) -> Description | None:
    names = {entry.name for entry in entries}
    if MANIFEST in names:
        where = f"{url.rstrip('/')}/{MANIFEST}"
        return describe_manifest(where, parse_manifest(store.read(MANIFEST), where))
    folders = [name.split("/")[0] for name in names if re.fullmatch(rf"\d+/{re.escape(MANIFEST)}", name)]
    if folders:
        return describe_resolutions(url, sorted(folders, key=lambda folder: (len(folder), folder)))
    if any(name.endswith(RECEIPT_SUFFIX) for name in names) or "encoding.json" in names:
        return describe_unfinished(url, entries)
    return None


def _images(url: str, store: Store, entries: list[Entry], samples: int) -> Description:
    shards = [entry for entry in entries if entry.name.endswith(_SHARDS) and "/" not in entry.name]
    if not shards:
        there = sorted({re.sub("/.*", "/", entry.name) for entry in entries})
        some = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "")
        raise DataError(f"{url} is no folder that Lathe knows; it holds {some}", _KNOWN)
    facts = {
        "shards": len(shards),
        "bytes": Size(sum(entry.size for entry in shards)),
        "first": shards[0].name,
        "last": shards[-1].name,
        "attribution": attribution(store),
    }
    sections: list[Section] = []
    if shards[0].name.endswith(".tar"):
        first = describe_shard(store, shards[0].name, shards[0].size, samples)
        facts["samples_of_the_first"] = first.facts["samples"]
        sections = first.sections
    return Description("image shards", url, facts, sections)
