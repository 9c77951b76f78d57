"""The text side: open_clip's byte-pair tokenizer and its text transformer, as stock pipelines can repeat them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex  # type: ignore[import-untyped]
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.transformer import TextTransformer
from tokenizers import models, normalizers
from torch import Tensor, nn

from pipeline.config import TextConfig

PAD = 0
"""open_clip pads with token 0, which is also the first letter of its table, `!`."""

# What transformers' CLIPTokenizer does to text. Its own normaliser, since Python's Unicode tables are of another year.
_NORMALISER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class Tokenizer:
    """Captions to token ids: open_clip's byte-pair codes, cut or padded to `context_length`.

    Text is normalised as transformers' CLIPTokenizer does it (Unicode NFC, lower case letter by letter), without
    open_clip's repair of broken encodings and HTML entities: a stock pipeline does not have that step, and both must
    give the same ids for any prompt.

    Args:
        context_length: tokens of each row, start and end token included.
        pad: what stands behind the end token: `zero` as open_clip, SD 2 and SDXL's second tower have it, or `end`, more
            end tokens, as SD 1.5 and SDXL's first tower have it.
    """

    def __init__(self, context_length: int, pad: Literal["zero", "end"] = "zero") -> None:
        self.context_length = context_length
        self.codes = SimpleTokenizer(context_length=context_length)
        self.codes.clean_fn = _normalise
        self.codes.pat = _PIECES
        self.codes.bpe = _merger(self.codes)
        self.pad_id = PAD if pad == "zero" else int(self.codes.eot_token_id)
        self.empty: NDArray[np.uint16] = self([""])[0]

    def __call__(self, captions: Sequence[str]) -> NDArray[np.uint16]:
        """Token ids uint16 [N, L] of N captions: start, text, end, padding. What does not fit is cut before the end."""
        ids: NDArray[np.uint16] = self.codes(list(captions)).numpy().astype(np.uint16)
        if self.pad_id != PAD:
            ids[np.arange(self.context_length) >= self.lengths(ids)[:, None]] = self.pad_id
        return ids

    def lengths(self, ids: NDArray[np.uint16]) -> NDArray[np.int64]:
        """Tokens of each row without its padding, start and end token included: [N, L] -> [N]."""
        lengths: NDArray[np.int64] = (ids == self.codes.eot_token_id).argmax(axis=1) + 1
        return lengths

    def fingerprint(self) -> dict[str, Any]:
        """What changes the meaning of the ids, for the manifest."""
        return {
            "kind": "open_clip-bpe",
            "codes_sha256": hashlib.sha256(Path(default_bpe()).read_bytes()).hexdigest(),
            "normalisation": "nfc-lower",
            "context_length": self.context_length,
            "pad_id": self.pad_id,
        }


class TextTower(nn.Module):
    """open_clip's causal text transformer (Radford et al. 2021, section 2.4), without pooling and projection.

    Every parameter takes part in `forward`, as DDP and ZeRO want it.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transformer = TextTransformer(
            context_length=config.context_length,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            act_layer=nn.GELU,
            pool_type="none",
            proj_type="none",
        )
        nn.init.normal_(self.transformer.token_embedding.weight, std=config.token_embedding_std)
        nn.init.normal_(self.transformer.positional_embedding, std=config.token_embedding_std / 2)
        self.transformer.token_embedding.weight.requires_grad_(config.train_token_embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, L] to the last hidden state after the final norm [B, L, width]."""
        hidden: Tensor = self.transformer(tokens)
        return hidden


def _normalise(text: str) -> str:
    # JSON can hold half a surrogate pair, which is no text
    normalised: str = _NORMALISER.normalize_str(text.encode("utf-8", "replace").decode("utf-8"))
    return normalised


def _merger(codes: SimpleTokenizer) -> Callable[[str], str]:
    """What open_clip's `bpe` does, in n log n. Its own takes a minute for a word of 64 kB, and remembers every word."""
    merges = sorted(codes.bpe_ranks, key=codes.bpe_ranks.__getitem__)
    model = models.BPE(vocab=codes.encoder, merges=merges, end_of_word_suffix="</w>")
    return lambda word: " ".join(token.value for token in model.tokenize(word))
