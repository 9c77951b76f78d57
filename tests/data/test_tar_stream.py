from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tar_header import BLOCK
from pipeline.data.tar_stream import TarStream
from pipeline.errors import DataError, StorageError

FILES = [("a.txt", b"one"), ("b/" + "n" * 150, b""), ("c.jpg", b"x" * 1500), ("d", b"y" * 512), ("é", b"z")]
COMPRESSIONS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def tar(*files: tuple[str, bytes], format_: int = tarfile.PAX_FORMAT, **options) -> bytes:
    """A tar with the shortest end mark."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_, **options) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    return stream.getvalue()[:end] + bytes(2 * BLOCK)


def header(name: str, kind: bytes, size: int, data: bytes = b"", patch: dict[int, bytes] | None = None) -> bytes:
    """One member of any kind, whose size may be a lie."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for at, value in (patch or {}).items():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


def read(data: bytes) -> list[tuple[str, bytes]]:
    stream = TarStream(io.BytesIO(data))
    return [(name, stream.read()) for name, _ in stream]


def read_until_damage(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """What was read in full, and whether the tar was damaged."""
    found: list[tuple[str, bytes]] = []
    stream = TarStream(io.BytesIO(data))
    try:
        for name, _ in stream:
            found.append((name, stream.read()))
    except DataError:
        return found, True
    return found, False


class Trickle:
    """A stream that gives as much as it likes, and can do nothing but read."""

    def __init__(self, data: bytes, pieces: list[int]) -> None:
        self._stream, self._pieces, self._turn = io.BytesIO(data), pieces, 0

    def read(self, size: int) -> bytes:
        self._turn += 1
        return self._stream.read(min(size, self._pieces[self._turn % len(self._pieces)]))


class Zeros:
    """`head`, then as many zeros as are asked for, then `tail`."""

    def __init__(self, head: bytes, zeros: int, tail: bytes) -> None:
        self._parts = [io.BytesIO(head), zeros, io.BytesIO(tail)]

    def read(self, size: int) -> bytes:
        if data := self._parts[0].read(size):
            return data
        if self._parts[1]:
            given = min(size, self._parts[1])
            self._parts[1] -= given
            return bytes(given)
        return self._parts[2].read(size)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compress", [bytes, *COMPRESSIONS.values()], ids=["plain", *COMPRESSIONS])
def test_formats_and_compressions(format_, compress):
    files = [("p" * 80 + "/" + "n" * 90, b"q"), *FILES]
    if format_ == tarfile.USTAR_FORMAT:  # it has no way for longer names
        files = [(name, data) for name, data in files if len(name) < 150 or "p" in name]
    assert read(compress(tar(*files, format_=format_))) == files


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=160)
NAMES = NAMES.filter(lambda name: not name.endswith("/"))


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(st.integers(1, 2000), min_size=1, max_size=4),
    st.sampled_from([bytes, *COMPRESSIONS.values()]),
)
@settings(deadline=None)
def test_what_tarfile_writes_is_read_from_any_stream(files, format_, pieces, compress):
    stream = TarStream(Trickle(compress(tar(*files, format_=format_)), pieces))
    assert [(name, stream.read()) for name, _ in stream] == files


def test_what_is_not_read_is_passed_over():
    stream = TarStream(io.BytesIO(tar(*FILES)))
    assert list(stream) == [(name, len(data)) for name, data in FILES]
    stream = TarStream(io.BytesIO(tar(*FILES)))
    assert [(name, stream.read(), stream.read()) for name, _ in stream][2] == ("c.jpg", b"x" * 1500, b"")


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere(format_):
    data = tar(*FILES, format_=format_)
    for cut in range(len(data)):
        found, damaged = read_until_damage(data[:cut])
        assert found == FILES[: len(found)]
        assert damaged == (cut < len(data) - BLOCK), cut  # one block of zeros is end enough


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_cut_anywhere_in_a_compressed_tar(compress):
    data = compress(tar(*FILES))
    for cut in range(len(data)):
        found, damaged = read_until_damage(data[:cut])
        assert found == FILES[: len(found)]
        assert damaged


@given(st.data())
@settings(max_examples=120)
def test_a_wrong_byte_in_a_header_is_noticed(data):
    good = tar(*FILES, format_=tarfile.GNU_FORMAT)
    starts = [at for at in range(0, len(good) - 2 * BLOCK, BLOCK) if good[at + 257 : at + 262] == b"ustar"]
    at = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, BLOCK - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    found, damaged = read_until_damage(bytes(bad))
    assert found == FILES[: len(found)]
    assert damaged or (found == FILES and 148 <= at % BLOCK < 156)  # the sum's own spelling may vary


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_noise_gives_files_or_damage(data):
    good = bytearray(data.draw(st.sampled_from([tar(*FILES), *(c(tar(*FILES)) for c in COMPRESSIONS.values())])))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    read_until_damage(bytes(good))
    read_until_damage(data.draw(st.binary(max_size=1500)))


