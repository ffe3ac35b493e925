"""Pictures: decoding, and the original's resize, crop and flip (reference 5.5), on the host as bytes.

Everything is a PIL call with torchvision's rounding; normalisation happens on the device.  As in the
original, the EXIF orientation is not applied, transparency is dropped, and of an animation the first
frame is taken.  16-bit pictures are brought to 8 bits by their high byte (PIL alone would clip them).
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from minigpt5_jax.data.errors import DataError, SampleError

MAX_PIXELS = 89_478_485  # PIL's own threshold for a decompression bomb; 256 MB as RGB
FLIP_MODES = ("independent", "shared", "off")

Picture = str | Path | bytes


def picture_name(picture: Picture) -> str:
    """What to call a picture in a report."""
    return f"<{len(picture)} bytes in memory>" if isinstance(picture, bytes) else str(picture)


def load_picture(picture: Picture) -> Image.Image:
    """Decodes a file or bytes to 8-bit RGB.

    Raises:
      SampleError: missing, empty, truncated, of no known format, or more than :data:`MAX_PIXELS`.
    """
    name = picture_name(picture)
    try:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    except OSError as error:
        raise SampleError(name, f"picture cannot be read ({error.strerror or error})") from None
    if not data:
        raise SampleError(name, "picture file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _refuse_huge(name, *image.size)
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise SampleError(name, f"no known picture format ({len(data)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise SampleError(name, f"picture is broken ({error})") from None


def _refuse_huge(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(name, f"picture of {width}x{height} has more than {MAX_PIXELS:,} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, in one of PIL's spellings
        high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def pad_square(image: Image.Image) -> Image.Image:
    """Centres a picture on a white square of its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size``, longer side to ``int(size * long / short)``; antialiased bilinear."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short == size:
        return image
    other = int(size * long / short)
    shape = (size, other) if width <= height else (other, size)
    return image.resize(shape, Image.Resampling.BILINEAR)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Middle ``size`` x ``size`` of a picture at least that large; offsets round half to even."""
    width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def prepare_picture(
    picture: Picture, size: int, *, square: bool, flip: bool
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """One picture as the model wants it, u8[size size 3].

    Args:
      picture: file or encoded bytes.
      size: side in pixels.
      square: pad to a white square first (target pictures; input pictures only on request, quirk Q30).
      flip: mirror left to right.

    Raises:
      SampleError: as :func:`load_picture`, or so elongated that resizing would exceed
        :data:`MAX_PIXELS`.
    """
    image = load_picture(picture)
    name, short, long = picture_name(picture), min(image.size), max(image.size)
    _refuse_huge(name, *((long, long) if square else (size, int(size * long / short))))
    image = pad_square(image) if square else image
    image = center_crop(resize_shorter(image, size), size)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image, np.uint8)


@dataclasses.dataclass(frozen=True)
class Flips:
    """Which pictures of one sample are mirrored."""

    target: bool
    images: tuple[bool, ...]


def draw_flips(mode: str, key: tuple[int, ...], num_images: int) -> Flips:
    """Mirrors of one sample, each with probability 1/2, a pure function of ``key``.

    Args:
      mode: ``independent`` (the original, quirk Q17), ``shared`` (all or none) or ``off``.
      key: non-negative integers that name the draw, here (seed, epoch, place in the source).
      num_images: number of input pictures.
    """
    if mode not in FLIP_MODES:
        raise DataError(f"flip_mode must be one of {', '.join(FLIP_MODES)}; got {mode!r}")
    if mode == "off":
        return Flips(False, (False,) * num_images)
    bits = np.random.default_rng(key).integers(0, 2, 1 + num_images).astype(bool).tolist()
    if mode == "shared":
        bits = [bits[0]] * len(bits)
    return Flips(bits[0], tuple(bits[1:]))
