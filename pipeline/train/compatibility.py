"""What does not fit together is refused before a step is done: run file, latents, and the checkpoint to resume."""

from __future__ import annotations

import shlex
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.data.datasets import DataSets
from pipeline.data.manifest import Manifest
from pipeline.data.order import VERSION
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.process import Process
from pipeline.train.checkpoint import CONFIG, Checkpoint
from pipeline.train.trained_on import TrainedOn, trained_on

_FIXED = (
    "normalisation",
    "unet",
    "text",
    "objective.kind",
    "objective.prediction",
    "objective.schedule",
    "objective.zero_terminal_snr",
    "seed",
    "global_batch",
    "shuffle_window",
    "loader.flip",
    "ema.averages",
)
"""Fields that a run keeps from its first step to its last: geometry, meaning of the output, the order of samples, and
the averages, which are of all steps."""

_OF_EACH_MACHINE: Any = {  # its disk, network and cores
    "loader": {"cache", "cache_gib", "workers", "requests", "steps_ahead"},
    "metrics": True,
    "engine": {"threads_per_rank"},
    # where these lie: whoever loads them holds their hashes against the latents'
    "text": {"towers": {"__all__": {"model", "pretrained"}}},
    "validation": {"autoencoder"},
}


def check_data(config: TrainConfig, manifest: Manifest) -> None:
    """Whether the run file fits the latents.

    Raises:
        ConfigError: naming the field.
    """
    encoded = manifest.fingerprint
    if config.text.mode != encoded.text_mode:
        raise ConfigError(
            f"text.mode: {config.text.mode}, but the latents' captions are stored for text.mode={encoded.text_mode}",
            f"set text.mode={encoded.text_mode}, or encode the shards again with text.mode={config.text.mode}, to"
            " another output",
        )
    if config.text.context_length != manifest.context_length:
        raise ConfigError(
            f"text.context_length: {config.text.context_length}, but the manifest's captions have "
            f"{manifest.context_length} tokens",
            f"set text.context_length={manifest.context_length}, or encode the shards again",
        )
    lengths = {tower.context_length for tower in encoded.text_towers}
    if len(lengths) > 1:
        raise ConfigError(
            f"text.towers: the latents' captions have {' and '.join(map(str, sorted(lengths)))} tokens by tower, and"
            " states are joined token by token",
            "encode them with towers of one context_length",
        )
    _check_shapes(config, manifest)


def _check_shapes(config: TrainConfig, manifest: Manifest) -> None:
    """Every latent must halve as often as the UNet does it."""
    halvings = config.unet.levels - 1
    for bucket in manifest.buckets():
        _, height, width = manifest.latent_shape(bucket)
        if height % 2**halvings or width % 2**halvings:
            which = f", those of {bucket[0]}x{bucket[1]} pictures," if len(manifest.fingerprint.buckets) > 1 else ""
            raise ConfigError(
                f"unet.block_out_channels: {halvings + 1} levels halve the latents {halvings} times, and "
                f"{height}x{width} latents{which} cannot be",
                "use fewer levels, or another resolution"
                + (
                    f", or encode with images.buckets.step={manifest.downsampling_factor * 2**halvings}"
                    if which
                    else ""
                ),
            )