def test_what_is_no_regular_file_is_passed_over():
    first, last = tar(("a", b"1"))[: 2 * BLOCK], tar(("z", b"9"))
    between = [
        header("link", tarfile.LNKTYPE, 700),  # a size, and no content
        header("symlink", tarfile.SYMTYPE, 0),
        header("null", tarfile.CHRTYPE, 0),
        header("disk", tarfile.BLKTYPE, 3),
        header("folder/", tarfile.DIRTYPE, 4096),
        header("pipe", tarfile.FIFOTYPE, 0),
        header("old folder/", tarfile.REGTYPE, 0, patch={156: b"\0"}),
        header("volume", b"V", 0),
        header("unheard of", b"Q", 3, b"abc"),
    ]
    assert read(first + b"".join(between) + last) == [("a", b"1"), ("z", b"9")]


def test_sparse_files_are_passed_over():
    pairs = b"".join(b"%011o\0%011o\0" % (offset, 512) for offset in (0, 1024, 2048, 4096))
    more = bytearray(2 * BLOCK)
    more[504] = 1  # a second block follows the first
    old = header("old", tarfile.GNUTYPE_SPARSE, 512, patch={386: pairs, 482: b"\1", 483: b"%011o\0" % 8192})
    pax = tar(("GNUSparseFile.1/new", b"1\n0\n3\n" + bytes(506) + b"abc"), pax_headers={"GNU.sparse.major": "1"})
    after = tar(("z", b"9"))
    assert read(old + bytes(more) + b"d" * 512 + after) == [("z", b"9")]
    assert read(pax) == []
    assert read_until_damage(old + bytes(more[:700])) == ([], True)


def test_pax_headers_of_one_file_and_of_all():
    data = tar(("a", b"1"), ("b" * 120, b"2"), pax_headers={"comment": "of all", "path": "everywhere"})
    assert read(data) == [("everywhere", b"1"), ("b" * 120, b"2")]
    assert read(
        header("x", b"x", 24, b"14 path=other\n10 size=2\n"[:24]) + header("n", b"0", 700, b"ab") + bytes(BLOCK)
    ) == [("other", b"ab")]


def test_bytes_that_are_no_utf_8_and_nul_in_names():
    raw = header("x", b"0", 1, b"1", patch={0: b"caf\xe9.txt\0"}) + bytes(BLOCK)
    assert read(raw) == [("caf\udce9.txt", b"1")]
    assert read(header("x", b"x", 12, b"12 path=a\0b\n") + header("n", b"0", 0) + bytes(BLOCK)) == [("a\0b", b"")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"<html>not here</html>" * 40,
        header("x", b"x", 9, b"9 path=a\n"),  # a pax header, and no file
        header("x", b"x", 9, b"9 path=a\n") + bytes(2 * BLOCK),
        header("x", b"L", 5, b"name\0") + bytes(2 * BLOCK),
        header("x", b"x", 8, b"path=abc") + header("n", b"0", 0) + bytes(BLOCK),
        header("x", b"x", 9, b"8 path=a\n") + header("n", b"0", 0) + bytes(BLOCK),
        header("x", b"x", 9, b"99 path=a") + header("n", b"0", 0) + bytes(BLOCK),
        header("x", b"x", 12, b"11 size=-1\n\n") + header("n", b"0", 0) + bytes(BLOCK),
        header("x", b"x", 11, b"11 size=1_\n") + header("n", b"0", 0) + bytes(BLOCK),
        header("n", b"0", 0, patch={124: b"-0000000001\0"}) + bytes(BLOCK),
        header("n", b"0", 0, patch={124: b"\xff" * 12}) + bytes(BLOCK),  # base-256, negative
        header("n", b"0", 0, patch={124: b"\x80" + b"\x7f" * 11}) + bytes(BLOCK),  # more than there is
        header("n", b"0", 0, patch={124: b"00000000008\0"}) + bytes(BLOCK),
        tar(*FILES)[: 2 * BLOCK] + bytes(BLOCK) + tar(*FILES),  # zeros in the middle
        tar(*FILES) + tar(*FILES),
        gzip.compress(tar(*FILES), mtime=0) + b"garbage",
        gzip.compress(b"<html>", mtime=0),
        b"\x1f\x8b\x08" + bytes(40),
        b"BZh9" + bytes(40),
        b"\xfd7zXZ\0" + bytes(40),
        b"\x28\xb5\x2f\xfd" + bytes(1000),  # zstd
    ],
)
def test_damage(data):
    assert read_until_damage(data)[1]


