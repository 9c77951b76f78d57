"""Memory laid out as a safetensors file: what is copied into it opens as one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from safetensors.torch import save as tensor_bytes

from pipeline.train.tensor_file import TensorFile

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


@settings(max_examples=20, deadline=None)
@given(sizes=st.dictionaries(NAMES, st.integers(1, 50), max_size=8), data=st.data())
def test_what_is_copied_is_what_safetensors_reads(sizes: dict[str, int], data: st.DataObject) -> None:
    file = TensorFile(list(sizes.items()))
    for _ in range(2):  # filled again, it is another file of the same layout
        values = data.draw(st.lists(st.floats(width=32), min_size=sum(sizes.values()), max_size=sum(sizes.values())))
        file.elements.copy_(torch.tensor(values))
        expected = dict(zip(sizes, torch.tensor(values).split(list(sizes.values())), strict=True))
        found = load(bytes(file.data))
        again = load(tensor_bytes({name: tensor.clone() for name, tensor in expected.items()}))
        assert found.keys() == expected.keys() == again.keys()
        for name, tensor in expected.items():
            assert found[name].view(torch.int32).equal(tensor.view(torch.int32))
            assert again[name].view(torch.int32).equal(found[name].view(torch.int32))


def test_tensors_begin_at_a_multiple_of_eight() -> None:
    for name in ("a", "ab", "abc" * 7):
        file = TensorFile([(name, 3)])
        assert (len(file.data) - 12) % 8 == 0
