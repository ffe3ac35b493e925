"""Precomputed features: images that went through their frozen towers once, for every later step and run.

A store is a folder that ``prepare features`` or the first epoch of training makes for the images of one
source and one set of towers::

    manifest.json          what is stored, of which images, by which towers (hashes)
    00000.target.values    posterior moments of images to draw, one [h w 2c] after another
    00000.target.keys      u64 key of each of them (:func:`image_id`, lowest bit: mirrored); written after it
    00000.image.values     Q-Former states of input images [q c], and so on

Files only grow, each by one process of one run: another run, another number of processes or a restart after a
kill adds files of its own and reads them all.  Values without a key were cut off while they were written.
Pixels are in [-1, 1] (the original's script left that step out, quirk Q9).  Fidelity 5.6.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, UInt64

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.sources.base import Source

logger = logging.getLogger(__name__)

FORMAT = 3
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MANIFEST = "manifest.json"
KEY = np.dtype("<u8")
RECENT = 2**16
"""Features that a store remembers one by one before it reads its files again."""


@runtime_checkable
class FixedImages(Protocol):
    """A source that can say which images its samples have apart from how they are worded."""

    def image_fingerprint(self) -> str: ...


def image_fingerprint(source: Source) -> str:
    """Hash of which images each sample has; of everything where a source does not know that apart."""
    return source.image_fingerprint() if isinstance(source, FixedImages) else source.fingerprint()


def image_id(image: ImageSource, root: str = "") -> int:
    """An even 64-bit number that names an image: hash of its path below ``root``, or of its encoded bytes."""
    if not isinstance(image, bytes):
        image = str(image).removeprefix(root.rstrip(os.sep) + os.sep if root else "").encode()
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") & ~1


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What a store holds.

    Attributes:
      image_fingerprint: of the source (:func:`image_fingerprint`).  samples: its length.
      towers: tower -> hash of its weights, for the towers that made the features.
      target: (h, w, 2c) of moments of an image to draw, None where only input images are stored.
      image: (q, c) of an input image's states, None where only targets are stored.
      target_size, image_size: sides of the images in pixels.
      images_as_shown: whether images were turned by EXIF and put on white where transparent.
      pad_input_square: whether input images were padded (quirk Q30).
      target_dtype, image_dtype: of the stored numbers, ``bfloat16`` or ``float32``.
      pixel_range: what the target's tower saw black and white as (quirk Q9).
      compute_dtype: in which the towers computed.
    """

    image_fingerprint: str
    samples: int
    towers: dict[str, str]
    target: tuple[int, ...] | None
    image: tuple[int, ...] | None
    target_size: int
    image_size: int
    pad_input_square: bool = False
    images_as_shown: bool = True
    target_dtype: str = "float32"
    image_dtype: str = "float32"
    pixel_range: tuple[float, ...] = (-1.0, 1.0)
    compute_dtype: str = "float32"

    def __post_init__(self):
        for dtype in (self.target_dtype, self.image_dtype):
            if dtype not in DTYPES:
                raise DataError(f"features are stored as {' or '.join(DTYPES)}, not {dtype!r}")
        if self.target is None and self.image is None:
            raise DataError("a feature store holds targets, input images or both")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Kind of image, ``target`` or ``image`` -> shape of its features."""
        given = {"target": self.target, "image": self.image}
        return {kind: shape for kind, shape in given.items() if shape is not None}

    def dtype(self, kind: str) -> np.dtype:
        """Type of the stored numbers of one kind."""
        return DTYPES[self.target_dtype if kind == "target" else self.image_dtype]

    def bytes_of(self, kind: str) -> int:
        """Bytes of the features of one image."""
        return math.prod(self.shapes()[kind]) * self.dtype(kind).itemsize

    def differences(self, stored: FeatureSpec) -> list[str]:
        """``name: stored ..., now ...`` for everything in which a store is not one for this.

        Kinds of features, and towers that make them, may be stored without being asked for here.
        """
        same: dict[str, Any] = {}
        for kind in ("target", "image"):
            if getattr(self, kind) is None:
                same |= {name: getattr(stored, name) for name in (kind, f"{kind}_size", f"{kind}_dtype")}
                same["towers"] = stored.towers | self.towers
        if self.image is None:
            same["pad_input_square"] = stored.pad_input_square
        self = dataclasses.replace(self, **same)
        then, now = dataclasses.asdict(stored), dataclasses.asdict(self)
        return [
            f"{name}: stored {then[name]!r}, now {now[name]!r}" for name in now if then[name] != now[name]
        ]


def read_spec(folder: str | Path) -> FeatureSpec:
    """The manifest of a store; DataError where there is none, or of another format."""
    file = Path(folder) / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if content.pop("format") != FORMAT:
            raise DataError(
                f"{file} is of another version; delete the folder, or choose another, and prepare again"
            )
        return FeatureSpec(**{name: tuple(v) if isinstance(v, list) else v for name, v in content.items()})
    except FileNotFoundError:
        raise DataError(f"no feature store in {folder}: {MANIFEST} is missing") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged ({error}); delete the folder and prepare the features again"
        ) from None


def check_spec(folder: str | Path, wanted: FeatureSpec) -> None:
    """Whether the store in ``folder`` holds what a run asks for.

    Raises:
      DataError: it is of other images, sizes or towers, each with both values.
    """
    if differ := wanted.differences(read_spec(folder)):
        lines = "\n  ".join(differ)
        raise DataError(
            f"the features in {folder} do not belong to this run; delete that folder or name another one "
            f"(data.features), and they are made again:\n  {lines}"
        )


def check_folder(folder: Path, wanted: FeatureSpec) -> bool:
    """Whether a store is in ``folder``, checked as :func:`check_spec` does.

    Raises:
      DataError: it is of other images or towers, or there are features of which no manifest tells.
    """
    # In this order: another process writes its manifest before its first features.
    features = any(folder.glob("*.keys"))
    if (folder / MANIFEST).is_file():
        check_spec(folder, wanted)
        return True
    if features:
        raise DataError(f"{folder} holds features without {MANIFEST}; copy it whole or delete it")
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Where the features of one kind are: sorted keys, and file and row of each."""

    keys: UInt64[np.ndarray, " n"]
    files: np.ndarray
    rows: np.ndarray


