"""Images: decoding, and the original's resize, crop and flip (fidelity 5.5), on the host as bytes.

Pixels are those of PIL calls with torchvision's rounding; normalisation happens on the device.  What is
done with unusual files:

* an image is read as viewers show it: turned by its EXIF orientation, and on white where it is transparent;
  ``as_shown=False`` leaves both out, as the original does (transparent pixels then have whatever colour the
  file gives them, often black);
* texts in a PNG are not read where they are too large, whatever they hold;
* of an animation the first frame is taken;
* CMYK becomes RGB by PIL's plain rule, Adobe's inverted CMYK JPEGs included; colour profiles are ignored;
* 16-bit images are brought to 8 bits by their high byte (PIL alone would clip them);
* the content decides what a file is, never its name; :data:`FORMATS` are read, nothing else;
* a file that is cut short is used only if all its pixels are there;
* everything else is one :class:`~minigpt5_jax.data.errors.SampleError` that names the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from minigpt5_jax.data.errors import DataError, SampleError

MAX_PIXELS = 89_478_485  # PIL's own threshold for a decompression bomb; 256 MB as RGB
MAX_BYTES = 2**29  # of an image file: more than MAX_PIXELS take without compression
TURNED, ON_WHITE, TEXT_LEFT_OUT = (
    "images turned by their EXIF orientation",
    "transparent images put on white",
    "images whose large text chunks are not read",
)
# Raster formats that PIL decodes itself.  Others may start programs (EPS) or draw text (PDF, SVG).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
BAND = 32  # rows worked on at a time, so that they stay in the processor's cache
# Pillow would warn of images that are refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
FLIP_MODES = ("independent", "shared", "off")

ImageSource = str | Path | bytes


def image_name(source: ImageSource) -> str:
    """What to call an image in a report."""
    return f"<{len(source)} bytes in memory>" if isinstance(source, bytes) else str(source)


def read_image(source: ImageSource) -> bytes:
    """The encoded bytes of an image; SampleError where it cannot be read, is no regular file or too large."""
    if isinstance(source, bytes):
        return source
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, a device may have no end
            raise OSError("it is no regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}")
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise SampleError(image_name(source), f"image cannot be read ({reason})") from None


def load_image(source: ImageSource, *, as_shown: bool = True, notes: list[str] | None = None) -> Image.Image:
    """Decodes a file or bytes to 8-bit RGB.

    Args:
      as_shown: turned by the EXIF orientation and on white where transparent; False as the original.
      notes: takes what was done to the image, of :data:`TURNED`, :data:`ON_WHITE`, :data:`TEXT_LEFT_OUT`.

    Raises:
      SampleError: missing, empty, truncated, of no known format, of a kind of pixels that has no 8-bit
        meaning (floating point), or more than :data:`MAX_PIXELS`.
    """
    name, data = image_name(source), read_image(source)
    if not data:
        raise SampleError(name, "image file is empty (0 bytes)")
    return _load(name, data, as_shown, [] if notes is None else notes)


def _load(name: str, data: bytes, as_shown: bool, notes: list[str]) -> Image.Image:
    try:
        return _decode(name, data, as_shown, notes)
    except SampleError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(_formats())
        raise SampleError(name, f"no known image format ({len(data):,} bytes); known: {known}") from None
    except Image.DecompressionBombError:
        raise SampleError(name, f"image has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders of damaged files raise what they like, struct.error for one
        if "too large" in str(error) and (bare := _without_texts(data)) != data:
            notes.append(TEXT_LEFT_OUT)
            return _load(name, bare, as_shown, notes)
        raise SampleError(name, f"image is broken ({error or type(error).__name__})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_huge(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(name, f"image of {width}x{height} has more than {MAX_PIXELS:,} pixels")


def _decode(name: str, data: bytes, as_shown: bool, notes: list[str]) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _refuse_huge(name, *image.size)
        image.load()
        return _to_rgb(name, _as_viewers_show(image, notes) if as_shown else image)


def _as_viewers_show(image: Image.Image, notes: list[str]) -> Image.Image:
    """An image turned by its EXIF orientation and on white where it is transparent."""
    if _orientation(image) in range(2, 9):
        notes.append(TURNED)
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        notes.append(ON_WHITE)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def encode_image(image: Image.Image) -> bytes:
    """An image in memory as the bytes of a file, 8-bit RGB as viewers show it; uncompressed, which is quick.

    Raises:
      SampleError: more than :data:`MAX_PIXELS`, pixels that have no 8-bit meaning, or a file that breaks off.
    """
    name = getattr(image, "filename", "") or "<image in memory>"
    _refuse_huge(name, *image.size)
    file = io.BytesIO()
    try:
        image.load()
        _to_rgb(name, _as_viewers_show(image, [])).save(file, format="PPM")
    except OSError as error:
        raise SampleError(name, f"image is broken ({error})") from None
    return file.getvalue()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF data are broken."""
    with contextlib.suppress(Exception):  # the parser raises what it likes, and pixels need no EXIF
        return image.getexif().get(0x0112, 1)
    return 1


