"""What samples must hold, by their manifest."""

import numpy as np
import pytest
from latent_blocks import CACHED, JOINT, ONLINE, TRIMMED, layout_of
from support import fingerprint

from pipeline.data.layout import MIRRORED, MOMENTS, SIZE, ArrayLayout
from pipeline.data.manifest import Fingerprint
from pipeline.errors import DataError

FIRST = {"latent.npy", "size.npy", "json", "latent_flip.npy"}
IDS = ["tokens{}.clip_l uint16 [4]", "tokens{}.clip_g uint16 [5]"]
STATES = ["text{}.clip_l float16 [4, 3]", "text{}.clip_g float16 [5, 5]", "pooled{}.clip_g float16 [6]"]
FEWER = [f"{array} or fewer tokens" if array.startswith("text") else array for array in STATES]


@pytest.mark.parametrize(
    ("mark", "text"), [(JOINT, ["tokens{}.clip uint16 [4]"]), (ONLINE, IDS), (CACHED, STATES), (TRIMMED, FEWER)]
)
def test_each_caption_has_the_arrays_of_all_towers(mark: Fingerprint, text: list[str]) -> None:
    layout = layout_of(mark, (8, 4))
    assert layout.moments == (4, 4, 2)
    assert [f"{one.kind}{{}}.{one.tower} {one.array}" for one in layout.text] == text
    names = sorted(layout.columns.keys() - FIRST, key=layout.columns.__getitem__)
    assert names[: 2 * len(text)] == [array.split()[0].format(i) + ".npy" for i in (0, 1) for array in text]
    assert len(set(layout.columns.values()) - {-1}) == len(layout.columns) - (not mark.flip)
    assert set(layout.fixed) == ({MOMENTS, SIZE, MIRRORED} if mark.flip else {MOMENTS, SIZE})


def test_mirrored_latents_may_be_left_out() -> None:
    layout = layout_of(CACHED, flip=False)
    assert (layout.flip, layout.columns["latent_flip.npy"], set(layout.fixed)) == (False, -1, {MOMENTS, SIZE})


def test_captions_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"text\.mode=telepathic") as error:
        layout_of(fingerprint(text_mode="telepathic"))
    assert error.value.remedy


@pytest.mark.parametrize(
    ("shape", "whole", "trimmed"),
    [
        ((4, 3), True, True),
        ((3, 3), False, True),
        ((0, 3), False, False),
        ((5, 3), False, False),
        ((4, 2), False, False),
        ((4,), False, False),
        ((4, 3, 1), False, False),
        ((), False, False),
    ],
)
def test_only_the_first_side_may_be_shorter(shape: tuple[int, ...], whole: bool, trimmed: bool) -> None:
    array = np.zeros(shape, np.float16)
    assert ArrayLayout("float16", (4, 3)).fits(array) == whole
    assert ArrayLayout("float16", (4, 3), trimmed=True).fits(array) == trimmed


@pytest.mark.parametrize("array", [np.zeros((4, 3)), np.zeros((4, 3), ">f2"), np.zeros((3, 4), np.float16).T])
def test_type_and_order_are_fixed(array: np.ndarray) -> None:
    assert not ArrayLayout("float16", (4, 3)).fits(array)
