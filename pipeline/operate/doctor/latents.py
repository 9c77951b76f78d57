"""What `lathe train` looks at before its first step, by its own code: latents, towers, autoencoder, earlier steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from pipeline.config import TrainConfig
from pipeline.data.datasets import DataSets
from pipeline.data.sealed import load_sealed_manifest
from pipeline.errors import DataError, LatheError
from pipeline.models.conditioning import FrozenTowers
from pipeline.models.pretrained_unet import check, with_geometry
from pipeline.models.unet import TextToImage
from pipeline.operate.doctor.finding import Check, Doubt
from pipeline.operate.doctor.stores import grounds
from pipeline.operate.doctor.world import World
from pipeline.storage import RENEWED_SECONDS, Store, holder, open_store
from pipeline.train import checkpoint, start
from pipeline.train.compatibility import check_resume
from pipeline.train.network import build_network
from pipeline.train.telling import engine_configuration
from pipeline.train.towers import load_towers
from pipeline.train.trained_model import find_run, load_autoencoder, prompt_encoder

_MANIFEST_SECONDS, _MODEL_SECONDS, _DEEPSPEED_SECONDS = 60.0, 60.0, 120.0


@dataclass
class Training:
    """A training run, and what was opened of it by the checks so far.

    Attributes:
        config: the run file; with the UNet's whole geometry once the latents are open.
        datasets: the latents.
        towers: the frozen ones that run meanwhile.
    """

    config: TrainConfig
    datasets: DataSets | None = field(default=None, repr=False)
    towers: FrozenTowers | None = field(default=None, repr=False)

    @property
    def opened(self) -> DataSets:
        """The latents, for checks that come after those that open them."""
        assert self.datasets is not None  # noqa: S101
        return self.datasets

    def network(self) -> TextToImage:
        """What is trained, without its memory."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return build_network(self.config, self.opened.manifests[0], self.towers)


def checks(run: Training, world: World, *, whole: bool) -> list[Check]:
    """Of what a run reads, and of its output.

    Args:
        run: the run.
        world: its ranks.
        whole: also what is the same for all machines.
    """
    config = run.config
    manifests = [source.manifest for source in config.sources]
    found = [Check("batch", lambda: batch(config, world), seconds=_DEEPSPEED_SECONDS)]
    if config.unet.pretrained:
        found.append(Check("unet", lambda: unet(config), grounds(config.unet.pretrained), _MODEL_SECONDS))
    found += [
        Check("manifest", lambda: manifest(config), grounds(*manifests), _MANIFEST_SECONDS),
        Check("latents", lambda: latents(run), ("manifest", "unet"), _MANIFEST_SECONDS),
        Check("shards", lambda: shards(run.opened), ("latents",)),
    ]
    if config.text.mode == "online" or (config.validation.prompts and config.text.towers):
        found.append(Check("text-towers", lambda: text_towers(run), ("latents",), _MODEL_SECONDS))
    found.append(Check("network", lambda: network(run), ("latents", "text-towers")))
    if whole and (address := config.validation.autoencoder):
        after = (*grounds(address), "latents")
        found.append(Check("autoencoder", lambda: autoencoder(run), after, _MODEL_SECONDS))
    if whole and config.init_from:
        found.append(Check("init-from", lambda: init_from(config), grounds(config.init_from.run)))
    if whole:
        found.append(Check("resume", lambda: resume(run), ("output", "latents"), _MANIFEST_SECONDS))
    return found


def batch(config: TrainConfig, world: World) -> str:
    """Whether ranks, micro batch and accumulation make the global batch, for DeepSpeed too. Raises ConfigError."""
    whole = engine_configuration(config, world.ranks)
    share, times = whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]
    return f"{world.ranks} ranks x {share} samples x {times} micro batches = global_batch {config.global_batch}"


def unet(config: TrainConfig) -> str:
    """Whether the UNet to begin with is there. Raises ConfigError, DataError, StorageError."""
    found = with_geometry(config.unet)
    return f"{config.unet.pretrained}: {found.levels} levels"