def _without_texts(data: bytes) -> bytes:
    """A PNG without its chunks of text and its colour profile; other data as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[start:stop])
        start = stop
    return b"".join(kept)


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise SampleError(name, "image has floating-point pixels; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16 bits per pixel, in one of PIL's spellings
        high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def pad_square(image: Image.Image) -> Image.Image:
    """Centres an image on a white square of its longer side."""
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
    """Middle ``size`` x ``size`` of an image at least that large; offsets round half to even."""
    width, height = image.size
    if width == height == size:
        return image
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def double(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Bilinear enlargement to twice the sides: PIL's to the last pixel, at a fraction of its cost.

    All files of the papers' data sets are 256 pixels wide and targets are 512, so nearly every target
    image comes this way.  PIL works along rows, rounds, and works along columns; at this factor each
    new pixel is (3 near + far + 2) // 4 in whole numbers, with the outermost pixels repeated.
    """
    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge").reshape(height + 2, -1)
    doubled = np.empty((height, 2, 6 * width), np.uint8)
    for top in range(0, height, BAND):
        band = padded[top : top + BAND + 2].astype(np.uint16)
        left, right = _quarters(band[:, :-6], band[:, 3:-3], band[:, 6:])
        wide = np.empty((len(band), width, 2, 3), np.uint16)
        for c in range(3):  # three long strided runs are far quicker than many short ones
            wide[:, :, 0, c], wide[:, :, 1, c] = left[:, c::3], right[:, c::3]
        wide = wide.reshape(len(band), -1)
        rows = doubled[top : top + BAND]
        rows[:, 0], rows[:, 1] = _quarters(wide[:-2], wide[1:-1], wide[2:])
    return doubled.reshape(2 * height, 2 * width, 3)


def _quarters(before: np.ndarray, here: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(3 here + before + 2) // 4 and (3 here + after + 2) // 4, u16."""
    three = here * np.uint16(3)
    three += 2
    first = three + before
    first >>= 2
    three += after
    three >>= 2
    return first, three


def prepare_image(
    source: ImageSource, size: int, *, square: bool, flip: bool, as_shown: bool = True
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """One image as the model wants it, u8[size size 3].

    Args:
      source: file or encoded bytes.
      size: side in pixels.
      square: pad to a white square first (target images; input images only on request, quirk Q30).
      flip: mirror left to right.
      as_shown: as in :func:`load_image`.

    Raises:
      SampleError: as :func:`load_image`, or so elongated that resizing would exceed
        :data:`MAX_PIXELS`.
    """
    image = load_image(source, as_shown=as_shown)
    name, short, long = image_name(source), min(image.size), max(image.size)
    _refuse_huge(name, *((long, long) if square else (size, int(size * long / short))))
    image = pad_square(image) if square else image
    doubles = image.size == (size // 2, size // 2) and size % 2 == 0
    if not doubles:
        image = center_crop(resize_shorter(image, size), size)
    if flip:  # doubling is the same from either side, and the small image is cheaper to mirror
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image)
    return double(pixels) if doubles else pixels


@dataclasses.dataclass(frozen=True)
class Flips:
    """Which images of one sample are mirrored."""

    target: bool
    images: tuple[bool, ...]


def draw_flip(seed: int, kind: str, image: int) -> bool:
    """Whether an image is mirrored, with probability 1/2: once for a whole run.

    Args:
      kind: ``target`` or ``image``; an image that is drawn and read has a draw for each.
      image: its number (:func:`minigpt5_jax.data.sources.features.image_id`).
    """
    return bool(hashlib.blake2b(f"{seed} {kind} {image}".encode(), digest_size=1).digest()[0] & 1)


def draw_flips(
    mode: str, key: tuple[int, ...], num_images: int, shared_key: tuple[int, ...] | None = None
) -> Flips:
    """Mirrors of one sample, each with probability 1/2, a pure function of its keys.

    Args:
      mode: ``independent`` (the original, quirk Q17), ``shared`` (all or none) or ``off``.
      key: non-negative integers that name the draw: (seed, epoch, place in the source), or without the epoch
        where it is one draw for the whole run.
      num_images: number of input images.
      shared_key: names the draws that several samples share: of input images, which they number alike, and
        of everything where the mode is ``shared``.
    """
    if mode not in FLIP_MODES:
        raise DataError(f"flip_mode must be one of {', '.join(FLIP_MODES)}; got {mode!r}")
    if mode == "off":
        return Flips(False, (False,) * num_images)
    own, inputs = (
        np.random.default_rng(one).integers(0, 2, 1 + num_images).astype(bool).tolist()
        for one in (key, key if shared_key is None else shared_key)
    )
    if mode == "shared":
        return Flips(inputs[0], (inputs[0],) * num_images)
    return Flips(own[0], tuple(inputs[1:]))
