"""What is stored of captions, held against the captions.

Token ids are made anew. An embedding can be made anew by its tower alone, and no record says where that is. But in a
causal tower a token's state depends on that token and those before it, so captions that begin alike must have the
same states as far as that.

Legend: L tokens of a caption, D width of its embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Manifest, Tower, digest_of
from pipeline.encode.verify.report import Notes
from pipeline.models.text import Tokenizer

Arrays = Mapping[str, NDArray[Any]]  # a sample's arrays by name without `.npy`
EMPTY_PROMPT = "the empty prompt"
_PADS: tuple[Literal["zero", "end"], ...] = ("zero", "end")
_SHOWN = 60  # characters of a caption
_FIRST = 4  # tokens of a caption, beside its last, whose states are compared
_KEPT = 1024  # states of each tower in memory, to compare others with
_STATE_LIMIT = {"float32": 0.02}  # of a state's difference, in lengths of the state
_COARSE_STATE = 0.2  # where towers ran in bfloat16 or float16


@dataclass(frozen=True)
class Texts:
    """What all captions of a data set are held against."""

    manifest: Manifest
    tokenizers: Mapping[str, Tokenizer]  # by tower; none for those that this Lathe cannot repeat
    empty: Arrays = field(default_factory=dict)  # of the empty prompt, where it is sound


def find_texts(manifest: Manifest, notes: Notes) -> Texts:
    """The tokenizers that the captions went through; `notes` tell what cannot be made anew."""
    tokenizers = {}
    for tower in manifest.fingerprint.text_towers:
        made = (_tokenizer(tower.context_length, pad) for pad in _PADS)
        found = next((one for one in made if digest_of(one.fingerprint()) == tower.tokenizer), None)
        if found is None:
            said = f"tower {tower.name}: its tokenizer is none of this Lathe's, so its captions were not looked at"
            notes.add("text", said, "warn")
        else:
            tokenizers[tower.name] = found
    if tokenizers and manifest.fingerprint.text_mode == "cached":
        said = "where the towers are is not recorded, so captions were held against each other, not embedded anew"
        notes.add("text", said, "warn")
    return Texts(manifest, tokenizers)


class TextCheck:
    """Holds the captions of one shard against what is stored of them.

    Args:
        texts: of the data set.
        fail: is told the check's name and, in words, what does not hold.
    """

    def __init__(self, texts: Texts, fail: Callable[[str, str], None]) -> None:
        self._texts, self._fail = texts, fail
        self._cached = texts.manifest.fingerprint.text_mode == "cached"
        self._limit = _STATE_LIMIT.get(texts.manifest.fingerprint.text_precision, _COARSE_STATE)
        self._states: dict[str, dict[bytes, tuple[str, NDArray[Any]]]] = {}  # by tower and text so far: where, state
        self.captions = 0  # looked at
        if self._cached and texts.empty:
            self.check(EMPTY_PROMPT, {"": ""}, texts.empty)
            self.captions = 0

    def check(self, where: str, captions: Mapping[str, str], arrays: Arrays) -> None:
        """Look at one sample.

        Args:
            where: names it.
            captions: by the number that stands in the names of their arrays.
            arrays: all that belong to them, of the right types and shapes.
        """
        for tower in self._texts.manifest.fingerprint.text_towers:
            if (tokenizer := self._texts.tokenizers.get(tower.name)) is None:
                continue
            tokens = tokenizer(list(captions.values()))  # [n, L]
            for row, length, (number, caption) in zip(
                tokens, tokenizer.lengths(tokens).tolist(), captions.items(), strict=True
            ):
                said = (
                    self._wrong_states(where, tower, number, row[:length], arrays)
                    if self._cached
                    else _wrong_tokens(tower, number, row, arrays)
                )
                if said:
                    shown = caption if len(caption) <= _SHOWN else f"{caption[: _SHOWN - 3]}..."
                    self._fail("text", f"{where} {said} {shown!r}")
        self.captions += len(captions)

    def _wrong_states(self, where: str, tower: Tower, number: str, tokens: NDArray[np.uint16], arrays: Arrays) -> str:
        """What does not hold of one caption's embedding, to be followed by the caption; `tokens` without padding."""
        name, length = f"text{number}.{tower.name}", len(tokens)
        states = arrays[name]  # [L, D]
        if self._texts.manifest.fingerprint.text_padding == "trimmed" and len(states) != length:
            return f"{name} has {len(states)} tokens instead of the {length} of its caption"
        places = sorted({*range(min(_FIRST, length)), length - 1})
        parts = [(tower.name, place, states[place]) for place in places]
        if tower.pooled_width:
            parts.append((f"pooled {tower.name}", length - 1, arrays[f"pooled{number}.{tower.name}"]))
        for kind, place, state in parts:
            if other := self._other(kind, tokens[: place + 1].tobytes(), state, where):
                return f"{name} differs at token {place} from that of {other}, which begins like its caption"
        return ""

    def _other(self, kind: str, text: bytes, state: NDArray[Any], where: str) -> str:
        """Where another state was seen behind the same text; nothing where this one is as expected."""
        states = self._states.setdefault(kind, {})
        if text not in states:
            if len(states) < _KEPT:
                states[text] = (where, state.astype(np.float32))
            return ""
        other, expected = states[text]
        near = np.linalg.norm(state.astype(np.float32) - expected) <= self._limit * np.linalg.norm(expected)
        return "" if near else other


def _wrong_tokens(tower: Tower, number: str, tokens: NDArray[np.uint16], arrays: Arrays) -> str:
    name = f"tokens{number}.{tower.name}"
    return "" if np.array_equal(arrays[name], tokens) else f"{name} has not the tokens of its caption"


def numbered(captions: Sequence[str]) -> dict[str, str]:
    """A sample's captions, by the numbers in the names of their arrays."""
    return {str(number): caption for number, caption in enumerate(captions)}


@lru_cache(maxsize=4)  # a third of a second each
def _tokenizer(context_length: int, pad: Literal["zero", "end"]) -> Tokenizer:
    return Tokenizer(context_length, pad)
