"""What one record holds: a pair, a story or a dialogue as the raw files spell it, and its pictures."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.sources import Cc3mSource, Cc3mTarSource
from minigpt5_jax.data.transforms import Picture, load_picture, pad_square, picture_name

JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of a data set.

    Attributes:
      fields: what its record says besides the pictures, as plain JSON values.
      pictures: paths or encoded bytes, in the order its fields count them.
      where: place in the raw files (``train.tsv:18``).
    """

    fields: dict[str, Any]
    pictures: tuple[Picture, ...]
    where: str


@runtime_checkable
class Units(Protocol):
    """Raw files as units, the unusable ones among them: ``units[i]`` raises SampleError for these."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Unit: ...

    def fingerprint(self) -> str: ...


class Cc3mUnits:
    """Rows of a CC3M table, or samples of tar shards (a folder, a pattern or a ``.tar`` file)."""

    def __init__(self, path: str, image_root: str | None):
        self._root = Path(path).parent if image_root is None else Path(image_root)
        if Path(path).is_dir() or "*" in path or path.endswith(".tar"):
            self._source = Cc3mTarSource(path, training=False)
        else:
            self._source = Cc3mSource(path, image_root, training=False)

    def __len__(self) -> int:
        return self._source.rows

    def __getitem__(self, index: int) -> Unit:
        pair = self._source.pair(index)
        self._source.texts(index)  # refuses an empty caption
        name = "" if isinstance(pair.picture, bytes) else os.path.relpath(pair.picture, self._root)
        fields = {"row": pair.row, "caption": pair.caption, "image_path": name}
        return Unit(fields, (pair.picture,), pair.where)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


UNITS: dict[str, type[Units]] = {"cc3m": Cc3mUnits}


def open_units(dataset: str, path: str, image_root: str | None) -> Units:
    """Units of a raw data set, opened once in each process unless the file changes.

    Raises:
      DataError: as the data set's source.
    """
    if dataset not in UNITS:
        raise DataError(f"unknown data set {dataset!r}; known: {', '.join(UNITS)}")
    status = os.stat(path) if os.path.exists(path) else None
    return _open_units(dataset, path, image_root, status and (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _open_units(dataset: str, path: str, image_root: str | None, stamp: object) -> Units:
    return UNITS[dataset](path, image_root)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture as it is stored: encoded bytes, width and height in pixels."""

    data: bytes
    width: int
    height: int


def encode_picture(picture: Picture, letterbox: int | None = None) -> Encoded:
    """Bytes of a picture as they are, decoded once to see that they can be.

    Args:
      letterbox: side of a white square that the picture is fitted into, kept whole (reference 5.5); a
        picture that has that size already keeps its bytes, another is stored as JPEG.

    Raises:
      SampleError: missing or broken.
    """
    name = picture_name(picture)
    try:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        image = load_picture(data)
    except OSError as error:
        raise SampleError(name, f"picture cannot be read ({error.strerror or error})") from None
    except SampleError as error:
        raise SampleError(name, error.reason) from None
    if letterbox is None or image.size == (letterbox, letterbox):
        return Encoded(data, *image.size)
    longer = max(image.size)
    width, height = (max(1, round(side * letterbox / longer)) for side in image.size)
    image = pad_square(image.resize((width, height), Image.Resampling.LANCZOS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Encoded(buffer.getvalue(), *image.size)
