from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from pipeline.config import TextConfig
from pipeline.models.text import TextTower, Tokenizer

TINY = TextConfig(width=16, layers=2, heads=2, context_length=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(12)


def test_plain_captions_get_open_clips_ids(tokenizer: Tokenizer) -> None:
    captions = ["a red apple", "Wow!! it's 3 o'clock", "  two\n lines ", "grinning face 😀", "", "word " * 40]
    expected = SimpleTokenizer(context_length=12)(captions).numpy()
    np.testing.assert_array_equal(tokenizer(captions), expected)


def test_rows_are_start_text_end_and_zeros(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["cat", "word " * 40])
    assert ids.dtype == np.uint16
    assert ids[0].tolist() == [49406, 2368, 49407] + [0] * 9
    assert ids[1, 0] == 49406
    assert ids[1, -1] == 49407
    assert tokenizer.empty.tolist() == [49406, 49407] + [0] * 10


@settings(max_examples=50, deadline=None)
@given(st.text("aBcÄÖé 13!'.,-日", max_size=40))
def test_case_composition_and_spaces_do_not_matter(tokenizer: Tokenizer, text: str) -> None:
    other = unicodedata.normalize("NFD", text.swapcase()).replace(" ", " \t\n ")
    np.testing.assert_array_equal(tokenizer([text])[0], tokenizer([f" {other}\n"])[0])


def test_fingerprint_names_the_context_length(tokenizer: Tokenizer) -> None:
    one, other = tokenizer.fingerprint(), Tokenizer(24).fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"context_length"}


def test_tower_gives_one_vector_per_token_and_uses_every_parameter(tokenizer: Tokenizer) -> None:
    tower = TextTower(TINY)
    hidden = tower(torch.from_numpy(tokenizer(["a cat", "dog"]).astype(np.int64)))
    assert hidden.shape == (2, 12, 16)
    hidden.square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_tower_is_causal(tokenizer: Tokenizer) -> None:
    tower = TextTower(TINY).eval()
    ids = torch.from_numpy(tokenizer(["a cat", "a dog"]).astype(np.int64))
    one, other = tower(ids)
    torch.testing.assert_close(one[:2], other[:2])
    assert not torch.allclose(one[2:], other[2:])


def test_token_table_can_be_left_untrained() -> None:
    tower = TextTower(TINY.model_copy(update={"train_token_embedding": False}))
    frozen = [name for name, p in tower.named_parameters() if not p.requires_grad]
    assert frozen == ["transformer.token_embedding.weight"]