def common_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that must be the same on all ranks."""
    return config.model_dump(exclude=_OF_EACH_MACHINE)


def check_alike(config: TrainConfig, datasets: DataSets, ranks: Process) -> None:
    """Ranks that were told different things would wait for each other for ever, or draw samples twice and never.

    Raises:
        DataError: they have read different manifests, as when one was written while they started.
        ConfigError: they have different run files.
    """
    told = common_fields(config)
    different = ranks.differing({"latents": (datasets.identity, datasets.mean, datasets.std), **told})
    if different == ["latents"]:
        raise DataError("the ranks have read different manifests", "start again once `lathe encode` has ended")
    if different:
        fields = ", ".join(name for name in different if name != "latents")
        raise ConfigError(f"the ranks have different run files: {fields}", "give all of them the same one")


def check_resume(checkpoint: Checkpoint, config: TrainConfig, datasets: DataSets) -> TrainedOn:
    """What a checkpoint was trained on, if it is of this run.

    Raises:
        DataError: the latents are others than the checkpoint's; names the fields. Or its manifest is of another format.
        ConfigError: a field that a run keeps was changed.
        DamagedError: the checkpoint cannot be read.
    """
    where = f"{checkpoint.store.url}/{checkpoint.name}"
    elsewhere = "use the manifest of the earlier steps, or train into another output"
    checkpoint.run()  # of another format, it says so
    saved = trained_on(checkpoint)
    for manifest in datasets.manifests:
        known = [m.fingerprint for m in saved.manifests]
        if manifest.fingerprint not in known:
            fields = known[0].difference(manifest.fingerprint)
            raise DataError(f"{where} was trained on latents that differ in {', '.join(fields)}", elsewhere)
    if saved.order != datasets.identity and not config.restart_order:
        raise DataError(
            f"{where} was trained on other samples: {_what_differs(saved, datasets)}",
            "set restart_order=true to go on with these, in an order that begins anew; or use those of the earlier"
            " steps, or train into another output",
        )
    before = _kept(_completed(yaml.safe_load(checkpoint.read(CONFIG))))
    now = _kept(config.model_dump(mode="json"))
    for field in _FIXED:
        changed = _first_difference(field, _get(before, field), _get(now, field))
        if changed:
            name, old, new = changed
            listed = _outermost_list(name, now)
            raise ConfigError(
                f"{name}: {runfile.in_line(new)}, but the checkpoint {where} has {runfile.in_line(old)}",
                f"set {_override(listed, _get(before, listed))}, or train into another output",
            )
    return saved


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of fields that were not there yet when it was written."""
    try:
        return TrainConfig.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def _kept(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what says where something lies: a tower is known by its hash, and what a UNet began with is past.

    With text.mode=cached no tower runs, and naming them, for pictures, changes nothing.
    """
    unet, text = dict(_get(tree, "unet") or {}), dict(_get(tree, "text") or {})
    unet.pop("pretrained", None)
    towers = text.pop("towers", None) or []
    if text.get("mode") == "online":
        text["towers"] = [{k: v for k, v in tower.items() if k not in ("model", "pretrained")} for tower in towers]
    return {**tree, "unet": unet, "text": text}


def _override(field: str, value: Any) -> str:
    """As it is typed into a shell."""
    return shlex.quote(f"{field}={runfile.in_line(value)}")


def _outermost_list(field: str, tree: Any) -> str:
    """The field, or the list that it stands in: the run file need not have a list to override a part of."""
    parts = field.split(".")
    paths = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in paths if isinstance(_get(tree, path), list)), field)


def _what_differs(saved: TrainedOn, datasets: DataSets) -> str:
    before, now = ([m.content_hash for m in manifests] for manifests in (saved.manifests, datasets.manifests))
    if len(before) != len(now):
        return f"it had {len(before)} data sets, and there are {len(now)}"
    if before != now and sorted(before) == sorted(now):
        return "the data sets stand in another order"
    changed = [number for number, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
    if changed:
        which = f" of data set {changed[0]}" if len(now) > 1 else ""
        return f"the list of shards{which} has changed (content_hash), because data grew or were taken down"
    if saved.order_version != VERSION:
        return f"the order was version {saved.order_version}, and this Lathe's is {VERSION}"
    return "weight, share, keys or loader.mixing was changed"


def _get(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _first_difference(field: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = (_first_difference(f"{field}.{key}", old.get(key), new.get(key)) for key in {**old, **new})
        return next((found for found in inner if found), None)
    if _are_sections(old) and _are_sections(new) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        inner = (_first_difference(f"{field}.{place}", *pair) for place, pair in pairs)
        return next((found for found in inner if found), None)
    return (field, old, new) if old != new else None


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(section, dict) for section in value)
