"""What `lathe encode` looks at before its first shard, by its own code."""

from __future__ import annotations

from pipeline.config import EncodeConfig
from pipeline.data.filters import Filters
from pipeline.encode.claim import check_claims
from pipeline.encode.encoder import Encoder
from pipeline.encode.sources import find_sources
from pipeline.operate.doctor.finding import Check
from pipeline.operate.doctor.stores import grounds
from pipeline.operate.numerals import in_units
from pipeline.storage import open_store, split

_LIST_SECONDS, _MODEL_SECONDS = 60.0, 120.0


def checks(config: EncodeConfig) -> list[Check]:
    """Of sources, models and output."""
    shards = config.images.shards
    of_sources = grounds(shards) if isinstance(shards, str) else grounds(*shards)
    of_models = grounds(config.autoencoder, *(tower.model for tower in config.text.towers))
    return [
        Check("sources", lambda: sources(config), of_sources, _LIST_SECONDS),
        Check("encoder", lambda: encoder(config), ("output", *of_models), _MODEL_SECONDS),
    ]


def sources(config: EncodeConfig) -> str:
    """Whether there are image shards, and the first can be read. Raises ConfigError, DataError, StorageError."""
    Filters(config.images.filters)
    found = find_sources(config)
    folder, name = split(found[0].url)
    open_store(folder).read(name, 0, 512)
    return f"{len(found):,} image shards, {in_units(sum(one.bytes for one in found))}"


def encoder(config: EncodeConfig) -> str:
    """Whether autoencoder and towers load, picture sizes fit, and the output holds no latents of other ones.

    Raises:
        ConfigError, DataError, StorageError, SetupError: as `lathe encode` would.
    """
    model = Encoder(config.model_copy(update={"compile": False}))  # which would take minutes
    check_claims(config, model)
    return (
        f"{config.autoencoder}: {model.channels} channels, 1/{model.downsampling_factor} of a picture's side,"
        f" {config.precision}; text {config.text.mode}"
    )
