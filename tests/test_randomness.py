"""Counter-based random numbers: the published vectors, independence of the batch, and the distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.randomness import Purpose, normal, philox, uniform

# Random123 1.14, tests/kat_vectors: "philox4x32 10" (counter, key, result)
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([n]) for n in numbers(counter))
    k0, k1 = numbers(key)
    assert philox((c0, c1, c2, c3), (k0, k1)).tolist() == [numbers(result)]


@given(
    seed=st.integers(0, 2**56 - 1),
    step=st.integers(0, 2**32 - 1),
    positions=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9),
    shape=st.sampled_from([(), (1,), (3,), (2, 5), (8, 4, 4)]),
    draw=st.sampled_from([uniform, normal]),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_does_not_depend_on_its_neighbours(seed, step, positions, shape, draw) -> None:
    batch = draw(seed, Purpose.NOISE, step, torch.tensor(positions), shape)
    assert batch.dtype == torch.float32
    assert batch.shape == (len(positions), *shape)
    for row, position in zip(batch, positions, strict=True):
        assert torch.equal(row, draw(seed, Purpose.NOISE, step, torch.tensor([position]), shape)[0])


def test_big_batches_equal_small_ones_bit_for_bit() -> None:
    positions = torch.arange(48)
    whole = normal(7, Purpose.NOISE, 3, positions, (8, 16, 16))
    parts = [normal(7, Purpose.NOISE, 3, part, (8, 16, 16)) for part in positions.split([1, 5, 10, 32])]
    assert torch.equal(whole, torch.cat(parts))


def test_each_part_of_the_key_gives_other_numbers() -> None:
    position = torch.tensor([5])
    drawn = [
        uniform(1, Purpose.NOISE, 2, position, (16,)),
        uniform(2, Purpose.NOISE, 2, position, (16,)),
        uniform(1 + 2**40, Purpose.NOISE, 2, position, (16,)),
        uniform(1, Purpose.TIMESTEP, 2, position, (16,)),
        uniform(1, Purpose.NOISE, 3, position, (16,)),
        uniform(1, Purpose.NOISE, 2, position + 1, (16,)),
        uniform(1, Purpose.NOISE, 2, position + 2**32, (16,)),
    ]
    assert len({tuple(values.flatten().tolist()) for values in drawn}) == len(drawn)
    assert len(set(torch.cat(drawn).flatten().tolist())) == 16 * len(drawn)


def test_purposes_keep_their_numbers() -> None:
    named = {p.name: int(p) for p in Purpose}
    assert named == {
        "NOISE": 1,
        "TIMESTEP": 2,
        "POSTERIOR": 3,
        "CAPTION_DROPOUT": 4,
        "CAPTION_CHOICE": 5,
        "INITIAL_NOISE": 6,
        "ORDER": 7,
        "FLIP": 8,
        "OFFSET_NOISE": 9,
        "VALIDATION_NOISE": 10,
        "VALIDATION_TIME": 11,
    }


def test_a_run_of_today_draws_the_same_numbers_tomorrow() -> None:
    values = uniform(11, Purpose.TIMESTEP, 4, torch.tensor([0, 9]), (2,))
    assert torch.equal(values, torch.tensor([[14449017, 9016385], [11895179, 14052676]]) / 2**24)


def test_uniform_is_uniform() -> None:
    values = uniform(0, Purpose.TIMESTEP, 0, torch.arange(1000), (100,)).double()
    assert values.min() >= 0
    assert values.max() < 1
    ordered = values.flatten().sort().values
    grid = torch.arange(1, ordered.numel() + 1) / ordered.numel()
    assert (ordered - grid).abs().max() * math.sqrt(ordered.numel()) < 1.63  # Kolmogorov-Smirnov, 1 %


def test_normal_is_normal() -> None:
    values = normal(0, Purpose.NOISE, 0, torch.arange(1000), (101,)).double()
    ordered = values.flatten().sort().values
    grid = torch.arange(1, ordered.numel() + 1) / ordered.numel()
    assert (torch.special.ndtr(ordered) - grid).abs().max() * math.sqrt(ordered.numel()) < 1.63
    assert abs((values**4).mean() - 3) < 0.1
    together = torch.corrcoef(values.T)
    assert (together - torch.eye(101)).abs().max() < 0.17  # 5 sigma of 1/sqrt(1000)


def test_an_empty_batch_is_empty() -> None:
    assert normal(0, Purpose.NOISE, 0, torch.tensor([], dtype=torch.int64), (2, 3)).shape == (0, 2, 3)
