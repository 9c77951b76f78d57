"""Latents for anybody's training loop: a torch dataset that shares itself out among ranks and yields whole batches.

Legend: B global batch, b this rank's share of it, C latent channels, h and w sides of the latent, L tokens of a
caption, D width of its embedding, P width of its pooled vector.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.arguments import Options, Source, State, check_skipped, checked, given_device, given_sources
from pipeline.data.batch import Batch, TowerText
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.data.manifest import Split
from pipeline.data.order import rank_positions
from pipeline.data.prepare import Normalisation, Posterior, Preparation, Scale, read_empty
from pipeline.data.ranks import check_ranks, found_ranks, given_ranks
from pipeline.errors import ConfigError, SetupError


class LatentDataset(IterableDataset[dict[str, Any]]):
    """An endless stream of this rank's batches, as dictionaries; the same global batches whatever the world size.

    Each item holds

    - `latents` float32 [b, C, h, w], normalised; `size` int32 [b, 6] (original size, crop, target size);
    - `text`: for each text tower by name `tokens` int64 [b, L], or `embeddings` float16 [b, L, D] with `pooled` float16
      [b, P] and `mask` bool [b, L] where the data have them;
    - `weight` float32 [b]: 0 where a sample was skipped, to be multiplied with its loss;
    - `keys`, a list of b strings; `position` int64 [b], places in the global batch; `epoch` int64 [b], of each sample;
      `step`, an int.

    Give it to a loop as it is, or as `DataLoader(dataset, batch_size=None)`. Batches are read ahead by threads, so no
    worker processes are needed; with n of them worker i yields the batches i, i + n, ..., the sequence is the same, and
    each reads nearly every block. Do not give it to accelerate's `prepare`, which would share it out once more.

    Iterating goes on where the last iteration stopped, and raises DataError for a damaged block, StorageError for one
    that cannot be read, SetupError where ranks or workers would read other than is said here.

    Args:
        manifests: address of a manifest.json, or several; for a weight or a part of a data set a mapping of the fields
            of `DataSetConfig` instead of the address: {"manifest": ..., "weight": 2, "share": 0.1}.
        global_batch: B, samples per step over all ranks; the world size must divide it.
        seed: of order, captions, posterior samples and dropout.
        window: samples that are shuffled together; memory grows with it.
        rank: this process among all; None = torch.distributed's, else $RANK, else 0.
        world_size: number of processes; None = torch.distributed's, else $WORLD_SIZE, else 1.
        start_step: the first step to yield.
        split: "train" or "holdout".
        normalisation: "whiten" = zero mean and unit variance for each channel, see `mean` and `std`; "scaling_factor" =
            the autoencoder's own convention; "none" = as it encodes.
        posterior: "sample" = a new sample of the autoencoder's posterior at each step; "mean" = its mean.
        caption_dropout: share of captions that are replaced by the empty prompt.
        dropout_by_tower: draw for each text tower by itself; else a caption is dropped for all of them.
        device: where the batches' tensors are put, and the posterior is sampled.
        settings: fields of `LoaderConfig`: cache, cache_gib, on_damage, mixing, flip, workers, ...

    Raises:
        ConfigError: an argument cannot be used; the message names it.
        DataError, StorageError: a manifest cannot be used or read.
    """

    def __init__(
        self,
        manifests: Source | Sequence[Source],
        *,
        global_batch: int = 64,
        seed: int = 0,
        window: int = 256,
        rank: int | None = None,
        world_size: int | None = None,
        start_step: int = 0,
        split: Split = "train",
        normalisation: Normalisation = "whiten",
        posterior: Posterior = "sample",
        caption_dropout: float = 0.0,
        dropout_by_tower: bool = False,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> None:
        super().__init__()
        options = self._options = checked(
            Options,
            {
                **settings,
                "global_batch": global_batch,
                "seed": seed,
                "window": window,
                "rank": rank,
                "world_size": world_size,
                "start_step": start_step,
                "split": split,
                "normalisation": normalisation,
                "posterior": posterior,
                "caption_dropout": caption_dropout,
                "dropout_by_tower": dropout_by_tower,
            },
        )
        self._ranks = given_ranks(options.rank, options.world_size) or found_ranks()
        rank_positions(options.global_batch, *self._ranks)
        self._device = given_device(device)
        self._datasets = open_datasets(
            given_sources(manifests), global_batch=options.global_batch, mixing=options.mixing, split=options.split
        )
        manifest, store = self._datasets.manifests[0], self._datasets.stores[0]
        empty = read_empty(store, manifest)
        self.empty_text = {name: _plain(text) for name, text in empty.items()}
        """The empty prompt as `text` has captions, with b = 1: for guidance."""
        factors = manifest.scaling_factor, manifest.shift_factor
        self._prepare = Preparation(
            options.seed,
            Scale(options.normalisation, self._datasets.mean, self._datasets.std, *factors),
            empty,
            posterior=options.posterior,
            caption_dropout=options.caption_dropout,
            dropout_by_tower=options.dropout_by_tower,
            device=self._device,
        )
        self._loader: LatentLoader | None = None
        self._turn = 0  # counts iterations and loaded states, either of which ends the iteration before
        told = repr((self._datasets.identity, options.seed, options.global_batch, options.window)).encode()
        self._order = int.from_bytes(hashlib.blake2b(told, digest_size=7).digest())
        self._state: dict[str, Any] = {"step": options.start_step, "order": self._order, "skipped": []}
        # Process id of the first DataLoader worker that began, seen by all processes; 0 = none.
        self._served = torch.zeros(1, dtype=torch.int64)
        self._served.share_memory_()  # type: ignore[no-untyped-call]
        self._began_in_worker = False

    @property
    def rank(self) -> int:
        """This process among all."""
        return self._ranks[0]

    @property
    def world_size(self) -> int:
        """How many processes share the batches."""
        return self._ranks[1]

    @property
    def mean(self) -> Tensor:
        """[C], of the latents as the autoencoder encodes: z = latents * std + mean undoes `whiten`."""
        return torch.tensor(self._datasets.mean)

    @property
    def std(self) -> Tensor:
        """[C], see `mean`."""
        return torch.tensor(self._datasets.std)

    @property
    def samples(self) -> int:
        """Samples that take part, of all data sets."""
        return sum(stream.samples for stream in self._datasets.streams)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which as many samples were drawn as there are, rounded up."""
        return -(-self.samples // self._options.global_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._options.rank is None:
            check_ranks(*self._ranks)
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            self._check_worker(worker.id)
        elif self._served.item():
            raise _second_iteration()
        self.close()
        state = self._state
        # A worker's own state names its own next step, the dataset's the next one of all.
        step = state["step"] if self._is_of_worker(count) else state["step"] + number
        self._turn += 1
        turn = self._turn
        with self._open(step, state["skipped"]) as loader:
            for batch in islice(loader, 0, None, count):
                self._check_turn(turn, worker is not None)
                item = self._item(batch)
                self._state |= {"step": batch.step + count, "skipped": loader.state_dict()["skipped"]}
                if worker:
                    self._state["workers"] = count
                yield item
        self._check_turn(turn, worker is not None)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: a few integers. With worker processes use {"step": batch["step"] + 1} instead.

        Raises:
            SetupError: worker processes are reading, whose position this one does not know.
        """
        if get_worker_info() is None and self._served.item():
            raise SetupError(
                "LatentDataset: state_dict was asked for where DataLoader workers read ahead",
                'keep {"step": batch["step"] + 1} of the last batch that was trained on',
            )
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, at any world size. It holds for the next iteration.

        Args:
            state: of `state_dict`, or {"step": the next step} alone.

        Raises:
            ConfigError: it is none, or of other data, or of another seed, global_batch or window; what it skips is in
                no shard.
        """
        given = checked(State, state)
        if given.order not in (None, self._order):
            raise ConfigError(
                "LatentDataset: the state is of other data, or of another seed, global_batch, window, weight or share",
                'give what it was saved with, or load {"step": ...} alone to go on in the new order',
            )
        check_skipped(given, self._datasets)
        self.close()
        self._turn += 1
        skipped = [list(skip) for skip in given.skipped]
        self._state = {**given.model_dump(exclude_none=True), "order": self._order, "skipped": skipped}
        self._began_in_worker = False
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            self._served.fill_(os.getpid() if worker else 0)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: epochs follow from the step. accelerate calls it where it has taken the dataset over.

        Raises:
            SetupError: there are several ranks, and accelerate would share this one's part out among them.
        """
        if self.world_size > 1:
            raise SetupError(
                f"LatentDataset: set_epoch({epoch}) was called, as accelerate's prepare does; every rank would train on"
                " a part of its part",
                "leave the DataLoader out of accelerator.prepare(...), and move batches to accelerator.device",
            )

    def close(self) -> None:
        """Stop reading ahead. Iterating again goes on behind the last batch that was yielded."""
        if self._loader:
            self._loader.close()
            self._loader = None

    def __enter__(self) -> LatentDataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}  # threads do not travel

    def _open(self, step: int, skipped: Sequence[Sequence[int]]) -> LatentLoader:
        self._loader = LatentLoader(
            self._datasets,
            global_batch=self._options.global_batch,
            seed=self._options.seed,
            window=self._options.window,
            rank=self.rank,
            world_size=self.world_size,
            start_step=step,
            skipped=skipped,
            config=self._options,
        )
        return self._loader

    def _item(self, batch: Batch) -> dict[str, Any]:
        batch = batch.to(self._device)
        text = self._prepare.text(batch.text, batch.step, batch.positions)
        return {
            "latents": self._prepare.latents(batch.moments, batch.step, batch.positions),
            "text": {name: _plain(captions) for name, captions in text.items()},
            "size": batch.size,
            "weight": batch.weight,
            "keys": batch.keys,
            "position": batch.positions,
            "epoch": batch.epochs,
            "step": batch.step,
        }

    def _check_turn(self, turn: int, in_worker: bool) -> None:
        if turn != self._turn or (self._served.item() and not in_worker):
            raise SetupError(
                "LatentDataset: an iteration cannot go on, since another one or load_state_dict has taken its place",
                "keep one iterator at a time, and make a second LatentDataset for another loop",
            )

    def _is_of_worker(self, count: int) -> bool:
        saved = self._state.get("workers")
        if saved not in (None, count):
            raise SetupError(
                f"LatentDataset: the state is of one of {saved} workers, and there are {count}",
                f'set num_workers={saved}, or load {{"step": ...}} alone',
            )
        return saved is not None

    def _check_worker(self, number: int) -> None:
        if self._device.type != "cpu":
            raise SetupError(
                f"LatentDataset: device={self._device} cannot be used in worker processes",
                "leave num_workers at 0: batches are read ahead by threads",
            )
        # Workers are copies: a second iteration would silently begin where the first one did.
        if self._began_in_worker or (number == 0 and self._served.item() not in (0, os.getpid())):
            raise _second_iteration()
        self._began_in_worker = True
        if number == 0:
            self._served.fill_(os.getpid())


def _second_iteration() -> SetupError:
    return SetupError(
        "LatentDataset: it was iterated a second time after DataLoader workers, and would begin anew",
        'keep one iterator for the whole run, or load_state_dict({"step": batch["step"] + 1}) before',
    )


def _plain(text: TowerText) -> dict[str, Tensor]:
    return {name: value for name, value in vars(text).items() if value is not None}
