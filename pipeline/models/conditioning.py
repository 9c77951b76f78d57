"""What the network is shown of captions: token ids for its own tower, or what frozen towers make of them.

Legend: b captions, L tokens, D width of all towers' hidden states together, P width of their pooled vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer


class Conditioning(NamedTuple):
    """The last four inputs of `TextToImage`."""

    text: Tensor  # token ids int64 [b, L], or hidden states [b, L, D]
    mask: Tensor | None = None  # bool [b, L], True = token; None = all count
    pooled: Tensor | None = None  # [b, P]
    time_ids: Tensor | None = None  # float32 [b, 6]

    def to(self, device: torch.device | str) -> Conditioning:
        """On a device."""
        others = (part if part is None else part.to(device) for part in self[1:])
        return Conditioning(self.text.to(device), *others)


class PromptEncoder(Protocol):
    """Prompts to what the network is shown of them."""

    def __call__(self, prompts: Sequence[str]) -> Conditioning: ...  # noqa: D102


class States(NamedTuple):
    """What one frozen tower made of captions."""

    hidden: Tensor  # [b, L, D of this tower]
    pooled: Tensor | None = None
    mask: Tensor | None = None


def joined(towers: Iterable[States]) -> Conditioning:
    """Several towers' states side by side, token by token; a token counts where it is one to any tower.

    Masks differ where the caption is dropped for one tower alone: its states are zero then beyond the empty prompt.
    """
    hidden, pooled, masks = zip(*towers, strict=True)
    vectors = [vector for vector in pooled if vector is not None]
    there = [mask for mask in masks if mask is not None]
    return Conditioning(
        text=torch.cat(hidden, dim=2),
        mask=torch.stack(there).any(dim=0) if there else None,
        pooled=torch.cat(vectors, dim=1) if vectors else None,
    )


@dataclass(frozen=True)
class TokenIds:
    """Prompts for a network with a text tower of its own."""

    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids int64 [b, L]."""
        return Conditioning(torch.from_numpy(self.tokenizer(prompts).astype(np.int64)))


@dataclass(frozen=True)
class FrozenTowers:
    """Text towers that are not trained, in the order of the manifest.

    Args:
        towers: each with its tokenizer, by name; on one device.
        trimmed: the network does not see padding.
    """

    towers: Mapping[str, tuple[Tokenizer, FrozenTower]]
    trimmed: bool = False

    @property
    def width(self) -> int:
        """D."""
        return sum(tower.width for _, tower in self.towers.values())

    @property
    def pooled_width(self) -> int:
        """P; 0 = no tower has a pooled vector."""
        return sum(tower.pooled_width for _, tower in self.towers.values())

    def run(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Token ids int64 [b, L] by tower to states, without gradients, on the towers' device."""
        return joined(States(*tower.encode(tokens[name])) for name, (_, tower) in self.towers.items())

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """States of prompts."""
        ids = {name: tokenizer(prompts) for name, (tokenizer, _) in self.towers.items()}
        shown = self.run({name: torch.from_numpy(rows.astype(np.int64)) for name, rows in ids.items()})
        if not self.trimmed:
            return shown
        lengths = [self.towers[name][0].lengths(rows) for name, rows in ids.items()]
        longest = torch.from_numpy(np.max(lengths, axis=0)).to(shown.text.device)
        return shown._replace(mask=torch.arange(shown.text.shape[1], device=longest.device) < longest[:, None])