def test_sums_of_compressed_tars_are_checked():
    data = bytearray(gzip.compress(tar(*FILES), compresslevel=0))
    data[data.index(b"x" * 100) + 50] ^= 1  # deflate with level 0 keeps bytes as they are
    assert read_until_damage(bytes(data))[1]


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_joined_compressed_files_with_padding(compress):
    data = tar(*FILES)
    assert read(compress(data[:700]) + compress(data[700:]) + bytes(1000)) == FILES


def test_base_256_sizes_and_sums_of_signed_bytes():
    size = {124: b"\x80" + (3).to_bytes(11, "big")}
    assert read(header("n", b"0", 3, b"abc", size) + bytes(BLOCK)) == [("n", b"abc")]
    block = bytearray(header("n", b"0", 0, patch={0: b"caf\xe9\0"}))
    block[148:156] = b"%06o\0 " % (sum(block[:148] + block[156:]) + 8 * 32 - 256)
    assert read(bytes(block) + bytes(BLOCK)) == [("caf\udce9", b"")]


def test_a_name_like_a_compressed_file_does_not_mislead():
    assert read(tar(("BZh91.jpg", b"1"))) == [("BZh91.jpg", b"1")]


def test_no_size_costs_memory():
    head = header("big", b"0", 600 << 20)
    tracemalloc.start()
    try:
        stream = TarStream(Zeros(head, 600 << 20, tar(("z", b"9"))))
        assert [(name, size) for name, size in stream] == [("big", 600 << 20), ("z", 1)]
        assert read_until_damage(header("big", b"0", 500 << 20)) == ([], True)
        assert read_until_damage(header("long", b"L", 500 << 20) + bytes(BLOCK)) == ([], True)
        with pytest.raises(DataError, match="extended header is too long"):
            list(TarStream(Zeros(header("long", b"x", 500 << 20), 500 << 20, b"")))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_many_small_pax_records_take_no_time():
    records = b"6 a=b\n" * 170_000
    assert read(header("x", b"x", len(records), records) + tar(("z", b"9"))) == [("z", b"9")]


def test_an_xz_file_that_asks_for_4_gib_is_damaged():
    data = bytearray(lzma.compress(tar(*FILES)))
    size = (data[12] + 1) * 4  # of the block's header, behind the stream's: see the .xz file format, 3.1
    assert data[14:16] == b"\x21\x01"
    data[16] = 40
    data[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(data[12 : 12 + size - 4]))
    with pytest.raises(DataError, match="compression is damaged"):
        read(bytes(data))


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("where", ["within a file", "behind the end mark", "many files"])
def test_what_unpacks_to_far_more_than_pictures_do_is_damaged(compress, where):
    if where == "many files":
        data = compress(header("x.png", b"0", 1024) * (1 << 14)) * 400
    else:
        start = header("big", b"0", 8**11 - 1) if where == "within a file" else tar(*FILES)
        data = compress(start) + compress(bytes(1 << 20)) * 6400
    source = io.BytesIO(data)
    with pytest.raises(DataError, match="unpacks to far more than pictures do"):
        list(TarStream(source))
    assert source.tell() < len(data) / 3


def test_what_shrinks_well_is_no_bomb():
    files = [(f"{i}.json", b'{"caption": "a cat"}' * 40) for i in range(3000)]
    data = tar(*files)
    packed = lzma.compress(data)
    assert len(data) > 300 * len(packed)
    assert read(packed) == files
    zeros = bz2.compress(bytes(1 << 20))  # more than is allowed of any tar, but not in proportion
    noise = np.random.default_rng(1).bytes(1 << 20)
    whole = header("a", b"0", 81 << 20) + noise
    assert sum(1 for _ in TarStream(io.BytesIO(bz2.compress(whole) + zeros * 80 + bz2.compress(bytes(BLOCK))))) == 1


def test_errors_of_the_stream_are_passed_on():
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if data := super().read(size):
                return data
            raise StorageError("the store is gone")

    for compress in (bytes, *COMPRESSIONS.values()):
        with pytest.raises(StorageError, match="the store is gone"):
            list(TarStream(Broken(compress(tar(*FILES))[:-40])))


def test_the_stream_is_read_to_its_end_and_stays_open():
    source = io.BytesIO(tar(*FILES) + bytes(20 * BLOCK))
    list(TarStream(source))
    assert source.tell() == len(source.getvalue())
    assert not source.closed
