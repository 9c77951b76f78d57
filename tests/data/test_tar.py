from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tar import TarBuilder, members, npy_bytes, read_npy
from pipeline.errors import DataError

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=300).map(lambda s: f"k{s}z")
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6, unique_by=lambda f: f[0])


def build(files):
    builder = TarBuilder()
    offsets = [builder.add(name, data) for name, data in files]
    return builder.finish(), offsets


@given(FILES)
@settings(deadline=None)
def test_tarfile_reads_what_the_builder_writes(files):
    data, _ = build(files)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        assert [(i.name, tar.extractfile(i).read()) for i in infos] == files
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} <= {(0, 0, 0, "", "", 0o444)}


@given(FILES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(deadline=None)
def test_members_reads_every_format_of_tarfile(files, format_):
    stream, written = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # too long for ustar
                continue
            written.append((name, content))
    data = stream.getvalue()
    assert [(name, data[at : at + size]) for name, at, size in members(data)] == written


@given(FILES.filter(bool))
@settings(deadline=None)
def test_a_run_of_whole_members_reads_alone(files):
    data, offsets = build(files)
    part = memoryview(data)[offsets[-1] : len(data) - 1024]
    assert [(name, bytes(part[at : at + size])) for name, at, size in members(part)] == files[-1:]


def test_ustar_prefix_and_directories():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("d" * 90)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("d" * 90 + "/" + "n" * 60))
    assert [name for name, _, _ in members(stream.getvalue())] == ["d" * 90 + "/" + "n" * 60]


def test_sizes_in_base_256_and_in_pax_records():
    info = tarfile.TarInfo("a")
    info.size = 5
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 256)
    assert list(members(bytes(header) + b"hello".ljust(512, b"\0"))) == [("a", 512, 5)]

    info.pax_headers = {"size": "5"}
    data = info.tobuf(tarfile.PAX_FORMAT) + b"hello".ljust(512, b"\0")
    assert [(name, size) for name, _, size in members(data)] == [("a", 5)]


@pytest.mark.parametrize("at", [0, 130, 148, 300])
def test_a_damaged_header_is_told(at):
    data = bytearray(build([("a.npy", b"x" * 600), ("b.npy", b"y")])[0])
    data[at] ^= 0x15
    with pytest.raises(DataError, match="the header at byte 0 is damaged"):
        list(members(bytes(data)))


def test_a_cut_file_is_told():
    data, _ = build([("a.npy", b"x" * 600)])
    with pytest.raises(DataError, match="ends within the member at byte 0"):
        list(members(data[:1000]))
    with pytest.raises(DataError, match="the header at byte 0 is damaged"):
        list(members(data[:300]))


@pytest.mark.parametrize("name", ["a\ud800", "\udcff.npy"])
def test_a_name_that_is_not_utf8_is_not_written(name):
    with pytest.raises(UnicodeEncodeError):
        TarBuilder().add(name, b"")


@pytest.mark.parametrize("dtype", ["float16", "uint16", "int32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (6,), (3, 4, 5)])
def test_arrays_survive(dtype, shape):
    array = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    for stored in (array, np.asfortranarray(array)):
        back = read_npy(npy_bytes(stored))
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_fortran_order_and_newer_npy_versions():
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    for version in ((1, 0), (2, 0)):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array, version=version)
        np.testing.assert_array_equal(read_npy(stream.getvalue()), array)


def test_nothing_is_unpickled():
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        read_npy(stream.getvalue())


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array at all",
        npy_bytes(np.zeros(9))[:-3],
        npy_bytes(np.zeros(9))[:40],
        npy(b"{'descr': ("),
        npy(b"'''"),
        npy(b"{[]: 1}"),
        npy(b"{1: 2, 'a': 3}"),
        npy(b"(" * 3000),
        npy(b"{'descr': '<f2', 'fortran_order': False, 'shape': (-1, -1)}"),
    ],
)
def test_damaged_arrays_are_told(data):
    with pytest.raises(DataError, match="an array could not be read") as caught:
        read_npy(data)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_an_extended_header_has_a_bound():
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2 << 20
    with pytest.raises(DataError, match="an extended header is too long"):
        list(members(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 << 20)))
