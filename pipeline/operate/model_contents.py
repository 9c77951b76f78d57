"""Checkpoints, runs, autoencoders and exported pipelines for a person, from their headers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import DataError
from pipeline.operate.description import Description, Section, Size
from pipeline.operate.runs.record import DamagedError, read_record, tree_of
from pipeline.storage import Store

_MANIFEST = re.compile(r"manifest(-\d+)?\.json")
_RANK = re.compile(r"rank-(\d+)-of-(\d+)\.(done\.json|safetensors)")
_LONGEST_HEADER = 100 << 20  # safetensors' own bound
_MOST_ROWS = 12
_MOST_LEVELS = 64  # of an autoencoder; dimensions of a tensor
_MOST_VALUES = 1 << 63  # of a tensor


@dataclass
class _Tensors:
    """What files of safetensors hold."""

    parameters: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "dtypes": sorted(self.dtypes), "weights_bytes": Size(self.bytes)}


def describe_tensors(store: Store, name: str, size: int, rows: int = _MOST_ROWS) -> Description:
    """One safetensors file. Raises DataError when its header cannot be used."""
    header = _header(store, name, size)
    shown = [(key, tensor["dtype"], " x ".join(map(str, tensor["shape"]))) for key, tensor in header.items()]
    section = Section("tensors", ("name", "dtype", "shape"), shown[:rows], max(len(shown) - rows, 0))
    facts = {"tensors": len(header), **_tensors(store, {name: size}).facts}
    return Description("weights", _join(store, name), facts, [section])


def describe_autoencoder(store: Store, sizes: Mapping[str, int]) -> Description:
    """A folder of diffusers' AutoencoderKL. `sizes`: bytes by name of its files."""
    config = _json(store, "config.json")
    levels = config.get("block_out_channels")
    levels = levels if isinstance(levels, list) and len(levels) < _MOST_LEVELS else []
    facts = {
        "class": config.get("_class_name"),
        "latent_channels": config.get("latent_channels"),
        "downsampling_factor": 2 ** (len(levels) - 1) if levels else None,
        "scaling_factor": config.get("scaling_factor"),
        "shift_factor": config.get("shift_factor"),
        "widths": levels,
        **_tensors(store, {name: size for name, size in sizes.items() if "/" not in name}).facts,
    }
    if "first_stage.json" in sizes:  # trained by Lathe
        trained = _json(store, "first_stage.json")
        facts |= {name: trained.get(name) for name in ("steps", "pictures", "psnr_db", "psnr_on", "weights_hash")}
    return Description("autoencoder", store.url, facts)


def describe_pipeline(store: Store, sizes: Mapping[str, int]) -> Description:
    """A folder that diffusers opens as a pipeline."""
    index = _json(store, "model_index.json")
    rows: list[tuple[Any, ...]] = []
    for name, kind in index.items():
        if isinstance(kind, list) and len(kind) == 2 and kind[1]:
            files = {file: size for file, size in sizes.items() if file.startswith(f"{name}/")}
            found = _tensors(store, files)
            rows.append(
                (name, str(kind[1]), found.parameters, " ".join(sorted(found.dtypes)), Size(sum(files.values())))
            )
    facts = {
        "class": index.get("_class_name"),
        "diffusers": index.get("_diffusers_version"),
        "parameters": sum(row[2] for row in rows),
        "bytes": Size(sum(sizes.values())),
    }
    section = Section("components", ("name", "class", "parameters", "dtype", "bytes"), rows)
    return Description("diffusers pipeline", store.url, facts, [section])


def describe_run(store: Store, sizes: Mapping[str, int]) -> Description:
    """A training's output: its checkpoints, and the newest that is complete."""
    from pipeline.train import checkpoint  # imports torch: only who looks at runs waits for it

    complete = {found.name for found in checkpoint.find(store)}
    rows: list[tuple[Any, ...]] = []
    for name in sorted({file.split("/")[0] for file in sizes}, key=lambda name: (len(name), name), reverse=True):
        if checkpoint.is_name(name):
            total = sum(size for file, size in sizes.items() if file.startswith(f"{name}/"))
            rows.append((name, name in complete, Size(total)))
    newest = next((name for name, whole, _ in rows if whole), None)
    facts: dict[str, Any] = {"checkpoints": len(rows), "complete": len(complete), "newest": newest}
    section = Section("checkpoints", ("name", "complete", "bytes"), rows[:_MOST_ROWS], max(len(rows) - _MOST_ROWS, 0))
    sections = [section]
    if newest:
        facts |= _checkpoint_facts(store, newest)
        sections.append(data_sets_of(store, newest))
    return Description("training run", store.url, facts, sections)