def manifest(config: TrainConfig) -> str:
    """Whether each manifest is there, whole and as it was made. Raises DataError, StorageError."""
    found = [load_sealed_manifest(source.manifest) for source in config.sources]
    samples = sum(one.samples("train") for one in found)
    return f"{samples:,} samples to train on in {sum(len(one.shards) for one in found):,} shards"


def latents(run: Training) -> str:
    """Whether run file and latents fit. Raises ConfigError, DataError, StorageError."""
    run.config, run.datasets = start.open_data(run.config)
    first = run.datasets.manifests[0]
    return (
        f"{first.latent_channels}x{first.base_side}x{first.base_side}, text {first.fingerprint.text_mode} of"
        f" {first.context_length} tokens, as the run file has it"
    )


def shards(datasets: DataSets) -> str:
    """Whether first and last shard of each data set are there in their size. Raises DataError, StorageError."""
    looked = 0
    for store, one in zip(datasets.stores, datasets.manifests, strict=True):
        for entry in {one.shards[0], one.shards[-1]}:
            file = store.open(entry.name)
            try:
                if file.size != entry.bytes:
                    raise DataError(
                        f"{store.url}/{entry.name} has {file.size} bytes, and the manifest says {entry.bytes}",
                        "look at it with `lathe verify`, or copy it again",
                    )
                file.read(0, 512)
                looked += 1
            finally:
                file.close()
    return f"{looked} looked at, readable and in their size"


def text_towers(run: Training) -> str:
    """Whether the frozen towers are those of the latents' captions. Raises ConfigError, DataError, StorageError."""
    config, first = run.config, run.opened.manifests[0]
    if config.text.mode == "online":
        run.towers = load_towers(config.text.towers, first)
    else:
        prompt_encoder(config, first)
    return f"{', '.join(tower.name for tower in config.text.towers)}: the captions' own"


def network(run: Training) -> str:
    """Whether there is such a network for these latents and captions, and a pretrained UNet takes both.

    Raises:
        ConfigError: there is not, or it does not.
    """
    built = run.network()
    if run.config.unet.pretrained:
        check(run.config.unet.pretrained, built.unet)
    parts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in built.named_children()}
    return ", ".join(f"{name} {size / 1e6:.2f} M parameters" for name, size in parts.items())


def autoencoder(run: Training) -> str:
    """Whether the pictures' autoencoder is the one of the latents. Raises DataError, StorageError."""
    address = run.config.validation.autoencoder
    load_autoencoder(address, run.opened.manifests[0])
    return f"{address}: the one that the latents came from"


def init_from(config: TrainConfig) -> str:
    """Whether the weights to begin with are there. Raises DataError, StorageError."""
    assert config.init_from is not None  # noqa: S101
    store, name = find_run(config.init_from.run)
    which, _ = checkpoint.weights_key(checkpoint.open_checkpoint(store, name), config.init_from.weights)
    return f"{which} of {store.url}/{name}"


def resume(run: Training) -> str | Doubt:
    """Whether the output is free, and the run goes on from what is in it. Raises LatheError where it would refuse."""
    config, store = run.config, open_store(run.config.output)
    if seen := start.conclusion_seen(store, config):
        return Doubt(seen, "set more steps, or train into another output")
    _check_free(store)
    damaged = ""
    there = checkpoint.find(store, warn=False)
    for found in there:
        try:
            check_resume(found, config, run.opened)
        except checkpoint.DamagedError as error:
            damaged = damaged or error.message
            continue
        said = f"goes on from {store.url}/{found.name}, of {config.steps} steps"
        return Doubt(f"{said}: {damaged}", "look at the disk or the bucket") if damaged else said
    if there:
        raise LatheError(f"no checkpoint of {store.url} can be read: {damaged}", "train into another output")
    return f"begins at step 0 of {config.steps}"


def _check_free(store: Store) -> None:
    """Raise LatheError where another run writes there: it lives on this machine, or its counter moves."""
    found = holder(store)
    if found is None or found.lives is False:
        return
    if found.lives is None:
        time.sleep(RENEWED_SECONDS + 1.0)
        later = holder(store)
        if later is None or (later.pid, later.host, later.counter) == (found.pid, found.host, found.counter):
            return
    raise LatheError(f"{store.url} is being written to by {found}", "end that run first, or train into another output")
