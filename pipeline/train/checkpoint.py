"""A run on disk: every rank writes its own fragments, and a checkpoint counts once its completion marker has landed.

    step-00001000/
      config.yaml                          the resolved run file
      engine.json                          the engine's whole configuration: DeepSpeed's own
      latents.json                         what the order depends on, latent mean and std, names of the manifests
      manifest.json                        of the latents, more as manifest-1.json: fingerprint, shards, autoencoder
      run.json                             step, counters, shape of every parameter, the KEYs
      frozen.safetensors                   parameters that are not trained, and buffers
      rank-00000-of-00002.safetensors      tensors "PARAMETER:OFFSET:KEY", flat float32 fragments
      rank-00000-of-00002.done.json        its size and SHA-256, its fragments, and what the rank noted
      complete.json                        size and SHA-256 of every file above; written last

KEY is `weight` (the float32 master) or a state of the optimizer: `exp_avg`, `exp_avg_sq`, `ema.NAME` for each average.
Everything opens without DeepSpeed, and nothing is pickled. Randomness and data order are functions of the step, so the
step restores them. Snapshots of averages (`pipeline.train.snapshots`) and what `lathe ema` makes of them
(`pipeline.train.post_hoc`) are checkpoints that hold averages alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from torch import Tensor

from pipeline.errors import DataError, StorageError
from pipeline.storage import Store
from pipeline.train.optimizer import average_name

FORMAT_VERSION = 3
COMPLETE, RUN, FROZEN = "complete.json", "run.json", "frozen.safetensors"
CONFIG, ENGINE = "config.yaml", "engine.json"
DONE = ".done.json"
WEIGHT, RAW = "weight", "raw"
"""The key of the weights themselves, and what they are called where averages have names."""
_NAME = re.compile(r"step-\d{8,}(?=/|$)")
_log = logging.getLogger(__name__)


class DamagedError(DataError):
    """A checkpoint's file is missing, or not what its completion marker says."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and its marker: file name -> {"size", "sha256"}."""

    store: Store
    name: str
    files: dict[str, dict[str, Any]]

    @property
    def step(self) -> int:
        """Steps that the run had done."""
        return step_of(self.name)

    def read(self, file: str) -> bytes:
        """One file, checked against the marker. Raises DamagedError."""
        where = f"{self.store.url}/{self.name}/{file}"
        if file not in self.files:
            raise DamagedError(f"{where} is not part of the checkpoint", "use another checkpoint")
        data = self.store.read(f"{self.name}/{file}")
        if hashlib.sha256(data).hexdigest() != self.files[file]["sha256"]:
            raise DamagedError(f"{where} is damaged: its SHA-256 is not the one noted", "use the checkpoint before it")
        return data

    def run(self) -> dict[str, Any]:
        """Step, counters and parameter shapes: `run.json`."""
        tree: dict[str, Any] = json.loads(self.read(RUN))
        if (version := tree["format_version"]) != FORMAT_VERSION:
            raise DataError(
                f"{self.store.url}/{self.name} has format version {version}, this Lathe reads version {FORMAT_VERSION}",
                "install a newer lathe-ldm" if version > FORMAT_VERSION else "train into another output",
            )
        return tree

    def fragment_files(self) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
        """Each rank's file with its fragments: (parameter, offset, length)."""
        for file in sorted(f for f in self.files if f.endswith(DONE)):
            done = json.loads(self.read(file))
            yield done["file"], [(name, offset, length) for name, offset, length in done["fragments"]]

    def notes(self) -> list[dict[str, Any]]:
        """What each rank noted of itself."""
        return [json.loads(self.read(file))["notes"] for file in sorted(f for f in self.files if f.endswith(DONE))]


def step_name(step: int) -> str:
    """`step-00001000`, the folder of a checkpoint."""
    return f"step-{step:08d}"


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def find(store: Store, *, warn: bool = True) -> list[Checkpoint]:
    """The complete checkpoints of a run, newest first: those with a marker, and every file in its size.

    One with a marker and a file missing is left out, with a warning where `warn` says so.
    """
    sizes = {entry.name: entry.size for entry in store.list("step-")}
    names = {name.split("/")[0] for name in sizes if _NAME.match(name)}
    log = _log.warning if warn else _log.debug
    found = (_read_marker(store, name, sizes, log) for name in sorted(names, key=step_of, reverse=True))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def latest(store: Store) -> str | None:
    """Name of the newest complete checkpoint, such as `step-00001000`; None where there is none."""
    return next((checkpoint.name for checkpoint in find(store)), None)


