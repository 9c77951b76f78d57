"""A UNet in diffusers' format to start from: its geometry, and its weights."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import UNet2DConditionModel
from pydantic import ValidationError

from pipeline.config import PER_LEVEL, UNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.diffusers_folder import CONFIG, Part
from pipeline.models.unet import DERIVED

_PART = Part(UNet2DConditionModel, "unet", "unet.pretrained")
_OTHER_LATENTS = "train on latents of the autoencoder that it was trained with"
_OTHER_TOWERS = "train on captions encoded for the text towers that it was trained with"
_OTHER_UNET = "give a UNet of the geometry of SD 1.5, SD 2, SDXL, or one like them"
_NULLABLE = ("mid_block_type",)
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if name != "self"
}


def with_geometry(config: UNetConfig) -> UNetConfig:
    """The section with the geometry that `pretrained` has; without `pretrained`, as it is.

    What the section has as its default may be what nobody wrote: it gives way.

    Raises:
        ConfigError: the run file says otherwise, or it is a geometry that Lathe does not train.
        DataError, StorageError: there is no such UNet, or its config.json cannot be read.
    """
    url = config.pretrained
    if url is None:
        return config
    told = _told(url)
    ours = [name for name in UNetConfig.model_fields if name in told and (told[name] is not None or name in _NULLABLE)]
    strange = {name for name, default in _DEFAULTS.items() if told[name] != default} - {*DERIVED, *ours}
    if strange:
        raise _not_trained(url, f"{min(strange)}={told[min(strange)]}")
    try:
        found = UNetConfig.model_validate({name: told[name] for name in ours} | {"pretrained": url})
    except ValidationError as error:
        raise _refused(url, error, told) from error
    for name in sorted(set(UNetConfig.model_fields) - {"pretrained"}):
        said, there, usual = (_value(one, name, found.levels) for one in (config, found, UNetConfig()))
        if said not in (there, usual):
            raise ConfigError(
                f"unet.{name}: {getattr(config, name)}, but unet.pretrained={url} has {getattr(found, name)}",
                f"leave unet.{name} out, or give another UNet",
            )
    return found


def check(url: str, unet: UNet2DConditionModel) -> None:
    """Whether the pretrained UNet fits what latents and text towers ask for.

    Args:
        url: of the pretrained one.
        unet: a new one, for the run's latents and captions.

    Raises:
        ConfigError: it does not, naming the numbers.
    """
    told = _told(url)
    for name, takes, given, remedy in (
        ("in_channels", "latent channels", "latents have", _OTHER_LATENTS),
        ("out_channels", "latent channels", "latents have", _OTHER_LATENTS),
        ("cross_attention_dim", "numbers for each token", "captions have", _OTHER_TOWERS),
        ("projection_class_embeddings_input_dim", "numbers of pooled text and sizes", "samples have", _OTHER_TOWERS),
    ):
        if told[name] != unet.config[name]:
            raise ConfigError(
                f"unet.pretrained: {url} takes {told[name]} {takes} ({name}), and the {given} {unet.config[name]}",
                f"{remedy}, or give another UNet",
            )


def load_into(unet: UNet2DConditionModel, url: str) -> None:
    """Fill a UNet of the same geometry with the pretrained weights.

    Raises:
        DataError, StorageError: they cannot be read, or are not whole, or not finite.
    """
    weights = _PART.load(url).state_dict()
    broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken:
        raise DataError(f"unet.pretrained: weights of {url} are not finite: {broken}", "use other weights")
    unet.load_state_dict(weights)


def _value(config: UNetConfig, name: str, levels: int) -> Any:
    value = getattr(config, name)
    return value * levels if name in PER_LEVEL and len(value) == 1 else value


def _not_trained(url: str, what: str) -> ConfigError:
    return ConfigError(f"unet.pretrained: {CONFIG} of {url} has {what}, which Lathe does not train", _OTHER_UNET)


def _refused(url: str, error: ValidationError, told: dict[str, Any]) -> ConfigError:
    """The first value that is none, or the first that do not go together."""
    first = error.errors(include_url=False)[0]
    if first["loc"]:
        name = str(first["loc"][0])
        return _not_trained(url, f"{name}={told[name]}")
    said = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"unet.pretrained: {CONFIG} of {url}: {said}", _OTHER_UNET)


def _told(url: str) -> dict[str, Any]:
    """Every setting of the pretrained one, with diffusers' own where config.json is silent; lists as tuples.

    What is off by default may be null as well: upcast_attention is in SDXL's own config.json.
    """
    told = _PART.config(url)
    told = {name: value for name, value in told.items() if value is not None or _DEFAULTS.get(name) is not False}
    return {name: _frozen(told.get(name, default)) for name, default in _DEFAULTS.items()}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
