"""Scores by hand and against published values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate import scores
from pipeline.evaluate.scores import (
    colour_score,
    non_white,
    psnr,
    psnr_where,
    retrieval_ranks,
    shape_score,
    share_within,
    srgb_to_lab,
)

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def picture(colour: tuple[int, int, int], rows: int = 2, side: int = 8) -> np.ndarray:
    """The first `rows` rows in one colour on white."""
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[:rows] = colour
    return pixels


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] += 1
    other[1, 0] = 255  # a quarter of the pixels all wrong
    assert psnr(other, black) == pytest.approx([48.1308, 6.0206], abs=1e-3)
    assert psnr(other / 255, black) == pytest.approx([48.1308, 6.0206], abs=1e-3)
    assert psnr(black, black).tolist() == [np.inf, np.inf]


def test_psnr_wants_equal_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))


def test_psnr_where_leaves_the_background_out() -> None:
    reference = np.stack([picture(RED, rows=2), picture(WHITE)])
    result = reference.copy()
    result[0, 0] = (155, 0, 0)  # half of the object
    result[0, 5:] = 0  # and a ruined background
    error = (100 / 255) ** 2 / 3 / 2
    scored = psnr_where(result, reference, non_white(reference))
    assert scored[0] == pytest.approx(-10 * np.log10(error))
    assert np.isnan(scored[1])
    assert psnr(result, reference)[0] < scored[0]


def test_almost_white_is_white() -> None:
    pixels = np.array([[[(255, 255, 255), (240, 250, 244), (255, 239, 255), (0, 0, 0)]]], np.uint8)
    assert non_white(pixels).tolist() == [[[False, False, True, True]]]


@given(
    n=st.integers(1, 6),
    m=st.integers(6, 30),
    d=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 1 << 22]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_ranks_agree_with_a_full_sort(n, m, d, chunk, seed) -> None:
    rng = np.random.default_rng(seed)
    queries, targets = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((m, d)).astype(np.float32)
    own = rng.integers(0, m, n)
    distances = np.linalg.norm(queries[:, None].astype(float) - targets[None].astype(float), axis=-1)
    expected = [1 + list(np.argsort(row, kind="stable")).index(i) for row, i in zip(distances, own, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_CHUNK_ELEMENTS", chunk)
        assert retrieval_ranks(queries, targets, own).tolist() == expected


def test_doubles_of_a_target_do_not_count_against_it() -> None:
    targets = np.array([[0.0, 1.0], [0.0, 1.0], [5.0, 5.0], [0.3, 0.7]])
    assert retrieval_ranks(np.array([[0.3, 0.7]]), targets, np.array([1])).tolist() == [2]


def test_what_is_not_finite_comes_behind_all() -> None:
    targets = np.eye(8)
    queries = np.stack([targets[0], np.full(8, np.nan), np.full(8, np.inf)])
    found = retrieval_ranks(queries, targets, np.array([0, 1, 2]))
    assert found.tolist() == [1, 9, 9]
    assert share_within(found, 1) == share_within(found, 8) == 1 / 3
    assert share_within(found, 9) == 1.0


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        (WHITE, (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        (RED, (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        (BLUE, (32.30, 79.19, -107.86)),
        ((5, 5, 5), (1.37, 0.0, 0.0)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    assert srgb_to_lab(np.array(rgb) / 255) == pytest.approx(lab, abs=0.05)


def test_colour_is_compared_where_there_is_an_object() -> None:
    pictures = np.stack([picture(RED, 2), picture(RED, 2), picture(WHITE), picture((0, 0, 0), 3)])
    truths = np.stack([picture(RED, 5), picture(BLUE, 2), picture(WHITE), picture(WHITE)])
    assert colour_score(pictures, truths) == pytest.approx([0, 176.3, 0, 100], abs=0.1)


def test_shape_is_the_overlap() -> None:
    pictures = np.stack([picture(RED, 2), picture(RED, 6), picture(WHITE), picture(RED, 3), picture(RED, 3)])
    truths = np.stack([picture(BLUE, 2), picture(RED, 3), picture(WHITE), picture(WHITE), picture(RED, 3)[::-1]])
    assert shape_score(pictures, truths).tolist() == [1.0, 0.5, 1.0, 0.0, 0.0]
