"""Pictures: untrusted bytes to checked pixels, pixels to the autoencoder's input, pictures to PNG and contact sheets.

Pixel arrays are uint8 [height, width, 3], sRGB. PIL lives in this module alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin

from pipeline import memory
from pipeline.data.manifest import Bucket
from pipeline.errors import SetupError

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

MAX_PIXELS = 89_478_485  # 256 MiB of RGB
MAX_ASPECT = 10_000  # so that no scaled side is beyond int32
NORMALISATION = "uint8 / 127.5 - 1"
RESIZE_FILTER = "lanczos"
CROP_RULE = "scaled to cover, centre crop"

# Pillow's raster formats. Not EPS and its like: Pillow hands those to other programs.
_WANTED = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, of pictures inside an ICO too
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # unpacked; some editors keep histories and profiles of a few MiB
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata is no news, and `_open` bounds the size itself

_TO_8_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


REASONS = ("empty_file", "not_an_image", "too_many_pixels", "too_long", "damaged_image", "unsupported_mode")
"""Why a picture cannot be used; `too_long` is over `MAX_ASPECT` times longer than wide."""


class ImageError(Exception):
    """A picture that cannot be used, for one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def probe(data: bytes) -> tuple[int, int]:
    """Height and width of a picture as stored, from its header. Raises ImageError as `decode`, pixels unseen."""
    with _open(data) as image:
        return image.height, image.width


def decode(data: bytes, background: Colour = (255, 255, 255)) -> Pixels:
    """A picture file as upright RGB pixels.

    EXIF orientation is applied, transparency laid on `background`, 16 bits scaled to 8, CMYK taken through its embedded
    profile; of an animation the first frame counts.

    Raises:
        ImageError: with a reason; whatever else a decoder may throw at damaged input is `damaged_image`.
        SetupError: the machine is short of memory, which is no fault of the picture's.
    """
    with _open(data) as image:
        try:
            image.load()
            upright = _upright(image)
        except Exception as error:  # decoders fail on hostile input in every way that Python has
            raise _refusal(error, "damaged_image") from error
        _check_sides(upright)  # an icon's picture may have others than its header says
        try:
            return np.array(_to_rgb(upright, background), dtype=np.uint8)
        except Exception as error:  # modes that Pillow has no way from
            raise _refusal(error, "unsupported_mode") from error


def cover(pixels: Pixels, bucket: Bucket) -> Pixels:
    """Scale a picture until it just covers the bucket (Lanczos, antialiased), and crop the centre.

    Args:
        pixels: [H, W, 3].
        bucket: height h and width w to bring it to.

    Returns:
        [h, w, 3].
    """
    height, width = pixels.shape[:2]
    scaled_height, scaled_width, top, left = _placed(height, width, bucket)
    y, x = height / scaled_height, width / scaled_width  # source pixels per scaled pixel
    box = (left * x, top * y, min((left + bucket[1]) * x, width), min((top + bucket[0]) * y, height))
    # Resizing the crop alone, not the whole: a sliver of 1 x 80,000 would become 64 x 5,120,000 first.
    return np.array(Image.fromarray(pixels).resize((bucket[1], bucket[0]), Image.Resampling.LANCZOS, box=box))


def size_record(height: int, width: int, bucket: Bucket) -> npt.NDArray[np.int32]:
    """What `cover` did, for the size conditioning of SDXL (Podell et al. 2023, section 2.2).

    Args:
        height: of a picture that `decode` takes, as is the width.
        width: see height.
        bucket: height and width that it is brought to.

    Returns:
        int32 [6]: original height and width, crop top and left (in scaled pixels), target height and width.
    """
    _, _, top, left = _placed(height, width, bucket)
    return np.array([height, width, top, left, *bucket], dtype=np.int32)


def normalise(pixels: Pixels | torch.Tensor) -> torch.Tensor:
    """Pixels to the autoencoder's range: uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], on the same device."""
    if not isinstance(pixels, torch.Tensor):
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_uint8(images: torch.Tensor) -> Pixels:
    """The inverse of `normalise`, clamped and rounded: [N, 3, H, W] -> uint8 [N, H, W, 3]."""
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def png(pixels: Pixels) -> bytes:
    """One picture as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """One picture as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def contact_sheet(
    images: Sequence[Pixels] | Pixels, columns: int, labels: Sequence[str] | None = None, gap: int = 4
) -> bytes:
    """Pictures of one size in rows, each with its label below, as a PNG file.

    Args:
        images: N arrays [H, W, 3], at least one.
        columns: pictures per row.
        labels: N texts; what is wider than its picture is cut.
        gap: pixels between pictures.
    """
    height, width = images[0].shape[:2]
    font = ImageFont.load_default(10)
    label_height = 14 if labels else 0
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_height, cell_width = height + label_height + gap, width + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        sheet.paste(Image.fromarray(pixels), (x, y))
        if labels:
            draw.text((x, y + height + 1), _cut(labels[i], width, font), fill=(60, 60, 60), font=font)
    return png(np.asarray(sheet))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty_file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels") from error
    except Exception as error:  # a broken header throws struct.error, ValueError, MemoryError and more
        raise _refusal(error, "not_an_image") from error
    _check_sides(image)
    return image


def _check_sides(image: Image.Image) -> None:
    """Raises ImageError."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too_many_pixels")
    if not image.width or not image.height:
        raise ImageError("damaged_image")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError("too_long")


def _refusal(error: Exception, reason: str) -> ImageError | SetupError:
    """What to raise in place of a decoder's error. A picture must not be rejected for want of memory."""
    if not isinstance(error, MemoryError) and not (isinstance(error, OSError) and "out of memory" in str(error)):
        return ImageError(reason)
    if not memory.is_scarce():  # no picture that may be decoded takes as much: its header lies
        return ImageError("damaged_image")
    return SetupError(
        "out of memory while decoding a picture", "set decode_threads lower, or give this process more memory"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # unreadable EXIF says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """Raises ValueError for modes without a defined way to 8-bit RGB, such as float."""
    if image.mode in {"I", "I;16", "I;16B", "I;16L", "I;16N"}:
        return _from_16_bits(image, background)
    if image.mode == "F":
        raise ValueError("float samples have no known range")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        return _through_profile(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image, background: Colour) -> Image.Image:
    """Grey of 16 bits; a PNG may name one value that is transparent."""
    values: npt.NDArray[Any] = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("more than 16 bits a sample")
    grey = np.empty(values.shape, np.uint8)
    for row, scaled in zip(values, grey, strict=True):  # whole pictures would take 8 bytes a pixel on the way
        scaled[:] = _TO_8_BITS[row]
    rgb = Image.fromarray(grey).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        rgb.paste(background, mask=Image.fromarray(values == transparent))
    return rgb


def _through_profile(image: Image.Image) -> Image.Image:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        turned = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a damaged profile: what viewers do then
        turned = None
    return turned or image.convert("RGB")


def _placed(height: int, width: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """Height and width at which the picture just covers the bucket, and top and left of the bucket within them.

    One side fits, the other is at least as long.
    """
    if bucket[0] * width >= bucket[1] * height:
        scaled_height, scaled_width = bucket[0], max(bucket[1], round(width * bucket[0] / height))
    else:
        scaled_height, scaled_width = max(bucket[0], round(height * bucket[1] / width)), bucket[1]
    return scaled_height, scaled_width, (scaled_height - bucket[0]) // 2, (scaled_width - bucket[1]) // 2


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(text[: 4 * width].split())  # measuring is linear in the length: not for a prompt of megabytes
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