class FeatureStore:
    """Features by the key of their image; small to send to worker processes, which read the files themselves.

    Args:
      folder: of the store; it may be empty.
      spec: what it holds; by default as its manifest says.
      warn: of files that were cut short.

    Attributes:
      complete: every image that can be read has its features here; no others will be made.

    Raises:
      DataError: no ``spec`` and no store, or one of another format.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: FeatureSpec | None = None,
        *,
        complete: bool = False,
        warn: bool = True,
    ):
        self.folder = Path(folder)
        self.spec = read_spec(folder) if spec is None else spec
        self.complete, self._epoch = complete, 0
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self.refresh(warn=warn)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "spec": self.spec, "complete": self.complete}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, warn=False)

    def __len__(self) -> int:
        """Features of all kinds."""
        return sum(len(table.keys) for table in self._tables.values()) + sum(map(len, self._recent.values()))

    def file(self, number: int, kind: str, what: str) -> Path:
        """``values`` or ``keys`` of one kind in the file of that number."""
        return self.folder / f"{number:05d}.{kind}.{what}"

    def refresh(self, *, warn: bool = False) -> None:
        """Reads what was added to the files since, by this process or another."""
        self._tables = {kind: self._read(kind, warn) for kind in self.spec.shapes()}
        self._recent: dict[str, dict[int, tuple[int, int]]] = {kind: {} for kind in self.spec.shapes()}

    def _read(self, kind: str, warn: bool) -> Table:
        keys, files, rows = [np.zeros(0, KEY)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for path in sorted(self.folder.glob(f"*.{kind}.keys")):
            number = int(path.name.split(".")[0])
            found = np.fromfile(path, KEY, count=path.stat().st_size // KEY.itemsize)
            values = self.file(number, kind, "values")
            there = values.stat().st_size // self.spec.bytes_of(kind) if values.is_file() else 0
            if warn and there < len(found):
                logger.warning(
                    "%s is cut short: %d of %d features are there; the others are made again",
                    *(values, there, len(found)),
                )
            keys.append(found[:there])
            files.append(np.full(len(keys[-1]), number, np.int32))
            rows.append(np.arange(len(keys[-1])))
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        return Table(unique, np.concatenate(files)[first], np.concatenate(rows)[first])

    def at_epoch(self, epoch: int) -> None:
        """Reads the files again where another epoch than before begins: what the last one wrote."""
        if epoch > self._epoch:
            self._epoch = epoch
            if not self.complete:
                self.refresh()

    def add(self, kind: str, file: int, first: int, keys: UInt64[np.ndarray, " n"]) -> None:
        """Remember rows that this process appends to a file; they are read when they are written."""
        recent = self._recent[kind]
        recent.update((int(key), (file, first + row)) for row, key in enumerate(keys))

    def forget_recent(self) -> None:
        """Reads the files again where more than ``RECENT`` features were added; all must be written."""
        if sum(map(len, self._recent.values())) > RECENT:
            self.refresh()

    def has(self, kind: str, keys: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the keys have features in the files, as they were last read."""
        known = self._tables[kind].keys
        if not len(known):
            return np.zeros(len(keys), bool)
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return known[places] == keys

    def find(self, kind: str, key: int) -> Float[np.ndarray, "..."] | None:
        """Features of the image with that key; None where there are none.

        Raises:
          DataError: the file cannot be read any more.
        """
        table, place = self._tables[kind], self._recent[kind].get(key)
        if place is None:
            at = int(np.searchsorted(table.keys, np.uint64(key)))
            if at == len(table.keys) or int(table.keys[at]) != key:
                return None
            place = int(table.files[at]), int(table.rows[at])
        file, row = place
        mapped = self._maps.get((kind, file))
        if mapped is None or row >= len(mapped):
            mapped = self._maps[kind, file] = self._map(kind, file)
        if row >= len(mapped):
            raise DataError(f"{self.file(file, kind, 'values')} was cut while it was used; start again")
        return mapped[row]

    def _map(self, kind: str, file: int) -> np.ndarray:
        path, shape, dtype = self.file(file, kind, "values"), self.spec.shapes()[kind], self.spec.dtype(kind)
        try:
            count = path.stat().st_size // self.spec.bytes_of(kind)
            raw = np.memmap(path, np.uint8, "r", shape=(count * self.spec.bytes_of(kind),))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete it and its keys") from None
        return np.asarray(raw).view(dtype).reshape(count, *shape)


def describe_size(counts: Mapping[str, int], spec: FeatureSpec) -> tuple[int, str]:
    """(bytes, words) of so many features of each kind, with their keys."""
    size = sum(count * (spec.bytes_of(kind) + KEY.itemsize) for kind, count in counts.items())
    kinds = " and ".join(
        f"{count:,} {'images to draw' if kind == 'target' else 'input images'}"
        for kind, count in counts.items()
        if count
    )
    return size, f"{kinds}: {readable_bytes(size)}"


def readable_bytes(size: int) -> str:
    """``1.2 GB``, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
