"""Picture files for tests, among them some that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def file(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def quarters() -> Image.Image:
    """Left half red over green, right half blue over white; 8 pixels wide, 4 high."""
    image = Image.new("RGB", (8, 4))
    for box, colour in (((0, 0, 4, 2), RED), ((0, 2, 4, 4), GREEN), ((4, 0, 8, 2), BLUE), ((4, 2, 8, 4), WHITE)):
        image.paste(colour, box)
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(colour_type: int, *samples: int, width: int, transparency: bytes = b"") -> bytes:
    """A PNG with 16 bits a sample, which Pillow does not write in colour; the rows one after another."""
    row = width * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    rows = [struct.pack(f">B{row}H", 0, *samples[at : at + row]) for at in range(0, len(samples), row)]
    header = struct.pack(">2I5B", width, len(rows), 16, colour_type, 0, 0, 0)
    extra = chunk(b"tRNS", transparency) if transparency else b""
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff16(*samples: int, width: int, channels: int) -> bytes:
    """A TIFF with 16 bits a sample, the rows one after another; the fourth channel is unassociated alpha."""
    data = struct.pack(f"<{len(samples)}H", *samples)
    bits = struct.pack(f"<{channels}H", *[16] * channels)
    height = len(samples) // width // channels
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8 + len(data))]
    entries += [(259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, channels)]
    entries += [(278, 4, 1, height), (279, 4, 1, len(data))]
    entries += [(338, 3, 1, 2)] if channels == 4 else []
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(bits)) + data + bits + table


def cmyk_profile() -> bytes:
    """A small ICC v2 CMYK profile: no ink is white, black ink is black, every other full ink is mid grey (Lab 50)."""
    corners = [0 if i & 1 else 255 if i == 0 else 128 for i in range(16)]  # C, M, Y, K from none to full; K fastest
    colours = b"".join(bytes([lightness, 128, 128]) for lightness in corners)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut += bytes(range(256)) * 4 + colours + bytes(range(256)) * 3
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags, offset, table = [(b"A2B0", lut), (b"desc", text), (b"wtpt", white)], 132 + 36, b""
    body = b""
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">2I", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 168 + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + table + body


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is so many pixels wide and high."""
    data = file(Image.new("1", (1, 1)))
    header = struct.pack(">2I", side, side) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def icon(png: bytes) -> bytes:
    """An ICO of 16 x 16 pixels, it says."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
