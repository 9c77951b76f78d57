from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, StorageError
from pipeline.storage import Entry, Store, find_shard_entries, find_shards, open_store
from pipeline.storage.shards import expand_braces


def put(store: Store, *names: str) -> None:
    for name in names:
        store.write(name, name.encode())


def found(store: Store, *patterns: str) -> list[str]:
    """What is found by patterns below a store, without the store's own address."""
    urls = find_shards([f"{store.url}/{pattern}" for pattern in patterns])
    assert all(url.startswith(f"{store.url}/") for url in urls)
    return [url.removeprefix(f"{store.url}/") for url in urls]


def test_shards_are_found(store: Store) -> None:
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


def test_several_patterns_are_one_sorted_set(store: Store) -> None:
    put(store, "a/1.tar", "a/2.tar", "b/1.tar", "b/x.tar.gz")
    assert found(store, "b", "a/*.tar", "a/1.tar", "a/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar"]
    assert found(store, "b/x.tar.gz") == ["b/x.tar.gz"]
    assert find_shards((f"{store.url}/a",)) == find_shards(f"{store.url}/a")
    for nothing in ("b/2*.tar", "c", "c/*.tar", "{c,d}/*.tar"):
        with pytest.raises(DataError, match=f"no shards match .*{re.escape(nothing)}"):
            found(store, "a", nothing)
    assert found(store, "{a,c}/*.tar") == ["a/1.tar", "a/2.tar"]  # one of a pattern's braces may be empty


def test_wildcards_in_folders(store: Store) -> None:
    put(store, "top.tar", "a1/0.tar", "a1/1.tar", "a2/0.tar", "a2/deep/0.tar", "b/0.tar", "b/deep/er/0.tar", "b/0.txt")
    put(store, ".hidden/0.tar", "a1/.0.tar", "a2/.deep/0.tar")
    assert found(store, "*/0.tar") == ["a1/0.tar", "a2/0.tar", "b/0.tar"]
    assert found(store, "a*/*.tar") == ["a1/0.tar", "a1/1.tar", "a2/0.tar"]
    assert found(store, "a[2-9]/") == ["a2/0.tar"]
    assert found(store, "*/deep/*.tar") == ["a2/deep/0.tar"]
    assert found(store, "**/0.tar") == ["a1/0.tar", "a2/0.tar", "a2/deep/0.tar", "b/0.tar", "b/deep/er/0.tar"]
    assert found(store, "**/deep/**/*.tar") == ["a2/deep/0.tar", "b/deep/er/0.tar"]
    assert found(store, "b/**") == ["b/0.tar", "b/deep/er/0.tar"]
    assert len(found(store, "**")) == 7
    assert found(store, "{a,b}?/{0..1}*.tar", "t*.tar") == ["a1/0.tar", "a1/1.tar", "a2/0.tar", "top.tar"]
    assert found(store, ".h*/*.tar", "a1/.0.tar") == [".hidden/0.tar", "a1/.0.tar"]


def test_folders_that_no_pattern_meets_are_left_alone(tmp_path: Path) -> None:
    put(open_store(str(tmp_path)), "a/0.tar", "lost+found/0.tar")
    locked = tmp_path / "lost+found"
    seen = []
    store = open_store(str(tmp_path))
    entries = store.list(into=lambda folder: bool(seen.append(folder)) or folder != "lost+found")
    assert [entry.name for entry in entries] == ["a/0.tar"]
    assert sorted(seen) == ["a", locked.name]


def test_sizes_and_versions_come_with_the_listing(store: Store) -> None:
    put(store, "a/1.tar", "b/2.tar")
    store.write("b/2.tar", b"longer")
    first = find_shard_entries([f"{store.url}/a", f"{store.url}/*/2.tar"])
    assert [(shard.url, shard.size) for shard in first] == [(f"{store.url}/a/1.tar", 7), (f"{store.url}/b/2.tar", 6)]
    assert all(re.fullmatch("[0-9a-f]+", shard.version) for shard in first)
    time.sleep(0.01)  # a file system's clock may be as coarse as that
    store.write("b/2.tar", b"others")
    again = find_shard_entries(f"{store.url}/*/*.tar")
    assert again[0] == first[0]
    assert (again[1].size, again[1].url) == (first[1].size, first[1].url)
    assert again[1].version != first[1].version


def test_a_folder_is_listed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, *(f"a/{n}.tar" for n in range(20)), "b/0.tar")
    listed = []
    list_all = type(store).list

    def note(self: Store, *args: Any, **kwargs: Any) -> list[Entry]:
        listed.append(self.url)
        return list_all(self, *args, **kwargs)

    monkeypatch.setattr(type(store), "list", note)
    assert len(found(store, "a/{0..9}.tar", "a/1*.tar", "a/{0..19}.tar", "b")) == 21
    assert sorted(listed) == [f"{store.url}/a", f"{store.url}/b"]


class TestLists:
    def test_lines_are_addresses(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        put(open_store("."), "here/0.tar")
        put(store, "a/0.tar", "a/1.tar", "b/0.tar", "c/0.tar")
        lines = [
            "\ufeff# shards",
            "",
            f"{store.url}/a",
            f"  {store.url}/{{b,c}}/*.tar \r",
            "#x",
            "here/*.tar",
            "here/0.tar",
        ]
        store.write("list.txt", "\n".join(lines).encode())
        own = [f"{store.url}/{name}" for name in ("a/0.tar", "a/1.tar", "b/0.tar", "c/0.tar")]
        assert find_shards(f"{store.url}/list.txt") == sorted([*own, "here/0.tar"])
        store.write("more.txt", f"{store.url}/a/0.tar".encode())
        assert find_shards(f"{store.url}/{{list,more}}.txt") == sorted([*own, "here/0.tar"])
        assert find_shards([f"{store.url}/more.txt", f"{store.url}/b"]) == [own[0], own[2]]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"", "lists no shards"),
            (b"# none\n\n", "lists no shards"),
            (b"\xff\xfe\0", "not text in UTF-8"),
            (b"# \nnothing/here/*.tar", r"no shards match 'nothing/here/\*\.tar' \(line 2 of .*list\.txt\)"),
            (b"nothing/x.tar", r"nothing/x.tar: no such shard"),
            (b"other.txt", r"'other.txt' \(line 1 of .*list\.txt\): a list takes no lists"),
            (b"gs://bucket/x.tar", "gs://bucket"),
        ],
    )
    def test_what_cannot_be_used(self, store: Store, text: bytes, said: str) -> None:
        store.write("list.txt", text)
        with pytest.raises((DataError, StorageError), match=said) as caught:
            find_shards(f"{store.url}/list.txt")
        assert caught.value.remedy

    def test_lists_that_are_not_there(self, store: Store) -> None:
        with pytest.raises(StorageError, match="no such"):
            find_shards(f"{store.url}/list.txt")
        with pytest.raises(DataError, match="no wildcards"):
            find_shards(f"{store.url}/*.txt")


@pytest.mark.parametrize("pattern", ["", "/", "s3://", "s3://buck*/x.tar", "s3:///x.tar", [""]])
def test_addresses_that_name_nothing(pattern: str) -> None:
    with pytest.raises(DataError, match="names no folder or bucket"):
        find_shards(pattern)


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
