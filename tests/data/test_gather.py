"""Samples of several blocks in one batch: each with the caption and the latent that were asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_blocks import BUCKET, CACHED, MARKS, read_blocks
from latent_shards import CHANNELS, moments, text, write_latents

from pipeline.data.gather import Arrays, gather
from pipeline.data.latent_block import LatentBlock
from pipeline.data.layout import Layout

Blocks = tuple[list[LatentBlock], Layout]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blocks]:
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in MARKS}
    return {
        mode: read_blocks(write_latents(folders[mode], [{BUCKET: (19, 0)}], captions=3, fingerprint=mark))
        for mode, mark in MARKS.items()
    }


def draw(blocks: list[LatentBlock], numbers: list[int | None]) -> list[tuple[LatentBlock, int] | None]:
    return [None if number is None else (blocks[number // 8], number % 8) for number in numbers]


DRAWS = st.lists(st.tuples(st.none() | st.integers(0, 18), st.integers(0, 2), st.booleans()), min_size=1, max_size=9)


@pytest.mark.parametrize("mode", MARKS)
@given(drawn=DRAWS)
def test_each_sample_has_its_own_arrays_of_the_caption_drawn(
    blocks: dict[str, Blocks], mode: str, drawn: list[tuple[int | None, int, bool]]
) -> None:
    read, layout = blocks[mode]
    rows = draw(read, [number for number, _, _ in drawn])
    mirrored = [flip and layout.flip for _, _, flip in drawn]
    found = gather(rows, [caption for _, caption, _ in drawn], mirrored, layout)
    for place, (row, (_, caption, _)) in enumerate(zip(rows, drawn, strict=True)):
        if row is None:
            assert_nothing(found, place)
            continue
        key = row[0].keys[row[1]]
        latent = moments(key, 2, 4)
        np.testing.assert_array_equal(found.moments[place], latent[..., ::-1] if mirrored[place] else latent)
        assert found.size[place].tolist() == [*BUCKET, 0, 0, *BUCKET]
        for name, values in text(key, caption, MARKS[mode]).items():
            kind, _, tower = name.partition(".")
            stored = getattr(found.text[tower], "embeddings" if kind == "text" else kind)[place]
            np.testing.assert_array_equal(stored[: len(values)], values)
            assert not stored[len(values) :].any()
            if kind == "text" and mode == "trimmed":
                assert found.text[tower].mask[place].tolist() == [i < len(values) for i in range(len(stored))]


def assert_nothing(found: Arrays, place: int) -> None:
    assert not found.moments[place].any()
    assert not found.size[place].any()
    for one in found.text.values():
        for tensor in (one.tokens, one.embeddings, one.pooled, one.mask):
            assert tensor is None or not tensor[place].any()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("joint", {"clip": {"tokens": (torch.int64, (2, 4))}}),
        ("online", {"clip_l": {"tokens": (torch.int64, (2, 4))}, "clip_g": {"tokens": (torch.int64, (2, 5))}}),
        (
            "cached",
            {
                "clip_l": {"embeddings": (torch.float16, (2, 4, 3))},
                "clip_g": {"embeddings": (torch.float16, (2, 5, 5)), "pooled": (torch.float16, (2, 6))},
            },
        ),
        (
            "trimmed",
            {
                "clip_l": {"embeddings": (torch.float16, (2, 4, 3)), "mask": (torch.bool, (2, 4))},
                "clip_g": {
                    "embeddings": (torch.float16, (2, 5, 5)),
                    "pooled": (torch.float16, (2, 6)),
                    "mask": (torch.bool, (2, 5)),
                },
            },
        ),
    ],
)
def test_shapes_and_types_are_those_promised(blocks: dict[str, Blocks], mode: str, expected: dict) -> None:
    read, layout = blocks[mode]
    found = gather(draw(read, [18, None]), [0, 0], [False, False], layout)
    assert (found.moments.dtype, tuple(found.moments.shape)) == (torch.float16, (2, 2 * CHANNELS, 2, 4))
    assert (found.size.dtype, tuple(found.size.shape)) == (torch.int32, (2, 6))
    there = {
        tower: {
            name: (value.dtype, tuple(value.shape))
            for name in ("tokens", "embeddings", "pooled", "mask")
            if (value := getattr(one, name)) is not None
        }
        for tower, one in found.text.items()
    }
    assert there == expected


@pytest.mark.parametrize(("mode", "caption", "flip"), [("cached", 3, False), ("cached", -1, False), ("joint", 0, True)])
def test_what_a_sample_has_not_is_never_taken_from_another(
    blocks: dict[str, Blocks], mode: str, caption: int, flip: bool
) -> None:
    read, layout = blocks[mode]
    with pytest.raises(IndexError, match=r"00000/0002"):
        gather(draw(read, [2]), [caption], [flip], layout)


def test_data_sets_with_and_without_mirrored_latents_share_a_batch(tmp_path: Path) -> None:
    with_flip, layout = read_blocks(write_latents(tmp_path / "a", [{BUCKET: (2, 0)}], fingerprint=CACHED))
    plain = CACHED.model_copy(update={"flip": False})
    without, other = read_blocks(write_latents(tmp_path / "b", [{BUCKET: (2, 0)}], fingerprint=plain, prefix="b"))
    for one in (layout, other):
        found = gather([(with_flip[0], 1), (without[0], 1)], [0, 0], [True, False], one)
        np.testing.assert_array_equal(found.moments[0], moments("00000/0001", 2, 4)[..., ::-1])
        np.testing.assert_array_equal(found.moments[1], moments("b00000/0001", 2, 4))


def test_a_batch_keeps_no_block(blocks: dict[str, Blocks]) -> None:
    read, layout = blocks["cached"]
    found = gather(draw(read, [0]), [0], [False], layout)
    before = found.moments.clone()
    assert not np.shares_memory(found.moments.numpy(), np.frombuffer(read[0].data, np.uint8))
    found.moments.zero_()  # writable: a view of the block's bytes would not be
    assert not torch.equal(gather(draw(read, [0]), [0], [False], layout).moments, found.moments)
    assert torch.equal(gather(draw(read, [0]), [0], [False], layout).moments, before)
