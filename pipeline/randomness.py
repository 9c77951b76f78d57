"""Random numbers that are a function of (seed, purpose, step, position) alone: Philox4x32-10, vectorised in torch.

Philox is a counter-based generator: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
(https://doi.org/10.1145/2063384.2063405), section 3.3. Each position of the global batch has counters of its own, so a
sample's numbers do not depend on the world size, on the micro-batch or on what was drawn before.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has a stream of its own. The numbers are part of every run's seed."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    CAPTION_DROPOUT = 4
    CAPTION_CHOICE = 5
    INITIAL_NOISE = 6
    ORDER = 7
    FLIP = 8
    OFFSET_NOISE = 9
    VALIDATION_NOISE = 10
    VALIDATION_TIME = 11


def uniform(seed: int, purpose: Purpose, step: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 numbers in [0, 1), each a multiple of 2**-24: [b, *shape] on the device of `positions`.

    Args:
        seed: the run's seed; its lowest 56 bits count.
        purpose: what the numbers are for.
        step: the optimizer step (or epoch); its lowest 32 bits count.
        positions: int64 [b], each sample's place in the global batch (or any other 64-bit number of its own).
        shape: of one sample's numbers; () for one number a sample.
    """
    words = _words(seed, purpose, step, positions, math.prod(shape))
    return _unit(words).reshape(len(positions), *shape)


def normal(seed: int, purpose: Purpose, step: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers, [b, *shape]; arguments as for `uniform`.

    Box & Muller 1958 on pairs of words: sqrt(-2 ln u1) * (cos, sin)(2 pi u2), |value| < 6.8. The words are the same on
    every device; log and cosine may differ between devices in the last bit.
    """
    count = math.prod(shape)
    words = _words(seed, purpose, step, positions, count + count % 2)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0::2].float() + 0.5) * 2.0**-32))
    angle = (2.0 * math.pi) * _unit(words[:, 1::2])
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.flatten(1)[:, :count].reshape(len(positions), *shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or that broadcast), each value in [0, 2**32).
        key: two numbers in [0, 2**32).

    Returns:
        int64 [..., 4], each value in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits; the masks drop the sign's extension
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


def _words(seed: int, purpose: Purpose, step: int, positions: Tensor, count: int) -> Tensor:
    """int64 [b, count]: 32-bit words; counter = (block, position low, position high, step), key = (seed, purpose)."""
    position = positions.to(torch.int64)[:, None]
    block = torch.arange(-(-count // 4), dtype=torch.int64, device=positions.device)[None, :]
    fourth = torch.full_like(block, step & _WORD)
    key = (seed & _WORD, (int(purpose) << 24) | ((seed >> 32) & 0xFFFFFF))
    words = philox((block, position & _WORD, (position >> 32) & _WORD, fourth), key)
    return words.flatten(1)[:, :count]


def _unit(words: Tensor) -> Tensor:
    """32-bit words to [0, 1): the upper 24 bits, which float32 holds exactly."""
    return (words >> 8).float() * 2.0**-24
