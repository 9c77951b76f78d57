"""`lathe ema`: an average of any length, made after the training from snapshots of some.

Karras et al. 2024 (https://arxiv.org/abs/2312.02696, section 3.2): the profile that is wanted is fitted by those that
were stored, and the weights are combined as the profiles are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from pipeline.config import sigma_rel_problem
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint
from pipeline.train.checkpoint import COMPLETE, CONFIG, DONE, FORMAT_VERSION, FROZEN, RUN, Checkpoint, as_json, noted
from pipeline.train.ema_profiles import Fit, fit
from pipeline.train.optimizer import average_key, average_name
from pipeline.train.snapshots import snapshot_store

MADE = "reconstruction.json"
"""Marks a checkpoint as made here, where it may be replaced: a training's never has it."""
_KEY = average_key("post_hoc")
_POOR_FIT = 0.05
_USELESS_FIT = 0.2
"""Of the profile's norm. Taking the stored average of the neighbouring length as it is comes about as near."""
_STEEPEST = 300.0
"""Sum of the coefficients' sizes. Stored averages, float32 after thousands of updates, are off by up to 5e-6 of the
weights (measured over 50,000); this makes it 1e-3 of them."""


@dataclass(frozen=True)
class Reconstruction:
    """What was made, and how well."""

    sigma_rel: float
    step: int
    snapshots: int  # that it is made of
    error: float  # of the profile, relative to its L2 norm
    output: str

    def __str__(self) -> str:
        said = (
            f"the average of length {self.sigma_rel:g} at step {self.step} from {self.snapshots} snapshots,"
            f" its profile matched to {self.error:.2g}: {self.output}"
        )
        if self.error > _POOR_FIT:
            said += (
                f"\n  more than {_POOR_FIT:g} is a poor match: take a length nearer to those of ema.averages, or"
                " snapshots more often"
            )
        return said


@dataclass(frozen=True)
class _Stored:
    """One average of one snapshot."""

    snapshot: Checkpoint
    key: str
    updates: int  # of the weights until then
    sigma_rel: float


