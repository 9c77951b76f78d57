"""Nasty pictures, each with what must become of it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from nasty_samples import HEIGHT, OTHER, PLAIN, SCENE, WIDTH, Outcome, Sample, Used
from numpy.typing import NDArray
from picture_files import RED, WHITE, bomb, chunk, cmyk_profile, file, icon, png16, tiff16
from PIL import Image, features

from pipeline.data.images import Pixels


def _transparent(image: Image.Image) -> Image.Image:
    """The picture with a transparent left half, whose hidden colours are still there."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    image.putalpha(alpha)
    return image


def _palette(mode: str) -> Image.Image:
    """The scene in four colours; with alpha in the palette the two of the left half are transparent."""
    colours = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 255), (255, 255, 255, 255)]
    image = Image.fromarray(np.array([[0, 2], [1, 3]], np.uint8).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1))
    image.putpalette([number for colour in colours for number in colour[: len(mode)]], mode)
    return image


def _wide(levels: Pixels) -> NDArray[np.uint16]:
    """16 bits for 8 of them; the low byte alone is another picture."""
    return levels.astype(np.uint16) * 256 + (levels ^ 85)


def _stored(orientation: int) -> Image.Image:
    """The scene as a camera stores it that notes this EXIF orientation: the inverse of what EXIF asks for."""
    turn = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    return _scene if turn is None else _scene.transpose(Image.Transpose(turn))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _with_chunk(kind: bytes, data: bytes) -> bytes:
    """The scene as a PNG with one more chunk, behind its header."""
    return _png[:33] + chunk(kind, data) + _png[33:]


def _resized(data: bytes, at: int, layout: str, *sides: int) -> bytes:
    """The file with other sides in its header, at this byte."""
    new = struct.pack(layout, *sides)
    return data[:at] + new + data[at + len(new) :]


def _sizeless(png: bytes) -> bytes:
    """The PNG, 0 x 0 pixels large it says."""
    return png[:16] + bytes(8) + png[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + bytes(8) + png[24:29])) + png[33:]


def _endless(tiff: bytes) -> bytes:
    """A TIFF whose list of pages goes round in a circle."""
    (first,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, first)
    return _resized(tiff, first + 2 + 12 * entries, "<I", first)


