"""What does not fit together is refused before a step is done: run file, latents, and the checkpoint to resume."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, parse_manifest
from pipeline.errors import ConfigError, DataError
from pipeline.train.checkpoint import CONFIG, MANIFEST, Checkpoint

_FIXED = ("unet", "text", "objective.kind", "seed", "global_batch", "shuffle_window")
"""Fields that a run keeps from its first step to its last: geometry, and what the order of the samples depends on."""


def check_data(config: TrainConfig, manifest: Manifest) -> None:
    """Whether the run file fits the latents.

    Raises:
        ConfigError: naming the field.
        DataError: the latents are of several shapes.
    """
    encoded, again = manifest.fingerprint, "encode the shards again with text.mode=joint, to another output"
    if config.text.mode != encoded.text_mode:
        raise ConfigError(
            f"text.mode: {config.text.mode}, but the latents' captions are stored for text.mode={encoded.text_mode}",
            again,
        )
    if encoded.text_padding == "trimmed":
        raise ConfigError("text.padding: the latents' captions are trimmed, and training takes full ones only", again)
    side = manifest.latent_side
    if config.text.context_length != manifest.context_length:
        raise ConfigError(
            f"text.context_length: {config.text.context_length}, but the manifest's captions have "
            f"{manifest.context_length} tokens",
            f"set text.context_length={manifest.context_length}, or encode the shards again",
        )
    halvings = len(config.unet.block_out_channels) - 1
    if side % 2**halvings:
        raise ConfigError(
            f"unet.block_out_channels: {halvings + 1} levels halve the latents {halvings} times, and "
            f"{side}x{side} latents cannot be",
            "use fewer levels, or another resolution",
        )


def check_resume(checkpoint: Checkpoint, config: TrainConfig, manifest: Manifest) -> None:
    """Whether a checkpoint is of this run.

    Raises:
        DataError: the latents are others than the checkpoint's; names the fields. Or its manifest is of another format.
        ConfigError: a field that a run keeps was changed.
        DamagedError: the checkpoint cannot be read.
    """
    where = f"{checkpoint.store.url}/{checkpoint.name}"
    elsewhere = "use the manifest of the earlier steps, or train into another output"
    saved = parse_manifest(checkpoint.read(MANIFEST), f"{where}/{MANIFEST}")
    fields = saved.fingerprint.difference(manifest.fingerprint)
    if fields:
        raise DataError(f"{where} was trained on latents that differ in {', '.join(fields)}", elsewhere)
    if saved.content_hash != manifest.content_hash:
        raise DataError(f"{where} was trained on another list of shards: content_hash differs", elsewhere)
    before = yaml.safe_load(checkpoint.read(CONFIG))
    now = config.model_dump(mode="json")
    for field in _FIXED:
        changed = _first_difference(field, _get(before, field), _get(now, field))
        if changed:
            name, old, new = changed
            raise ConfigError(
                f"{name}: {new}, but the checkpoint {where} has {old}",
                f"set {name}={old}, or train into another output",
            )


def _get(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _first_difference(field: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = (_first_difference(f"{field}.{key}", old.get(key), new.get(key)) for key in {**old, **new})
        return next((found for found in inner if found), None)
    return (field, old, new) if old != new else None
