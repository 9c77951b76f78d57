from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.storage import Store, find_shards
from pipeline.storage.shards import expand_braces


def test_shards_are_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("00000.tar", "00001.tar", "00002.tar", "notes.txt", "deep/00003.tar", "x-1.tar"):
        store.write(name, b"")
    here = store.url

    def urls(*names: str) -> list[str]:
        return [f"{here}/{name}" for name in names]

    assert find_shards(here) == find_shards(f"{here}/") == urls("00000.tar", "00001.tar", "00002.tar", "x-1.tar")
    assert find_shards(f"{here}/0*.tar") == urls("00000.tar", "00001.tar", "00002.tar")
    assert find_shards(f"{here}/{{00001..00002}}.tar") == urls("00001.tar", "00002.tar")
    assert find_shards(f"{here}/{{deep/00003,x-[0-9]}}.tar") == urls("deep/00003.tar", "x-1.tar")
    assert find_shards(f"{here}/00001.tar") == urls("00001.tar")
    with pytest.raises(DataError, match=r"00003\.tar: no such shard"):
        find_shards(f"{here}/{{00000..00003}}.tar")
    with pytest.raises(DataError, match="no shards match"):
        find_shards(f"{here}/elsewhere")


class TestBraces:
    @given(first=st.integers(0, 999), count=st.integers(1, 50), width=st.integers(1, 6))
    def test_braces_count_with_leading_zeros(self, first: int, count: int, width: int) -> None:
        numbers = range(first, first + count)
        pattern = f"a{{{first:0{width}d}..{numbers[-1]}}}b{{x,y}}"
        assert expand_braces(pattern) == [f"a{n:0{width}d}b{c}" for n in numbers for c in "xy"]

    @given(st.text(alphabet="ab01/.-_*", max_size=30))
    def test_names_without_braces_stay(self, name: str) -> None:
        assert expand_braces(name) == [name]
        assert expand_braces(f"{name}{{only}}") == [f"{name}{{only}}"]

    def test_too_many_names(self) -> None:
        for pattern in ("{0..99999999999}", "{0..9999}{0..9999}"):
            with pytest.raises(DataError, match="stands for"):
                expand_braces(pattern)
