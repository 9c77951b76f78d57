"""Whether a pipeline's stages read what those before them write."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.config import (
    EncodeConfig,
    EvaluateConfig,
    ExportConfig,
    FirstStageConfig,
    PackConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from pipeline.data.manifest import MANIFEST
from pipeline.encode.sources import output_urls
from pipeline.errors import ConfigError

_Addresses = dict[str, tuple[str, ...]]
_SHARDS, _AUTOENCODER, _MANIFEST, _RUN = "image shards", "an autoencoder", "a manifest", "a run"


def writes(config: RunConfig) -> _Addresses:
    """Addresses of what a command makes for others, by kind."""
    if isinstance(config, PackConfig):
        return {_SHARDS: (config.output,)}
    if isinstance(config, FirstStageConfig):
        return {_AUTOENCODER: (config.output,)}
    if isinstance(config, EncodeConfig):
        return {_MANIFEST: tuple(f"{url.rstrip('/')}/{MANIFEST}" for url in output_urls(config).values())}
    if isinstance(config, TrainConfig):
        return {_RUN: (config.output,)}
    return {}


def reads(config: RunConfig) -> dict[tuple[str, str], tuple[str, ...]]:
    """Addresses of what a command takes, by field and kind."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    if isinstance(config, FirstStageConfig | EncodeConfig):
        shards = config.images.shards
        found["images.shards", _SHARDS] = (shards,) if isinstance(shards, str) else shards
    if isinstance(config, TrainConfig):
        field = "datasets" if config.datasets else "manifest"
        found[field, _MANIFEST] = tuple(source.manifest for source in config.sources)
    if isinstance(config, SampleConfig | EvaluateConfig | ExportConfig):
        found["run", _RUN] = (config.run,)
    if isinstance(config, EncodeConfig | SampleConfig | EvaluateConfig | ExportConfig):
        found["autoencoder", _AUTOENCODER] = (config.autoencoder,)
    if isinstance(config, EvaluateConfig):
        found["manifest", _MANIFEST], found["shards", _SHARDS] = (config.manifest,), (config.shards,)
    return found


def local_addresses(config: RunConfig) -> list[str]:
    """Folders and files of a machine that a command reads or writes; models are not among them."""
    found = [one for (field, _), addresses in reads(config).items() if field != "autoencoder" for one in addresses]
    found.append(str(getattr(config, "output", "")))
    if isinstance(config, TrainConfig):
        found += [source.keys for source in config.sources if source.keys is not None]
        found += [config.init_from.run] if config.init_from is not None else []
    return [address for address in dict.fromkeys(found) if address and "://" not in address]


def local_models(config: RunConfig) -> list[str]:
    """Pretrained models that are folders or files of a machine; other names are of the hub, or open_clip's."""
    found = [one for (field, _), addresses in reads(config).items() if field == "autoencoder" for one in addresses]
    towers = config.text.towers if isinstance(config, EncodeConfig | TrainConfig) else getattr(config, "towers", ())
    found += [name for tower in towers for name in (tower.model, tower.pretrained)]
    if isinstance(config, TrainConfig):
        found += [config.unet.pretrained or "", config.validation.autoencoder]
    return [name for name in dict.fromkeys(found) if name.startswith((".", "/", "~")) or _is_here(name)]


def _is_here(name: str) -> bool:
    return bool(name) and "://" not in name and os.path.exists(name)  # noqa: PTH110  it may be no path at all


def check_addresses(stages: Sequence[tuple[str, RunConfig]]) -> None:
    """Each stage reads what an earlier one makes of that kind, if one does, and no two write to one place.

    Args:
        stages: names and run files, in order.

    Raises:
        ConfigError: naming both stages, the field and the addresses; or captions that train would refuse.
    """
    made: dict[str, dict[str, str]] = {}  # kind -> address -> stage
    outputs: dict[str, str] = {}
    for name, config in stages:
        for (field, kind), addresses in reads(config).items():
            theirs = made.get(kind, {})
            if theirs and not any(_is_within(mine, address) for mine in addresses for address in theirs):
                written, stage = list(theirs.items())[-1]
                raise ConfigError(
                    f"stage {name}: {field}: {addresses[0]}, but stage {stage} writes {written}",
                    f"set both to the same, such as by one root, or leave stage {stage} out",
                )
        output = _place(str(getattr(config, "output", "")))
        if output in outputs:
            raise ConfigError(f"stages {outputs[output]} and {name} both write to {output}", "give each its own output")
        outputs[output] = name
        for kind, addresses in writes(config).items():
            made.setdefault(kind, {}).update(dict.fromkeys(addresses, name))
    _check_captions(stages)


def _check_captions(stages: Sequence[tuple[str, RunConfig]]) -> None:
    """As train does once it has the manifest, which here does not exist yet."""
    encoders = [(name, config) for name, config in stages if isinstance(config, EncodeConfig)]
    trainings = [(name, config) for name, config in stages if isinstance(config, TrainConfig)]
    for name, config in trainings:
        for earlier, encode in encoders:
            manifests = [source.manifest for source in config.sources]
            if not any(_is_within(mine, made) for mine in manifests for made in writes(encode)[_MANIFEST]):
                continue
            wanted = {"mode": config.text.mode, "context_length": config.text.context_length}
            stored = {"mode": encode.text.mode, "context_length": encode.text.context_length}
            if wanted["mode"] == stored["mode"] != "joint":  # towers have a length each
                continue
            for field, value in wanted.items():
                if value != stored[field]:
                    raise ConfigError(
                        f"stage {name}: text.{field}: {value}, but stage {earlier} stores captions with"
                        f" text.{field}={stored[field]}",
                        f"set {name}.text.{field}={stored[field]}, or {earlier}.text.{field}={value}",
                    )


def _is_within(address: str, written: str) -> bool:
    """Whether an address is what is written, or in it: a checkpoint of a run, a pattern of shards."""
    mine, theirs = _place(address), _place(written)
    return mine == theirs or mine.startswith(f"{theirs.rstrip('/')}/")


def _place(address: str) -> str:
    if "://" in address or not address:
        return address.rstrip("/")
    return os.path.abspath(os.path.expanduser(address))  # noqa: PTH100, PTH111  of text that may be a pattern
