from __future__ import annotations

import time
import unicodedata
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from pipeline.config import TextConfig
from pipeline.export.text import clip_tokenizer
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


def test_padding_with_the_end_token_is_what_sd15_has() -> None:
    ids = Tokenizer(12, "end")(["cat", "", "word " * 40])
    assert ids[0].tolist() == [49406, 2368] + [49407] * 10
    assert ids[1].tolist() == [49406] + [49407] * 11
    np.testing.assert_array_equal(ids[2], Tokenizer(12)(["word " * 40])[0])
    theirs = clip_tokenizer(Tokenizer(12))
    theirs.pad_token = "<|endoftext|>"
    captions = ["cat", "", "word " * 40, "grinning face 😀!"]
    expected = theirs(captions, padding="max_length", truncation=True).input_ids
    np.testing.assert_array_equal(Tokenizer(12, "end")(captions), expected)


@pytest.mark.parametrize("pad", ["zero", "end"])
def test_lengths_count_start_and_end(pad: Literal["zero", "end"]) -> None:
    tokenizer = Tokenizer(12, pad)
    assert tokenizer.lengths(tokenizer(["", "cat", "a! !", "word " * 40])).tolist() == [2, 3, 5, 12]
    assert tokenizer([]).shape == (0, 12)


def test_fingerprint_names_the_padding() -> None:
    one, other = Tokenizer(12).fingerprint(), Tokenizer(12, "end").fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"pad_id"}


@pytest.fixture(scope="module")
def open_clips(tokenizer: Tokenizer) -> SimpleTokenizer:
    theirs = SimpleTokenizer(context_length=12)
    theirs.clean_fn, theirs.pat = tokenizer.codes.clean_fn, tokenizer.codes.pat
    return theirs


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("abcdeinorst' 12!é日", max_size=200))
def test_codes_are_merged_as_open_clip_merges_them(
    tokenizer: Tokenizer, open_clips: SimpleTokenizer, text: str
) -> None:
    np.testing.assert_array_equal(tokenizer([text]), open_clips([text]).numpy())


def test_a_word_of_64_kilobytes_takes_no_time(tokenizer: Tokenizer) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 65_536))
    start = time.perf_counter()
    tokenizer([letters])
    assert time.perf_counter() - start < 5  # open_clip's own takes a minute


def test_half_a_surrogate_pair_is_no_text_and_no_error(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(tokenizer(["a \ud800 b"]), tokenizer(["a ? b"]))