def reconstruct(
    run: str,
    sigma_rel: float,
    output: str,
    at: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Write the average of length `sigma_rel` as a run that can be sampled, evaluated and exported, not trained.

    Args:
        run: the training's output.
        sigma_rel: 0.001 to 0.2886.
        output: folder or s3:// prefix; an average that was made there before is replaced.
        at: the training's step that it is of; it has a snapshot. None = the newest.
        progress: called with (snapshots read, snapshots to read).

    Raises:
        ConfigError: a length that no profile has, or that the snapshots cannot make; an output that holds something
            else. What was made before is still there.
        DataError: no snapshots, none of that step, or snapshots that are damaged.
        StorageError: a place cannot be read or written.
    """
    if problem := sigma_rel_problem(sigma_rel):
        raise ConfigError(f"--sigma-rel {problem}", "give a share of the training from 0.03 to 0.2")
    destination = open_store(output)
    earlier = _made_before(destination)
    snapshots = _snapshots(run, at)
    stored = list(_stored(snapshots))
    newest = max(one.updates for one in stored)
    found = fit(
        np.array([one.updates for one in stored], np.float64),
        np.array([one.sigma_rel for one in stored]),
        newest,
        sigma_rel,
    )
    refuse_useless(found, sigma_rel, [one.sigma_rel for one in stored], len(snapshots))
    terms = _terms(stored, found)
    result = Reconstruction(sigma_rel, snapshots[0].step, len(terms), found.error, destination.url)
    shapes = _shapes([snapshot for snapshot, _ in terms])
    weights = checkpoint.combine(_told(terms, progress), shapes)
    for old in earlier:
        checkpoint.clear(destination, old)
    _write(destination, snapshots[0], weights, result)
    return result


def _made_before(destination: Store) -> list[str]:
    """Names of the checkpoints to replace, by the names of their files alone: they may be damaged."""
    files = {entry.name for entry in destination.list("step-")}
    found = {name for name in (file.partition("/")[0] for file in files) if checkpoint.is_name(name)}
    if any(f"{name}/{COMPLETE}" in files and f"{name}/{MADE}" not in files for name in found):
        raise ConfigError(
            f"--output {destination.url} holds checkpoints of a training", "give a folder or prefix of its own"
        )
    return sorted(name for name in found if f"{name}/{MADE}" in files)


def refuse_useless(found: Fit, sigma_rel: float, lengths: Sequence[float], snapshots: int) -> None:
    """Raise ConfigError where a combination is not the average that was asked for, or magnifies rounding."""
    steepness = float(abs(found.coefficients).sum())
    if found.error <= _USELESS_FIT and steepness <= _STEEPEST:
        return
    told = " and ".join(f"{length:g}" for length in sorted(set(lengths)))
    raise ConfigError(
        f"--sigma-rel {sigma_rel:g} cannot be made of {snapshots} snapshots of length {told}: the profile is matched"
        f" to {found.error:.2g} (at most {_USELESS_FIT:g}) by coefficients of {steepness:.3g} in all (at most"
        f" {_STEEPEST:g})",
        "give a length nearer to those, or train with ema.snapshot_every smaller or lengths further apart",
    )


def _snapshots(run: str, at: int | None) -> list[Checkpoint]:
    """The snapshots up to that step, newest first."""
    found = checkpoint.find(snapshot_store(open_store(run)))
    if not found:
        raise DataError(
            f"{run} holds no snapshots of averages",
            "give the output of a training that had ema.snapshot_every and an average with sigma_rel",
        )
    steps = [snapshot.step for snapshot in found]
    if at is not None and at not in steps:
        near = sorted(steps, key=lambda step: abs(step - at))[:2]
        raise DataError(
            f"{run} has no snapshot of step {at}; they reach from step {steps[-1]} to step {steps[0]}",
            f"give --at {' or --at '.join(map(str, sorted(near)))}",
        )
    return [snapshot for snapshot in found if at is None or snapshot.step <= at]


def _stored(snapshots: Sequence[Checkpoint]) -> Iterator[_Stored]:
    for snapshot in snapshots:
        run, config = snapshot.run(), yaml.safe_load(snapshot.read(CONFIG))
        lengths = {average["name"]: average["sigma_rel"] for average in config["ema"]["averages"]}
        for key in run["keys"]:
            yield _Stored(snapshot, key, run["counters"]["optimizer_step"], lengths[average_name(key)])


def _terms(stored: Sequence[_Stored], found: Fit) -> list[tuple[Checkpoint, dict[str, float]]]:
    """The snapshots that are needed, with the coefficients of their averages."""
    terms: dict[str, tuple[Checkpoint, dict[str, float]]] = {}
    for one, coefficient in zip(stored, found.coefficients.tolist(), strict=True):
        if coefficient:
            terms.setdefault(one.snapshot.name, (one.snapshot, {}))[1][one.key] = coefficient
    return list(terms.values())


def _told(
    terms: Sequence[tuple[Checkpoint, dict[str, float]]], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Checkpoint, dict[str, float]]]:
    for number, term in enumerate(terms, start=1):
        yield term
        if progress:
            progress(number, len(terms))


def _shapes(snapshots: Sequence[Checkpoint]) -> dict[str, list[int]]:
    """Of every parameter, the same in all snapshots."""
    first, *others = snapshots
    shapes: dict[str, list[int]] = first.run()["parameters"]
    for other in others:
        if other.run()["parameters"] != shapes:
            raise DataError(
                f"{other.store.url}/{other.name} is of another model than {first.name}",
                "delete the snapshots of the other model",
            )
    return shapes


def _write(store: Store, snapshot: Checkpoint, weights: dict[str, Tensor], result: Reconstruction) -> None:
    """A checkpoint of one rank with this average alone; the rest is as in the snapshot of its step."""
    run: dict[str, Any] = {**snapshot.run(), "format_version": FORMAT_VERSION, "keys": [_KEY]}
    name, stem = checkpoint.step_name(result.step), "rank-00000-of-00001"
    tensors = tensor_bytes({f"{parameter}:0:{_KEY}": whole.flatten() for parameter, whole in weights.items()})
    index = [(parameter, 0, whole.numel()) for parameter, whole in weights.items()]
    done = {"file": f"{stem}.safetensors", **noted(tensors), "fragments": index, "notes": {}}
    texts = {file: snapshot.read(file) for file in snapshot.files if _is_text(file)}
    contents = {
        MADE: as_json(asdict(result)),
        **texts,
        FROZEN: snapshot.read(FROZEN),
        RUN: as_json(run),
        f"{stem}.safetensors": tensors,
        f"{stem}{DONE}": as_json(done),
    }
    checkpoint.clear(store, name)
    for file, data in contents.items():
        store.write(f"{name}/{file}", data)
    store.write(f"{name}/{COMPLETE}", as_json({"files": {file: noted(data) for file, data in contents.items()}}))


def _is_text(file: str) -> bool:
    return not file.endswith((".safetensors", DONE)) and file != RUN
