from __future__ import annotations

import io
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tar import members
from pipeline.data.tar_header import BLOCK
from pipeline.data.tar_stream import TarStream
from pipeline.errors import DataError

KINDS = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=160)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def in_place(data: bytes) -> list[tuple[str, bytes]]:
    return [(name, data[at : at + size]) for name, at, size in members(data, whole=True)]


def streamed(data: bytes) -> list[tuple[str, bytes]]:
    stream = TarStream(io.BytesIO(data))
    return [(name, stream.read()) for name, _ in stream]


def written(files: list[tuple[str, bytes, bytes]], format_: int, **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_, **options) as tar:
        for name, kind, data in files:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "elsewhere/" * 12 if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def member(records: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with this content, and a file of three bytes behind it."""
    head = tarfile.TarInfo("x")
    head.type, head.size = kind, len(records)
    info = tarfile.TarInfo("n")
    info.size = 3
    blocks = (head.tobuf(tarfile.USTAR_FORMAT), records, bytes(-len(records) % BLOCK))
    return b"".join([*blocks, info.tobuf(tarfile.USTAR_FORMAT), b"abc".ljust(BLOCK, b"\0"), bytes(2 * BLOCK)])


@given(st.lists(st.tuples(NAMES, st.sampled_from(KINDS), st.binary(max_size=600)), max_size=6), FORMATS, st.booleans())
@settings(deadline=None)
def test_both_readers_find_the_same_files(files, format_, shared):
    data = written(files, format_, pax_headers={"comment": "of all"} if shared else {})
    assert in_place(data) == streamed(data)


@pytest.mark.parametrize("read", [in_place, streamed])
@pytest.mark.parametrize("records", [b"10 size=\xff\n", b"12 size=1_0\n", b"5 a=\n9", b"x"])
def test_records_that_cannot_be_are_damage(read, records):
    with pytest.raises(DataError, match=r"the tar cannot be read: a (pax )?header is damaged"):
        read(member(records))


@pytest.mark.parametrize("read", [in_place, streamed])
def test_many_small_records_take_no_time(read):
    began = time.process_time()
    assert read(member(b"6 a=b\n" * 170_000)) == [("n", b"abc")]
    assert time.process_time() - began < 5


@pytest.mark.parametrize("read", [in_place, streamed])
def test_an_extended_header_without_its_file_is_damage(read):
    for records in (b"9 path=a\n", b"6 a=b\n"):
        data = member(records)[: 2 * BLOCK] + bytes(2 * BLOCK)
        with pytest.raises(DataError, match="it ends within a member"):
            read(data)


def test_what_is_said_of_all_members_takes_little_memory():
    records = [b"500019 comment%03d=%s\n" % (i, b"c" * 500_000) for i in range(40)]
    assert {len(record) for record in records} == {500_019}
    data = b"".join(member(record, b"g")[: -2 * BLOCK] for record in records) + bytes(2 * BLOCK)
    tracemalloc.start()
    try:
        stream = TarStream(io.BytesIO(data))
        assert [name for name, _ in stream] == ["n"] * 40
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
