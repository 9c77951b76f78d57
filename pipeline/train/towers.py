"""The frozen text towers of a run: found, checked against the latents' captions, noted in the run's settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import TowerConfig, TrainConfig
from pipeline.data.manifest import Manifest, Tower, digest_of
from pipeline.errors import ConfigError, LatheError
from pipeline.models.conditioning import FrozenTowers
from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer
from pipeline.runtime.process import Process

_WEIGHTS_DECIDE = ("weights", "layer", "final_norm", "width", "pooled_width")
_READ_AS = ("layer", "final_norm", "pooled")  # fields of TowerConfig


def load_towers(
    configs: Sequence[TowerConfig],
    manifest: Manifest,
    *,
    field: str = "text.towers",
    device: torch.device | None = None,
    precision: str = "float32",
) -> FrozenTowers:
    """The towers that a data set's captions were encoded for, or by.

    Args:
        configs: where to find them, in any order.
        manifest: of the latents.
        field: of the run file, which errors name.
        device: where they run; None = the CPU.
        precision: in which they run.

    Raises:
        ConfigError: they are not the manifest's, by name, tokenizer, hash of weights, layer, norm, or pooled vector.
        DataError, StorageError: one cannot be loaded.
    """
    found = {}
    for tower, config in _pairs(configs, manifest, field):
        tokenizer, frozen = Tokenizer(tower.context_length, config.pad), FrozenTower(config, device, precision)
        _check(tower, _described(config, tokenizer, frozen), config, field)
        found[tower.name] = (tokenizer, frozen)
    return FrozenTowers(found, trimmed=manifest.fingerprint.text_padding == "trimmed")


def check_named(config: TrainConfig, manifest: Manifest) -> None:
    """Whether towers that a cached run names, and perhaps never loads, are those of its captions, as far as is told.

    Raises:
        ConfigError: they are not.
    """
    if config.text.mode != "cached" or not config.text.towers:
        return
    for tower, named in _pairs(config.text.towers, manifest, "text.towers"):
        told = {
            "tokenizer": digest_of(Tokenizer(tower.context_length, named.pad).fingerprint()),
            "weights": named.sha256 or tower.weights,
            "layer": named.layer,
            "final_norm": named.final_norm,
            "pooled_width": (tower.pooled_width or 1) if named.pooled else 0,  # only the weights tell how wide
        }
        _check(tower, tower.model_copy(update=told), named, "text.towers")


def load_online(config: TrainConfig, manifest: Manifest, ranks: Process) -> tuple[TrainConfig, FrozenTowers | None]:
    """The towers that run while training, on this rank's device, where there are such; all ranks call it.

    Returns:
        The run file with the towers' hashes in it, and the towers.

    Raises:
        ConfigError: they are not the manifest's, or not the same on all ranks.
        DataError, StorageError: one cannot be loaded; OtherRankError on the other ranks.
    """
    if config.text.mode != "online":
        return config, None
    problem, towers = None, None
    try:
        towers = load_towers(config.text.towers, manifest, device=ranks.device, precision=config.text.precision)
        config = with_hashes(config, towers)
    except LatheError as error:
        problem = error
    ranks.agree(problem)
    if ranks.differing({"towers": [tower.sha256 for tower in config.text.towers]}):
        raise ConfigError("text.towers: the ranks have found different weights", "give all of them the same files")
    return config, towers


def with_hashes(config: TrainConfig, towers: FrozenTowers) -> TrainConfig:
    """The run file with the hash of each tower's weights, so that checkpoints know them."""
    noted = tuple(
        one.model_copy(update={"sha256": towers.towers[one.name][1].weights_hash()}) for one in config.text.towers
    )
    return config.model_copy(update={"text": config.text.model_copy(update={"towers": noted})})


def towers_of_run(config: TrainConfig, manifest: Manifest, given: Sequence[TowerConfig]) -> FrozenTowers:
    """A finished run's towers, for pictures.

    Args:
        config: the run's settings.
        manifest: of its latents.
        given: where to find them, for a run file that does not say, or that says what is no longer so; empty = it does.

    Raises:
        ConfigError: nobody says where they are, or they are not the run's.
        DataError, StorageError: one cannot be loaded.
    """
    before = {tower.name: tower for tower in config.text.towers}
    if not given and not before:
        raise ConfigError(
            "towers: the run was trained on stored embeddings (text.mode=cached), and prompts need the text towers that"
            " made them",
            "set towers to text.towers of the run file that encoded the captions",
        )
    pinned = []
    for tower in given or config.text.towers:
        known = before.get(tower.name) if config.text.mode == "online" else None
        if known and (differ := [name for name in _READ_AS if getattr(tower, name) != getattr(known, name)]):
            raise ConfigError(
                f"towers: tower {tower.name} has {differ[0]}={getattr(tower, differ[0])}, and the run was trained with"
                f" {differ[0]}={getattr(known, differ[0])}",
                f"set {differ[0]} to that",
            )
        pinned.append(tower.model_copy(update={"sha256": known.sha256}) if known else tower)
    return load_towers(pinned, manifest, field="towers" if given else "text.towers")


def _pairs(configs: Sequence[TowerConfig], manifest: Manifest, field: str) -> list[tuple[Tower, TowerConfig]]:
    """The manifest's towers, each with the one of its name. Raises ConfigError where the names are others."""
    known, given = manifest.fingerprint.text_towers, {config.name: config for config in configs}
    if sorted(tower.name for tower in known) != sorted(given):
        names = " and ".join(tower.name for tower in known)
        raise ConfigError(
            f"{field}: {' and '.join(given) or 'none'}, but the latents' captions are for {names}",
            "set it to the towers of the run file that encoded them",
        )
    return [(tower, given[tower.name]) for tower in known]


def _check(noted: Tower, found: Tower, config: TowerConfig, field: str) -> None:
    if differ := _differences(noted, found):
        raise ConfigError(
            f"{field}: tower {noted.name} ({config.model}) is not the one that the latents' captions are for:"
            f" {', '.join(differ)} differ",
            "set it to that of the run file that encoded them",
        )


def _described(config: TowerConfig, tokenizer: Tokenizer, frozen: FrozenTower) -> Tower:
    return Tower(
        name=config.name,
        tokenizer=digest_of(tokenizer.fingerprint()),
        context_length=tokenizer.context_length,
        weights=frozen.weights_hash(),
        layer=config.layer,
        final_norm=config.final_norm,
        width=frozen.width,
        pooled_width=frozen.pooled_width,
    )


def _differences(noted: Tower, found: Tower) -> list[str]:
    """What differs; of captions that are stored as token ids, weights and what is read of them are not noted."""
    fields = [name for name in Tower.model_fields if noted.weights or name not in _WEIGHTS_DECIDE]
    return [name for name in fields if getattr(noted, name) != getattr(found, name)]