_scene, _other = Image.fromarray(SCENE), Image.fromarray(OTHER)
_grey = Image.fromarray(np.array([[0, 85], [170, 255]], np.uint8).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1))
_small, _large = (_scene.resize(size, Image.Resampling.NEAREST) for size in ((WIDTH // 2, HEIGHT // 2), (1600, 960)))
_faint = _scene.point(lambda level: 64 + level // 2)  # LAB in 8 bits has no full blue
_noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
_cmyk = Image.fromarray(255 - np.dstack([np.asarray(_scene), np.full((HEIGHT, WIDTH), 255, np.uint8)]), "CMYK")

_GREY = np.asarray(_grey.convert("RGB"))
_TWO_TONES = np.where(_GREY > 100, np.uint8(255), np.uint8(0))
_GREY_16 = _wide(np.asarray(_grey))
_ON_WHITE = np.where(np.arange(WIDTH)[:, None] < WIDTH // 2, np.uint8(255), SCENE)
_GREY_ON_WHITE = np.where(np.arange(WIDTH)[:, None] < WIDTH // 2, np.uint8(255), _GREY)
_NO_RED = np.where((SCENE == RED).all(2, keepdims=True), np.uint8(255), SCENE)
_16_BITS = _wide(SCENE).ravel().tolist()
_16_BITS_ALPHA = _wide(np.asarray(_transparent(_scene.copy()))).ravel().tolist()

_png, _jpeg = file(_scene), file(_scene, "JPEG", quality=100, subsampling=0)
_frames = {"save_all": True, "append_images": [_other, _other]}
_tiff = file(_scene, "TIFF")
_sof = _jpeg.index(b"\xff\xc0") + 5  # where height and width stand
_avif = file(_scene, "AVIF", quality=100, subsampling="4:4:4") if features.check("avif") else b"\0\0\0\x20ftypavif"

_ROUGH = Used(SCENE, lossy=True)
_INKS = Used(np.where(SCENE == WHITE, SCENE, np.uint8(119)).min(2, keepdims=True).repeat(3, 2), lossy=True)

_PICTURES: list[tuple[str, str, bytes, Outcome]] = [
    *((f"exif-{n}", "png", file(_stored(n), exif=_exif(n)), PLAIN) for n in range(1, 9)),
    ("exif-6-jpeg", "jpg", file(_stored(6), "JPEG", quality=100, subsampling=0, exif=_exif(6)), _ROUGH),
    ("exif-unreadable", "jpg", file(_scene, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0MM\0*\xff\xff"), _ROUGH),
    ("exif-9", "png", file(_scene, exif=_exif(9)), PLAIN),
    ("grey", "png", file(_grey), Used(_GREY)),
    ("grey-jpeg", "jpg", file(_grey, "JPEG", quality=100), Used(_GREY, lossy=True)),
    ("1-bit", "png", file(_grey.point(lambda level: 255 * (level > 100)).convert("1")), Used(_TWO_TONES)),
    ("palette", "png", file(_palette("RGB")), PLAIN),
    ("palette-alpha", "png", file(_palette("RGBA")), Used(_ON_WHITE)),
    ("palette-transparent-red", "png", file(_palette("RGB"), transparency=0), Used(_NO_RED)),
    ("alpha", "png", file(_transparent(_scene.copy())), Used(_ON_WHITE)),
    ("alpha-grey", "png", file(_transparent(_grey.copy())), Used(_GREY_ON_WHITE)),
    ("alpha-webp", "webp", file(_transparent(_scene.copy()), "WEBP", lossless=True, exact=True), Used(_ON_WHITE)),
    ("16-bit-grey", "png", file(Image.fromarray(_GREY_16)), Used(_GREY)),
    ("16-bit-grey-tiff", "tif", file(Image.fromarray(_GREY_16), "TIFF"), Used(_GREY)),
    ("16-bit-colour", "png", png16(2, *_16_BITS, width=WIDTH), PLAIN),
    ("16-bit-colour-tiff", "tiff", tiff16(*_16_BITS, width=WIDTH, channels=3), PLAIN),
    ("16-bit-alpha", "png", png16(6, *_16_BITS_ALPHA, width=WIDTH), Used(_ON_WHITE)),
    ("cmyk", "tif", file(_cmyk, "TIFF"), PLAIN),
    ("cmyk-jpeg", "jpg", file(_cmyk, "JPEG", quality=100, subsampling=0), _ROUGH),
    ("cmyk-profile", "tif", file(_cmyk, "TIFF", icc_profile=cmyk_profile()), _INKS),
    ("cmyk-profile-jpeg", "jpg", file(_cmyk, "JPEG", quality=100, icc_profile=cmyk_profile()), _INKS),
    ("cmyk-broken-profile", "tif", file(_cmyk, "TIFF", icc_profile=b"junk" * 40), PLAIN),
    ("lab", "tif", file(_faint.convert("LAB"), "TIFF"), Used(np.asarray(_faint), lossy=True)),
    ("ycbcr", "tif", file(_scene.convert("YCbCr"), "TIFF"), _ROUGH),
    ("animated-gif", "gif", file(_palette("RGB"), "GIF", **_frames), PLAIN),
    ("animated-webp", "webp", file(_scene, "WEBP", lossless=True, **_frames), PLAIN),
    ("animated-png", "png", file(_scene, "PNG", **_frames), PLAIN),
    ("several-pages", "tif", file(_scene, "TIFF", **_frames), PLAIN),
    ("endless-pages", "tif", _endless(_tiff), PLAIN),
    ("avif", "avif", _avif, _ROUGH if features.check("avif") else "not_an_image"),
    ("jpeg-2000", "jp2", file(_scene, "JPEG2000"), PLAIN),
    ("qoi", "qoi", file(_scene, "QOI"), PLAIN),
    ("bmp", "bmp", file(_scene, "BMP"), PLAIN),
    ("tga", "tga", file(_scene, "TGA"), PLAIN),
    ("icon", "ico", file(_scene, "ICO", sizes=[(WIDTH, HEIGHT)]), PLAIN),
    ("progressive", "jpg", file(_scene, "JPEG", quality=100, subsampling=0, progressive=True), _ROUGH),
    ("png-named-jpg", "jpg", _png, PLAIN),
    ("upper-case", "PNG", _png, PLAIN),
    ("bytes-behind", "jpg", _jpeg + b"<html>" * 999, _ROUGH),
    ("text-of-4-mib", "png", _with_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(4 << 20))), PLAIN),
    ("profile-of-4-mib", "png", _with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(4 << 20))), PLAIN),
    ("large", "png", file(_large), Used(np.asarray(_large))),
    ("as-small-as-may-be", "png", file(_small), Used(np.asarray(_small))),
    ("one-pixel", "png", file(Image.new("RGB", (1, 1))), "filtered_upscale"),
    ("sliver", "png", file(Image.new("RGB", (4000, 50))), "filtered_aspect"),
    ("longer-sliver", "png", file(Image.new("1", (30_001, 3))), "too_long"),
    ("nothing", "jpg", b"", "empty_file"),
    ("html", "jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    ("svg", "png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
    ("postscript", "png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not_an_image"),
    ("pdf", "png", file(_scene, "PDF"), "not_an_image"),
    ("photoshop", "png", b"8BPS\0\1" + bytes(6) + struct.pack(">H2I2H", 3, 48, 80, 8, 3) + bytes(4096), "not_an_image"),
    ("pickle", "png", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.", "not_an_image"),
    ("video", "jpg", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(999), "not_an_image"),
    ("bomb", "png", bomb(30_000), "too_many_pixels"),
    ("bomb-just-over", "png", bomb(9_460), "too_many_pixels"),
    ("bomb-jpeg", "jpg", _resized(_jpeg, _sof, ">2H", 65_500, 65_500), "too_many_pixels"),
    ("bomb-gif", "gif", _resized(file(_palette("RGB"), "GIF"), 6, "<2H", 65_535, 65_535), "too_many_pixels"),
    ("bomb-in-icon", "ico", icon(bomb(30_000)), "too_many_pixels"),
    ("text-bomb", "png", _with_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(64 << 20))), "not_an_image"),
    ("no-size", "png", _sizeless(_png), "not_an_image"),
    ("cut-jpeg", "jpg", file(_noise, "JPEG")[:-999], "damaged_image"),
    ("cut-jpeg-header", "jpg", _jpeg[:300], "not_an_image"),
    ("cut-png", "png", file(_noise)[:-3000], "damaged_image"),
    ("cut-webp", "webp", file(_noise, "WEBP")[:-300], "not_an_image"),  # its decoder wants the whole at once
    ("cut-tiff", "tif", file(_noise, "TIFF")[:-3000], "damaged_image"),
    ("wrong-sum", "png", file(_noise)[:900] + b"?" + file(_noise)[901:], "damaged_image"),
    ("float", "tif", file(_grey.convert("F"), "TIFF"), "unsupported_mode"),
    ("32-bit", "tif", file(Image.fromarray(_GREY_16.astype(np.int32) * 999), "TIFF"), "unsupported_mode"),
]
PICTURES = [
    Sample(key, ((f"{key}.{extension}", data), (f"{key}.txt", b"a cat")), outcome)
    for key, extension, data, outcome in _PICTURES
]
