"""`init_from`: a new run that begins with the weights of another one, as 512 px training does after that at 256 px.

Optimizer, step, data, resolution and objective are the new run's; its averages begin at the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load as read_tensors
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError, LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train import checkpoint, sharded
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.optimizer import average_name
from pipeline.train.telling import say
from pipeline.train.trained_model import find_run, names_checkpoint
from pipeline.train.trained_on import trained_on

ORIGIN = "init_from.json"
"""What a checkpoint's run began with, among its files; none where it began at random."""


def origin_of(found: Checkpoint) -> dict[str, Any] | None:
    """What the run of a checkpoint began with. Raises DamagedError."""
    return json.loads(found.read(ORIGIN)) if ORIGIN in found.files else None


class Source(NamedTuple):
    """Weights to begin with."""

    found: Checkpoint
    key: str  # of their tensors, see `checkpoint.weights_key`
    weights: str = ""  # their name there
    learned: str = ""  # see `what_was_learned`
    others: str = ""  # see `what_was_other`


class _GoneError(DataError):
    """The checkpoint was deleted while it was read."""


def begin(config: TrainConfig, manifest: Manifest, process: Process, engine: Engine) -> dict[str, Any] | None:
    """Give a new run's engine the weights that `init_from` names, if it names any; all ranks call it.

    Where a run is named, and it deletes its newest checkpoint meanwhile, that is looked for again, once.

    Args:
        config: the run file, with the hashes of the towers that run.
        manifest: of the latents.
        process: this rank.
        engine: that has made no step.

    Returns:
        what to note of it in checkpoints.

    Raises:
        DataError: no complete checkpoint, one that is damaged or of another geometry, or without such weights; on one
            rank it may be LatheError.
        StorageError: it cannot be read.
    """
    if config.init_from is None:
        return None
    chosen, taken = config.init_from, None
    for may_be_gone in (not names_checkpoint(chosen.run), False):
        address = _agreed_address(chosen.run, process)
        opened = partial(_source, address, chosen.weights, config, manifest)
        taken = take_weights(opened, process, engine, may_be_gone=may_be_gone)
        if taken is not None:
            break
        say(f"{address} was deleted while it was read, by the run that it is of: looking for its newest one")
    assert taken is not None  # noqa: S101
    found, _, which, learned, others = taken
    url = f"{found.store.url}/{found.name}"
    say(f"beginning with weights {which} of {url}, which learned {learned}; steps and optimizer begin anew")
    if others:
        say(f"these weights learned with {others} than this run's")
    return {"checkpoint": url, "weights": which, "step": found.step}


def _agreed_address(run: str, process: Process) -> str:
    """Rank 0's answer, which is the same on all: that run may be about to save another."""
    addresses: list[str] = []

    def look() -> None:
        if process.is_main:
            store, name = find_run(run)
            if names_checkpoint(run):
                checkpoint.open_checkpoint(store, name)  # raises where it was never there
            addresses.append(f"{store.url}/{name}")

    sharded.together(process, look)
    return process.text_of(0, "".join(addresses))


def _source(address: str, weights: str, config: TrainConfig, manifest: Manifest) -> Source:
    """What lies at an address, and what there is to say of it."""
    store, name = find_run(address)
    with _told_as_gone(store, name):
        found = checkpoint.open_checkpoint(store, name)
        which, key = checkpoint.weights_key(found, weights)
        before, latents = yaml.safe_load(found.read(checkpoint.CONFIG)), trained_on(found)
        others = what_was_other(before, latents.manifests[0], config, manifest)
        return Source(found, key, which, what_was_learned(before, config), others)


@contextmanager
def _told_as_gone(store: Store, name: str) -> Iterator[None]:
    """Whatever goes wrong with a checkpoint that is there no more is because of that."""
    try:
        yield
    except LatheError as error:
        if store.exists(f"{name}/{checkpoint.COMPLETE}"):
            raise
        raise _GoneError(
            f"init_from: {store.url}/{name} was deleted while it was read, by the run that it is of",
            "start again, or name one that stays there (checkpoint.keep_every)",
        ) from error


def what_was_learned(before: Mapping[str, Any], config: TrainConfig) -> str:
    """What the weights say of noisy latents, and of which latents, where the new run has them on another scale."""
    objective, scale = before.get("objective", {}), before.get("normalisation", config.normalisation)
    told = (objective.get("kind"), objective.get("prediction"))
    learned = " ".join(filter(None, told)) or "an unknown objective"
    if scale == config.normalisation:
        return learned
    return f"{learned} of latents with normalisation={scale}, not {config.normalisation}"