def open_checkpoint(store: Store, name: str) -> Checkpoint:
    """A complete checkpoint by name. Raises DataError when it is not complete, or not there."""
    sizes = {entry.name: entry.size for entry in store.list(f"{name}/")}
    checkpoint = _read_marker(store, name, sizes, _log.warning)
    if checkpoint is None:
        raise DataError(
            f"{store.url}/{name} is not a complete checkpoint", "give the run's folder to take its newest one"
        )
    return checkpoint


def _read_marker(store: Store, name: str, sizes: Mapping[str, int], log: Callable[..., None]) -> Checkpoint | None:
    """The checkpoint, if its marker and every file that the marker names are there."""
    marker = f"{name}/{COMPLETE}"
    if marker not in sizes:
        return None
    try:
        files = json.loads(store.read(marker))["files"]
        noted_sizes = {f"{name}/{file}": noted["size"] for file, noted in files.items() if noted["sha256"]}
    except StorageError:
        if store.exists(marker):
            raise
        return None  # retired by the run that owns it, after it was listed
    except (ValueError, KeyError, TypeError, AttributeError):
        log("%s/%s: its completion marker cannot be read; it is passed over", store.url, name)
        return None
    wrong = [file for file, size in noted_sizes.items() if sizes.get(file) != size]
    if wrong:
        log("%s/%s is missing or cut; the checkpoint is passed over", store.url, wrong[0])
        return None
    return Checkpoint(store, name, files)


def load_weights(store: Store, name: str, which: str = "") -> dict[str, Tensor]:
    """All parameters and buffers of a checkpoint as whole tensors, floats in float32. Needs no DeepSpeed.

    Args:
        store: the run's output.
        name: the checkpoint, as `latest` gives it.
        which: name of an average, or `raw` for the weights themselves; empty = the first average, raw where none is.

    Raises:
        DataError: there is no such average, a file is damaged, or parts of a parameter are missing.
    """
    checkpoint = open_checkpoint(store, name)
    run = checkpoint.run()
    there = _named_weights(run)
    which = which or default_weights(run)
    if which not in there:
        raise DataError(f"{store.url}/{name} has no weights named {which}", f"use one of: {', '.join(there)}")
    whole = combine([(checkpoint, {there[which]: 1.0})], run["parameters"])
    frozen = read_tensors(checkpoint.read(FROZEN))
    return {**whole, **{n: t.float() if t.is_floating_point() else t for n, t in frozen.items()}}


def default_weights(run: Mapping[str, Any]) -> str:
    """Which weights are meant where none are named: the first average of `run.json`, raw where there is none."""
    return next((name for name in _named_weights(run) if name != RAW), RAW)


def _named_weights(run: Mapping[str, Any]) -> dict[str, str]:
    """Keys by the names that they are asked for by."""
    return {average_name(key) or RAW: key for key in run["keys"] if key == WEIGHT or average_name(key)}


def combine(
    terms: Iterable[tuple[Checkpoint, Mapping[str, float]]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The sum over checkpoints and keys of coefficient times tensor, float32; one file is in memory at a time.

    Args:
        terms: checkpoints, and the coefficients of their keys.
        shapes: of every parameter, the same in all.

    Raises:
        DamagedError: a file is damaged, or parts of a parameter are missing.
    """
    flat = {parameter: torch.zeros(torch.Size(shape).numel()) for parameter, shape in shapes.items()}
    for checkpoint, coefficients in terms:
        filled = dict.fromkeys(flat, 0)
        for file, fragments in checkpoint.fragment_files():
            tensors = read_tensors(checkpoint.read(file))
            for parameter, offset, length in fragments:
                for key, coefficient in coefficients.items():
                    part = flat[parameter][offset : offset + length]
                    part.add_(tensors[f"{parameter}:{offset}:{key}"], alpha=coefficient)
                filled[parameter] += length
        missing = next((parameter for parameter, count in filled.items() if count != flat[parameter].numel()), None)
        if missing:
            where = f"{checkpoint.store.url}/{checkpoint.name}"
            raise DamagedError(f"{where}: parts of {missing} are missing", "use the checkpoint before it")
    return {parameter: tensor.reshape(torch.Size(shapes[parameter])) for parameter, tensor in flat.items()}


def step_of(name: str) -> int:
    """1000 of `step-00001000`."""
    return int(name.removeprefix("step-"))


def clear(store: Store, name: str) -> None:
    """Delete a checkpoint, complete or not; its marker goes first, so that what is left never looks whole."""
    files = [entry.name for entry in store.list(f"{name}/")]
    store.delete([f for f in files if f.endswith(f"/{COMPLETE}")])
    store.delete(files)
    store.sweep([file for file in store.leftovers() if file.startswith(f"{name}/")])


def noted(data: bytes) -> dict[str, Any]:
    """What the completion marker says of a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def as_json(value: Any) -> bytes:
    """A checkpoint's JSON file."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