def describe_checkpoint(store: Store, name: str, sizes: Mapping[str, int]) -> Description:
    """One checkpoint of a run: `sizes` are of its files, by their names within it."""
    from pipeline.train import checkpoint

    ranks = [found for file in sizes if (found := _RANK.fullmatch(file))]
    world_size = max((int(found[2]) for found in ranks), default=0)
    done = sum(found[3] == "done.json" for found in ranks)
    try:
        checkpoint.open_checkpoint(store, name)
        state = "yes"
    except DataError:
        missing = f"{done} of {world_size} ranks were done" if world_size else "no rank was done"
        state = f"no: {missing}" if checkpoint.COMPLETE not in sizes else "no: a file is missing or cut"
    facts = {"complete": state, "ranks": world_size, "bytes": Size(sum(sizes.values()))}
    sections = []
    if checkpoint.RUN in sizes:
        facts |= _checkpoint_facts(store, name)
        sections.append(data_sets_of(store, name))
    files = [(file, Size(size)) for file, size in sorted(sizes.items())]
    sections.append(Section("files", ("name", "bytes"), files[:_MOST_ROWS], max(len(files) - _MOST_ROWS, 0)))
    return Description("checkpoint", _join(store, name), facts, sections)


def _checkpoint_facts(store: Store, name: str) -> dict[str, Any]:
    """Of run.json, as far as it can be read."""
    run = _json(store, f"{name}/run.json")
    shapes, counters, keys = run.get("parameters"), run.get("counters"), run.get("keys")
    return {
        "format_version": run.get("format_version"),
        "counters": counters if isinstance(counters, dict) else {},
        "parameters": sum(math.prod(shape) for shape in shapes.values() if _is_shape(shape))
        if isinstance(shapes, dict)
        else None,
        "averages": [key.removeprefix("ema.") for key in keys if isinstance(key, str) and key.startswith("ema.")]
        if isinstance(keys, list)
        else None,
    }


def data_sets_of(store: Store, name: str) -> Section:
    """What a checkpoint was trained on, by the manifests and the run file beside it, as far as they can be read."""
    found = {entry.name.rpartition("/")[2] for entry in store.list(f"{name}/manifest")}
    manifests = sorted(filter(_MANIFEST.fullmatch, found), key=lambda file: (len(file), file))
    parts = _parts(store, f"{name}/config.yaml")
    rows = []
    for number, file in enumerate(manifests):
        latents = _json(store, f"{name}/{file}")
        images, made = latents.get("images"), latents.get("fingerprint")
        rows.append(
            (
                images if isinstance(images, list) else [images] if images else [],
                _training_samples(latents.get("shards")),
                parts[number] if len(parts) == len(manifests) else None,
                made.get("resolution") if isinstance(made, dict) else None,
                latents.get("content_hash"),
                latents.get("attribution"),
            )
        )
    columns = ("images", "training_samples", "part", "resolution", "content_hash", "attribution")
    return Section("data sets", columns, rows[:_MOST_ROWS], max(len(rows) - _MOST_ROWS, 0))


def _parts(store: Store, config: str) -> list[str]:
    """What part of each data set takes part, in words; empty where the run file cannot be read."""
    if not store.exists(config):
        return []
    try:
        sources = TrainConfig.model_validate(read_record(store, config)).sources
    except ValueError:
        return []
    return [source.part_in_words or "all" for source in sources]


def _training_samples(shards: Any) -> int | None:
    try:
        return sum(int(bucket["train"]) for shard in shards for bucket in shard["buckets"])
    except (TypeError, KeyError, ValueError):
        return None


def _tensors(store: Store, sizes: Mapping[str, int]) -> _Tensors:
    found = _Tensors()
    for name, size in sorted(sizes.items()):
        if name.endswith(".safetensors"):
            found.bytes += size
            for tensor in _header(store, name, size).values():
                found.parameters += math.prod(tensor["shape"])
                found.dtypes[tensor["dtype"]] += 1
    return found


def _header(store: Store, name: str, size: int) -> dict[str, dict[str, Any]]:
    """dtype and shape of each tensor of a safetensors file: 8 bytes of length, then so much JSON."""
    length = int.from_bytes(store.read(name, 0, 8), "little")
    tensors = None
    if 2 <= length <= min(_LONGEST_HEADER, size - 8):
        tree = _parsed(store.read(name, 8, 8 + length))
        tensors = {key: tensor for key, tensor in tree.items() if key != "__metadata__"}
    if tensors is None or not all(_is_tensor(tensor) for tensor in tensors.values()):
        raise DataError(f"{_join(store, name)} is not safetensors, or damaged", "fetch or write it again")
    return tensors


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("dtype"), str) and _is_shape(value.get("shape"))


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) < _MOST_LEVELS
        and all(isinstance(side, int) and 0 <= side < _MOST_VALUES for side in value)
        and math.prod(value) < _MOST_VALUES
    )


def _json(store: Store, name: str) -> dict[str, Any]:
    tree = _parsed(store.read(name))
    if not tree:
        raise DataError(f"{_join(store, name)} is not a JSON object", "fetch or write it again")
    return tree


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        tree = tree_of(data)
    except DamagedError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _join(store: Store, name: str) -> str:
    return f"{store.url.rstrip('/')}/{name}"
