from __future__ import annotations

import resource
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import BLUE, GREEN, RED, bomb, cmyk_profile, file, icon, png16, quarters, tiff16
from PIL import Image, ImageCms, ImageFile, features

from pipeline.data import images
from pipeline.data.images import ImageError
from pipeline.errors import SetupError


def test_rgb_is_kept():
    pixels = images.decode(file(quarters()))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (4, 8, 3))
    np.testing.assert_array_equal(pixels, np.asarray(quarters()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_modes_without_transparency(mode):
    image = quarters().convert("L").point(lambda v: 255 * (v > 100)).convert(mode)
    np.testing.assert_array_equal(images.decode(file(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation(orientation, format_):
    if format_ == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    # The stored picture is the upright one, transformed by the inverse of what EXIF says.
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    upright = quarters().resize((64, 32), Image.Resampling.NEAREST)
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(format_, {})
    pixels = images.decode(file(stored, format_, exif=exif, **options))
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 12


def test_unreadable_exif_does_not_matter():
    data = file(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=100)
    assert images.decode(data).shape == (4, 8, 3)


def test_alpha_is_laid_on_the_background():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert images.decode(file(image)).tolist() == [[[255, 255, 255], [255, 0, 0], [127, 127, 127]]]
    assert images.decode(file(image), (0, 0, 255)).tolist()[0][0] == [0, 0, 255]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour(mode):
    image = Image.new(mode, (2, 1), 0)
    if mode == "P":
        image.putpalette([9, 9, 9, 255, 0, 0])
    image.putpixel((1, 0), 1 if mode == "P" else 255 if mode == "L" else (255, 0, 0))
    transparent = (0, 0, 0) if mode == "RGB" else 0
    pixels = images.decode(file(image, transparency=transparent), GREEN)
    assert pixels[0, 0].tolist() == list(GREEN)
    assert pixels[0, 1].tolist() in ([255, 0, 0], [255, 255, 255])


def test_a_transparent_colour_survives_the_turn():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 255, 0, 0])
    image.putpixel((1, 0), 1)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = images.decode(file(image, transparency=0, exif=exif), GREEN)
    assert pixels.tolist() == [[list(RED), list(GREEN)]]


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(format_):
    values = np.array([[0, 255, 257, 32768, 65535]], dtype=np.uint16)
    assert images.decode(file(Image.fromarray(values), format_))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png16(2, 65535, 0, 0, 0, 32896, 65535, width=2), [[255, 0, 0], [0, 128, 255]]),
        (png16(6, 65535, 0, 0, 65535, 9, 9, 9, 0, width=2), [[255, 0, 0], [255, 255, 255]]),
        (png16(4, 32896, 65535, 9, 0, width=2), [[128, 128, 128], [255, 255, 255]]),
        (png16(0, 32896, 7, width=2, transparency=b"\0\7"), [[128, 128, 128], [255, 255, 255]]),
        (tiff16(65535, 0, 0, 0, 32896, 65535, width=2, channels=3), [[255, 0, 0], [0, 128, 255]]),
        (tiff16(65535, 0, 0, 65535, 9, 9, 9, 0, width=2, channels=4), [[255, 0, 0], [255, 255, 255]]),
    ],
    ids=["PNG RGB", "PNG RGBA", "PNG LA", "PNG transparent grey", "TIFF RGB", "TIFF RGBA"],
)
def test_16_bits_with_colour_or_alpha(data, expected):
    assert images.decode(data).tolist() == [expected]


