"""Batches from planned steps: which caption and which of the two latents each draw takes."""

from __future__ import annotations

import io
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_blocks import BUCKET, CACHED, archive, layout_of, parse, parts

from pipeline.data.assemble import Assembler
from pipeline.data.batch import Batch
from pipeline.data.fetch import BlockReference
from pipeline.data.latent_block import LatentBlock
from pipeline.data.order import Places
from pipeline.data.planner import PlannedStep
from pipeline.errors import DataError

EPOCHS = range(12)
LAYOUT = layout_of(CACHED)
SAMPLES = {f"{i % 4}/{i:03d}": parts(LAYOUT, (1, 2, 3, 5)[i % 4]) for i in range(160)}
KEYS = list(SAMPLES)
COUNTS = np.array([(1, 2, 3, 5)[i % 4] for i in range(160)])


def reference(block: LatentBlock | None) -> BlockReference:
    found = BlockReference(lambda data: block)
    found.future.set_result(b"")
    return found


@pytest.fixture(scope="module")
def block() -> BlockReference:
    return reference(parse(archive(SAMPLES), LAYOUT, len(SAMPLES)))


def assembled(block: BlockReference, numbers, epochs, seed: int = 3) -> Batch:
    """A batch of samples by their numbers, each in its epoch; None = skipped."""
    b = len(numbers)
    epochs = np.broadcast_to(np.asarray(epochs, np.int64), b).copy()
    rest = (np.zeros(b, np.int64) for _ in range(4))
    stream, shard, sample, window = rest
    rows = [(reference(None), 0) if number is None else (block, number) for number in numbers]
    datasets = SimpleNamespace(streams=[SimpleNamespace(bucket=BUCKET, dataset=0)])
    step = PlannedStep(9, Places(0, stream, epochs, shard, sample, window), rows)
    return Assembler(datasets, [LAYOUT], np.arange(b), seed).batch(step)


@pytest.fixture(scope="module")
def epochs(block: BlockReference) -> list[Batch]:
    return [assembled(block, range(len(KEYS)), epoch) for epoch in EPOCHS]


def stored(key: str, member: str) -> torch.Tensor:
    return torch.from_numpy(np.load(io.BytesIO(SAMPLES[key][f"{member}.npy"])))


def test_each_sample_draws_among_its_own_captions_evenly(epochs: list[Batch]) -> None:
    drawn = np.array([batch.captions for batch in epochs])
    for count in (1, 2, 3, 5):
        found = Counter(drawn[:, count == COUNTS].ravel().tolist())
        n = 40 * len(EPOCHS)
        assert set(found) == set(range(count))
        assert all(abs(seen - n / count) <= 5 * (n / count * (1 - 1 / count)) ** 0.5 for seen in found.values())


def test_the_arrays_are_of_what_was_drawn(epochs: list[Batch]) -> None:
    batch = epochs[0]
    assert batch.keys == KEYS
    for row, (key, caption, mirrored) in enumerate(zip(KEYS, batch.captions, batch.mirrored.tolist(), strict=True)):
        assert torch.equal(batch.moments[row], stored(key, "latent_flip" if mirrored else "latent"))
        for tower in ("clip_l", "clip_g"):
            assert torch.equal(batch.text[tower].embeddings[row], stored(key, f"text{caption}.{tower}"))
        assert torch.equal(batch.text["clip_g"].pooled[row], stored(key, f"pooled{caption}.clip_g"))


def test_draws_differ_between_epochs_and_seeds(epochs: list[Batch], block: BlockReference) -> None:
    """About as often as chance would have it: of two epochs half of the mirrored draws agree, and 1/5 of the captions
    of samples with five."""
    other = assembled(block, range(len(KEYS)), 0, seed=4)
    five, pairs = COUNTS == 5, [(one, two) for one in EPOCHS for two in EPOCHS if one < two]
    for name, kept, share in (("mirrored", np.ones(160, bool), 0.5), ("captions", five, 0.2)):
        drawn = np.array([np.asarray(getattr(batch, name))[kept] for batch in epochs])
        agreed = np.mean([(drawn[one] == drawn[two]).mean() for one, two in pairs])
        assert abs(agreed - share) < 0.05
        assert len({row.tobytes() for row in drawn}) == len(EPOCHS)
        assert (np.asarray(getattr(other, name))[kept] == drawn[0]).mean() < share + 0.25
    half = np.mean([batch.mirrored.double().mean() for batch in epochs])
    assert abs(half - 0.5) < 5 * (0.25 / (160 * len(EPOCHS))) ** 0.5


def test_the_two_draws_of_a_sample_are_independent(epochs: list[Batch]) -> None:
    two = COUNTS == 2
    captions = np.array([np.array(batch.captions)[two] for batch in epochs])
    mirrored = np.array([batch.mirrored.numpy()[two] for batch in epochs])
    assert abs((captions == mirrored).mean() - 0.5) < 5 * (0.25 / captions.size) ** 0.5


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(epochs: list[Batch], block: BlockReference) -> None:
    """A batch at a border is of two epochs; another rank's has other samples, or none that was read."""
    numbers, of_epochs = [11, None, 3, 150, 3, 8], [0, 0, 0, 1, 1, 7]
    batch = assembled(block, numbers, of_epochs)
    for row, (number, epoch) in enumerate(zip(numbers, of_epochs, strict=True)):
        if number is None:
            assert (batch.keys[row], batch.captions[row], batch.mirrored[row], batch.weight[row]) == ("", 0, False, 0)
            assert not batch.moments[row].any()
        else:
            assert batch.captions[row] == epochs[epoch].captions[number]
            assert batch.mirrored[row] == epochs[epoch].mirrored[number]
            assert batch.weight[row] == 1
    assert batch.epochs.tolist() == of_epochs


def test_a_block_that_is_of_no_use_is_so_for_everybody_who_wants_it() -> None:
    def refuse(data: object) -> None:
        refused.append(data)
        raise DataError("too many", "mend them")

    refused: list[object] = []
    found = BlockReference(refuse)
    found.future.set_result(b"")
    for _ in range(3):
        with pytest.raises(DataError, match="too many"):
            found.get()
    assert len(refused) == 1