def what_was_other(before: Mapping[str, Any], theirs: Manifest, config: TrainConfig, ours: Manifest) -> str:
    """Which models the weights' run saw its samples through, where these are not the new run's; empty = they are."""
    now = config.model_dump(mode="json")
    others = ["another autoencoder"] * (theirs.fingerprint.autoencoder_weights != ours.fingerprint.autoencoder_weights)
    others += ["other text towers"] * (_towers(before, theirs) != _towers(now, ours))
    return " and ".join(others)


def _towers(config: Mapping[str, Any], manifest: Manifest) -> list[tuple[Any, ...]]:
    """What tells text towers apart: the manifest knows those that ran before training, the run file those in it.

    What a run file is too old to tell had the default.
    """
    told = config.get("text", {})
    running = {tower.get("name"): tower for tower in told.get("towers", ())} if told.get("mode") == "online" else {}
    found = []
    for tower in manifest.fingerprint.text_towers:
        reads = running.get(tower.name, {"sha256": tower.weights, "layer": tower.layer, "final_norm": tower.final_norm})
        fields = (reads.get("sha256", ""), reads.get("layer", "last"), reads.get("final_norm", True))
        found.append((tower.name, tower.tokenizer, *fields))
    return sorted(found)


def take_weights(
    opened: Callable[[], Source], process: Process, engine: Engine, *, may_be_gone: bool = False
) -> Source | None:
    """Make a checkpoint's weights those of a new engine, and its averages too; all ranks call it.

    Args:
        opened: finds them, of any engine and world size.
        process: this rank.
        engine: that has made no step.
        may_be_gone: one that is deleted meanwhile is no error.

    Returns:
        what `opened` found; None, on all ranks, where it was deleted meanwhile.

    Raises:
        DataError: it is damaged, or of another geometry; LatheError on other ranks.
    """
    found: list[Source] = []
    gone: list[_GoneError] = []
    frozen: dict[str, Tensor] = {}

    def read() -> None:
        try:
            found.append(opened())
            frozen.update(_fill_if_finite(found[0], engine))
        except _GoneError as error:
            if not may_be_gone:
                raise
            gone.append(error)

    sharded.together(process, read)
    if process.any(bool(gone)):
        return None
    state.set_frozen(engine, frozen)
    state.restore(engine, 0)
    return found[0]


def _fill_if_finite(source: Source, engine: Engine) -> dict[str, Tensor]:
    found = source.found
    with _told_as_gone(found.store, found.name):
        frozen = _fill(found, source.key, engine)
    broken = [mine.parameter for mine in state.fragments(engine) if not mine.tensors[state.WEIGHT].isfinite().all()]
    if broken:
        where = f"{found.store.url}/{found.name}"
        raise DataError(f"init_from: weights of {where} are not finite: {broken[0]}", "name an earlier checkpoint")
    return frozen


def _fill(found: Checkpoint, key: str, engine: Engine) -> dict[str, Tensor]:
    """Weights and averages of this rank's fragments; returns what the optimizer does not know, for `set_frozen`."""
    trained_there: Mapping[str, list[int]] = found.run()["parameters"]
    there = read_tensors(found.read(checkpoint.FROZEN))
    _check_geometry(found, {**trained_there, **{n: list(t.shape) for n, t in there.items()}}, state.geometry(engine))
    keys = [own for own in state.keys(engine) if own == state.WEIGHT or average_name(own)]
    sharded.fill(found, engine, dict.fromkeys(keys, key), trained_there)
    for mine in state.fragments(engine):
        if mine.parameter in there:  # frozen before, and trained now
            part = there[mine.parameter].flatten()[mine.offset : mine.offset + mine.length]
            for own in keys:
                mine.tensors[own].copy_(part)
    frozen = [name for name in state.geometry(engine) if name not in state.shapes(engine)]
    if any(name in trained_there for name in frozen):
        there |= checkpoint.combine([(found, {key: 1.0})], trained_there)
    return {name: there[name] for name in frozen}


def _check_geometry(found: Checkpoint, there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in dict.fromkeys([*here, *there]):
        if there.get(name) != here.get(name):
            raise DataError(
                f"init_from: {found.store.url}/{found.name} is of another model: {name} has shape"
                f" {there.get(name, 'none')} there and {here.get(name, 'none')} here",
                f"give `unet` and `text` the geometry of its {checkpoint.CONFIG}, or leave init_from out",
            )