@pytest.mark.parametrize(
    "format_",
    ["PNG", "TIFF", "BMP", "DIB", "TGA", "PPM", "ICO", "QOI", "JPEG", "JPEG2000", "WEBP", "AVIF", "GIF"],
)
def test_formats(format_):
    if format_ not in images._FORMATS or format_ not in Image.SAVE:
        pytest.skip(f"this Pillow is built without {format_}")
    image = quarters().resize((64, 32), Image.Resampling.NEAREST)
    pixels = images.decode(file(image, format_, **({"sizes": [(64, 32)]} if format_ == "ICO" else {})))
    lossy = format_ in {"JPEG", "WEBP", "AVIF"}
    middles = np.s_[8::16, 16::32]
    assert np.abs(pixels[middles].astype(int) - np.asarray(image)[middles]).max() <= (12 if lossy else 0)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_modes_of_tiff(mode):
    image = Image.new("RGB", (4, 4), (200, 100, 50)).convert("P" if mode == "PA" else "RGB").convert(mode)
    expected = (124, 124, 124) if mode in {"L", "LA"} else (200, 100, 50)
    pixels = images.decode(file(image, "TIFF"))
    assert np.abs(pixels.astype(int) - expected).max() <= 4


def test_a_palette_with_alpha():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 255, 9, 9, 9, 0], "RGBA")
    image.putpixel((1, 0), 1)
    assert images.decode(file(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("values", [np.array([[0.1, 200.0]], np.float32), np.array([[-4, 1 << 20]], np.int32)])
def test_samples_without_a_known_range_are_refused(values):
    with pytest.raises(ImageError, match="unsupported_mode"):
        images.decode(file(Image.fromarray(values), "TIFF"))


def test_cmyk_goes_through_its_profile():
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    plain = images.decode(file(image, "TIFF"))
    assert plain[0, 0].tolist() == [255, 0, 0]
    assert images.decode(file(image, "JPEG", quality=100))[0, 0, 0] > 250

    # A profile for which C, M, Y, K mean something else shows: here an RGB one, which does not fit, is passed over.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(images.decode(file(image, "TIFF", icc_profile=srgb)), plain)
    np.testing.assert_array_equal(images.decode(file(image, "TIFF", icc_profile=b"junk" * 40)), plain)


@pytest.mark.parametrize("format_", ["TIFF", "JPEG"])
def test_an_embedded_cmyk_profile_decides_the_colours(format_):
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    pixels = images.decode(file(image, format_, icc_profile=cmyk_profile()))
    assert np.abs(pixels[0, 0].astype(int) - 119).max() <= 3  # Lab 50 in sRGB


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_counts(format_):
    if format_ == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    pixels = images.decode(file(frames[0], format_, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels.astype(int) - RED).max() < 8


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (icon(bomb(10_000)), "too_many_pixels"),
        (b"", "empty_file"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not_an_image"),
        (bomb(30_000), "too_many_pixels"),
        (bomb(10_000), "too_many_pixels"),
        (file(quarters().resize((99, 99)), "JPEG")[:-300], "damaged_image"),
        (file(quarters().resize((99, 99)), "PNG")[:-100], "damaged_image"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(ImageError) as caught:
        images.decode(data)
    assert caught.value.reason == reason


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_either_harmless_or_an_image_error(data):
    good = bytearray(
        file(quarters().resize((40, 30)), data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"])))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = images.decode(bytes(good))
    except ImageError:
        return
    assert pixels.ndim == 3


def test_probe_reads_the_header_alone():
    data = file(quarters().resize((99, 50)), "PNG")
    assert images.probe(data[:-40]) == (50, 99)
    with pytest.raises(ImageError, match="not_an_image"):
        images.probe(b"text")


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_cover_is_resize_then_centre_crop(height, width, rows, columns):
    # Mid tones: Pillow rounds and clips between its two passes, whose order may differ.
    pixels = np.random.default_rng(height * 100 + width).integers(100, 156, (height, width, 3), dtype=np.uint8)
    record = images.size_record(height, width, (rows, columns))
    top, left = int(record[2]), int(record[3])
    factor = max(Fraction(rows, height), Fraction(columns, width))
    scaled = (max(columns, round(width * factor)), max(rows, round(height * factor)))
    whole = np.asarray(Image.fromarray(pixels).resize(scaled, Image.Resampling.LANCZOS))
    expected = whole[top : top + rows, left : left + columns]
    result = images.cover(pixels, (rows, columns))
    assert (result.dtype, result.shape) == (np.uint8, (rows, columns, 3))
    assert np.abs(result.astype(int) - expected).max() <= 3
    assert record.dtype == np.int32
    assert record.tolist() == [height, width, (scaled[1] - rows) // 2, (scaled[0] - columns) // 2, rows, columns]


def test_slivers_and_single_pixels():
    assert images.cover(np.full((1, 80_000, 3), 7, np.uint8), (64, 64)).tolist() == np.full((64, 64, 3), 7).tolist()
    assert images.cover(np.full((1, 1, 3), 9, np.uint8), (32, 32)).tolist() == np.full((32, 32, 3), 9).tolist()


def test_what_is_too_long_is_refused_before_a_scaled_side_is_beyond_int32():
    for size in ((80_000_000, 1), (30_001, 3), (1, 10_001)):
        data = file(Image.new("1", size))
        for refuse in (images.decode, images.probe):
            with pytest.raises(ImageError, match="too_long"):
                refuse(data)
    with pytest.raises(ImageError, match="too_long"):
        images.decode(icon(file(Image.new("1", (20_001, 2)))))  # the icon's own header says 16 x 16
    longest = images.decode(file(Image.new("1", (10_000, 1))))
    side = 200_000
    record = images.size_record(*longest.shape[:2], (side, side))
    assert record.tolist() == [1, 10_000, 0, (10_000 * side - side) // 2, side, side]


GIB = 1 << 30


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
@pytest.mark.parametrize("where", ["open", "load", "convert"])
@pytest.mark.parametrize(
    ("free", "limit", "used", "is_short"),
    [
        (8 * GIB, resource.RLIM_INFINITY, 0, False),
        (GIB // 2, resource.RLIM_INFINITY, 0, True),
        (8 * GIB, 4 * GIB, GIB, False),
        (8 * GIB, 4 * GIB, 4 * GIB - 1000, True),
    ],
)
def test_want_of_memory_is_the_pictures_fault_only_where_there_is_plenty(
    monkeypatch, error, where, free, limit, used, is_short
):
    def fails(*_args, **_options):
        raise error

    owner, name = {
        "open": (Image, "open"),
        "load": (ImageFile.ImageFile, "load"),
        "convert": (Image.Image, "convert"),
    }[where]
    data = file(quarters().convert("L"))
    monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(vms=used))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(SetupError if is_short else ImageError) as caught:
        images.decode(data)
    if is_short:
        assert "decode_threads" in caught.value.remedy
    else:
        assert caught.value.reason == "damaged_image"


def test_want_of_memory_for_exif_does_not_leave_a_picture_turned(monkeypatch):
    def fails(_):
        raise MemoryError

    data = file(quarters())
    monkeypatch.setattr(Image.Image, "getexif", fails)
    with pytest.raises(ImageError, match="damaged_image"):
        images.decode(data)


def test_normalise_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 16, 8, 3)
    tensor = images.normalise(pixels)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (2, 3, 16, 8))
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(images.to_uint8(tensor), pixels)
    assert images.to_uint8(torch.tensor([-9.0, 9.0, 0.0]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_png_and_contact_sheet():
    pixels = np.asarray(quarters())
    np.testing.assert_array_equal(images.decode(images.png(pixels)), pixels)
    big = np.full((20, 30, 3), 100, np.uint8)
    plain = images.decode(images.contact_sheet([big] * 5, columns=2, gap=4))
    assert plain.shape == (3 * 24 + 4, 2 * 34 + 4, 3)
    assert (plain == 100).all(axis=2).sum() == 5 * 20 * 30
    labelled = images.decode(
        images.contact_sheet([big] * 5, 2, ["a word that is far too long", "b", "", "ü", "e"], gap=4)
    )
    assert labelled.shape == (3 * 38 + 4, 72, 3)
    assert (labelled[24:38, 34:38] == 255).all()  # nothing runs into the gap
    assert (labelled[24:38, 4:34] < 255).any()


def test_a_label_of_any_length_is_cut_at_once():
    pixels = np.zeros((64, 64, 3), np.uint8)
    assert images.contact_sheet([pixels], 1, ["w" * 1_000_000]) == images.contact_sheet([pixels], 1, ["w" * 50])
