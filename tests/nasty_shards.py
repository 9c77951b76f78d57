"""Nasty image shards, each with what was put in and what of it cannot be had any more."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nasty_pictures import PICTURES
from nasty_samples import KEYS, OTHER, TEXTS, Sample, Used, sample
from picture_files import file
from PIL import Image

BLOCK = 512
_SAMPLE = 4 * BLOCK  # `sample` in a tar: two headers, two contents of one block each


@dataclass(frozen=True)
class Shard:
    """One case."""

    name: str
    data: bytes
    samples: tuple[Sample, ...]  # of which something must be heard
    lost: int = 0  # samples that were put in behind these
    damaged: bool = False


def tar(samples: Iterable[Sample], format_: int = tarfile.PAX_FORMAT, **fields: str) -> bytes:
    """A tar as Python writes it; `fields` are pax records of every member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_, errors="surrogateescape") as archive:
        for name, data in (member for one in samples for member in one.files):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), fields
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _header(name: str, kind: bytes = tarfile.REGTYPE, length: int = 0, link: str = "", **pax: str) -> bytes:
    """A member's header, with these pax records before it."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.pax_headers = kind, length, link, pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def _signed(header: bytes) -> bytes:
    """The header with the sum that its bytes have."""
    blank = _patched(header, 148, b" " * 8)
    return _patched(blank, 148, b"%06o\0 " % sum(blank))


def _members(*samples: Sample) -> bytes:
    """A tar without its end."""
    return tar(samples)[: len(samples) * _SAMPLE]


def _three(name: str) -> tuple[Sample, ...]:
    return tuple(sample(f"{name}-{letter}") for letter in "abc")


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in sample("zip").files:
            archive.writestr(name, data)
    return stream.getvalue()


def _odd_kinds() -> bytes:
    """Links, devices, folders, pipes and sparse files among one good sample's."""
    (picture, content), (text, caption) = sample("real").files
    padded = content + bytes(-len(content) % BLOCK)
    return b"".join(
        (
            _header("folder.png", tarfile.DIRTYPE),
            _header(picture, length=len(content)) + padded,
            _header("real.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
            _header("real.webp", tarfile.LNKTYPE, link=picture),
            _header("real.gif", tarfile.CHRTYPE),
            _header("real.bmp", tarfile.BLKTYPE),
            _header("real.tga", tarfile.FIFOTYPE),
            _header(text, tarfile.CONTTYPE, length=len(caption)) + caption.ljust(BLOCK, b"\0"),
            _header("linked.png", tarfile.SYMTYPE, link=picture),
            _header("linked.txt", length=len(caption)) + caption.ljust(BLOCK, b"\0"),
            _header("sparse.png", tarfile.GNUTYPE_SPARSE, length=len(content)) + padded,
            _header("sparse.txt", length=len(caption)) + caption.ljust(BLOCK, b"\0"),
            bytes(2 * BLOCK),
        )
    )


def _whole() -> list[Shard]:
    """Shards that can be read to their end."""
    long_names = tuple(sample(key) for key in ("gnu-" + "n" * 200, "gnu/" * 70 + "x", "gnu-é"))
    raw_names = (sample("gnu-x\udce9", "unsafe_key"),)
    prefixed = (sample("ustar/" * 20 + "x"),)
    old, flipped, padded, short = _three("v7"), _three("flipped"), _three("padded"), _three("one-zero-block")
    v7 = b"".join(
        _signed(_patched(block, 257, bytes(255))) if block[257:262] == b"ustar" else block
        for block in (tar(old)[at : at + BLOCK] for at in range(0, len(tar(old)), BLOCK))
    )
    unusable = (sample("in-vain/../x", "unsafe_key"), Sample("in-vain", (("in-vain.txt", b"a cat"),), "no_image"))
    other = Sample(
        "across", (("across.png", file(Image.fromarray(OTHER))), ("across.txt", b"a dog")), Used(OTHER, ("a dog",))
    )
    zeros = Sample("zeros", (("zeros.bin", bytes(64 << 20)), ("zeros.tar", _members(sample("inner")))), None)
    gzipped, joined = _three("gzip"), _three("gzips")
    return [
        Shard("pictures.tar", tar(PICTURES), tuple(PICTURES)),
        Shard("texts.tar", tar(TEXTS), tuple(TEXTS)),
        Shard("keys.tar", tar(KEYS), tuple(KEYS)),
        Shard("gnu.tar", tar((*long_names, *raw_names), tarfile.GNU_FORMAT), (*long_names, *raw_names)),
        Shard("ustar.tar", tar(prefixed, tarfile.USTAR_FORMAT), prefixed),
        Shard("v7.tar", v7, old),
        Shard("pax-for-all.tar", tar(_three("pax"), comment="é"), _three("pax")),
        Shard(
            "odd-kinds.tar",
            _odd_kinds(),
            (sample("real"), sample("linked", "no_image"), sample("sparse", "no_image"), sample("folder", None)),
        ),
        Shard("across-1.tar", tar([sample("across")]), (sample("across"),)),
        Shard("across-2.tar", tar([other]), (other,)),
        Shard("nothing-usable.tar", tar(unusable), unusable),
        Shard("empty.tar", tar(()), ()),
        Shard("one-zero-block.tar", _members(*short) + bytes(BLOCK), short),
        Shard("padded.tar", tar(padded) + bytes(1 << 20), padded),
        Shard(
            "flipped-bit.tar",  # in the second picture's content: no sum of the tar covers it
            _patched(tar(flipped), _SAMPLE + BLOCK + 60, b"\xff"),
            (flipped[0], replace(flipped[1], outcome="damaged_image"), flipped[2]),
        ),
        Shard("gzip.tar.gz", gzip.compress(tar((*gzipped, zeros)), 1), (*gzipped, zeros)),
        Shard("gzips.tgz", b"".join(map(gzip.compress, (_members(*joined), bytes(2 * BLOCK)))), joined),
        Shard("bzip2.tar.bz2", bz2.compress(tar(_three("bzip2"))), _three("bzip2")),
        Shard("xz.tar.xz", lzma.compress(tar(_three("xz"))), _three("xz")),
        Shard("ü b'c (1) [2].tar", tar(_three("odd-name")), _three("odd-name")),
    ]


def _damaged() -> list[Shard]:
    """Shards of three samples, the first `had` of which can be had. The last before the damage is not trusted."""

    def shard(name: str, data: bytes, had: int) -> Shard:
        return Shard(name, data, _three(name.partition(".")[0])[:had], lost=3 - had, damaged=True)

    def three(name: str) -> bytes:
        return tar(_three(name))

    def third(name: str, header: bytes) -> bytes:
        """Its third sample's picture has this header."""
        return _members(*_three(name)[:2]) + header + _members(_three(name)[2])[BLOCK:] + bytes(2 * BLOCK)

    long_pax = _header("long-pax-c.png", comment="x" * (2 << 20))
    false_pax = _header("false-pax-c.png", size="9" * 18)
    gzipped = gzip.compress(three("gzip-cut"))
    bomb = _members(*_three("bomb")[:2]) + _header("bomb-c.png", length=8**11 - 1)
    return [
        shard("cut-in-content.tar", three("cut-in-content")[: 2 * _SAMPLE + BLOCK + 100], 2),
        shard("cut-in-header.tar", three("cut-in-header")[: 2 * _SAMPLE + 100], 1),
        shard("cut-between.tar", three("cut-between")[: 2 * _SAMPLE], 1),
        shard("no-end-mark.tar", three("no-end-mark")[: 3 * _SAMPLE], 2),
        shard("bad-header.tar", _patched(three("bad-header"), _SAMPLE + 2 * BLOCK + 10, b"\xff"), 1),
        shard("bad-first-header.tar", _patched(three("bad-first-header"), 10, b"\xff"), 0),
        shard("hole.tar", _patched(three("hole"), 2 * _SAMPLE, bytes(BLOCK)), 1),  # reads like an early end
        shard("joined.tar", tar(_three("joined")[:2]) + tar(_three("joined")[2:]), 1),
        shard("page-behind.tar", three("page-behind") + b"<html>" * 99, 2),
        shard("8-gib.tar", third("8-gib", _header("8-gib-c.png", length=8**11 - 1)), 2),
        shard("8-eib.tar", third("8-eib", _header("8-eib-c.png", length=2**63 - 1)), 2),
        shard("below-zero.tar", third("below-zero", _header("below-zero-c.png", length=-BLOCK)), 1),
        shard("false-pax.tar", third("false-pax", false_pax), 2),
        shard("long-pax.tar", third("long-pax", long_pax), 1),
        shard("gzip-cut.tar.gz", gzipped[:-20], 2),
        shard("bomb.tar.bz2", bz2.compress(bomb) + bz2.compress(bytes(16 << 20)) * 9, 2),  # 144 MiB
        shard("gzip-sum.tar.gz", _patched(gzip.compress(three("gzip-sum")), -8, b"oops"), 0),  # which of them is wrong?
        *(
            Shard(f"{name}.tar", data, (), damaged=True)
            for name, data in (
                ("no-bytes", b""),
                ("page", b"<!DOCTYPE html><html><body>503 Slow Down</body></html>" * 99),
                ("zip", _zip()),
                ("zstd", b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 9),
                ("noise", bytes(range(1, 256)) * 99),
            )
        ),
    ]


SHARDS = [*_whole(), *_damaged()]
