"""Where the samples of a tar shard lie: byte offsets, read once from the headers and kept beside it.

A shard is an uncompressed tar as webdataset and img2dataset write it: an image and a text that share a name
up to its last dot are one sample (``000000017.jpg`` and ``000000017.txt``, ``22.05.jpg`` and
``22.05.txt``), in any order.  Headers are read strictly (checksums, sizes, end mark), because a shard cut
short by a broken download looks whole to lenient readers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt5_jax.data.errors import DataError

logger = logging.getLogger(__name__)

BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp")
OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "ppm")  # not looked for, but named where they are met
TEXT = "txt"
FORMAT = 2  # of index files; another number and they are rebuilt


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name and the place of its bytes."""

    name: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class ShardIndex:
    """Samples of one shard in the order in which their first members appear.

    Attributes:
      keys: S[n], the names up to the last dot, UTF-8.
      places: i64[n 2 2], (start, size) of image and text; start 0 where the sample lacks it.
      repeated: S[n], the name of a second image or text that a sample has, which makes it unusable; or empty.
      unused: S[k], images and texts that belong to no sample (``7.mask.png`` beside ``7.jpg`` and ``7.txt``).
      digest: of keys, texts and sizes of images.
    """

    keys: np.ndarray
    places: np.ndarray
    repeated: np.ndarray
    unused: np.ndarray
    digest: str


def read_members(path: Path) -> Iterator[Member]:
    """Regular files of an uncompressed tar.

    Raises:
      DataError: no regular file, empty, compressed, damaged, or without its end mark (cut short).
    """
    if not path.is_file():
        raise DataError(
            f"tar shard is no regular file (a link to nothing?): {path}; take it out of the folder"
        )
    size = path.stat().st_size
    if not size:
        raise DataError(f"tar shard is empty (0 bytes): {path}; fetch it again")
    with open(path, "rb", buffering=0) as file:
        offset, long_name, pax = 0, None, {}
        while True:
            header = os.pread(file.fileno(), BLOCK, offset)
            if len(header) < BLOCK:
                raise DataError(f"tar shard ends without its end mark after {offset:,} bytes: {path}{_CUT}")
            if not any(header):
                return
            kind, name, length = _parse_header(header, path, offset)
            length = int(pax.get("size", length))
            if length < 0:  # the next header would lie before this one
                raise DataError(f"member {name} of tar shard {path} has the size {length:,}{_CUT}")
            start = offset + BLOCK
            offset = start + -(-length // BLOCK) * BLOCK
            if start + length > size:
                raise DataError(
                    f"tar shard is cut short: {path} has {size:,} bytes, its member {name} ends at "
                    f"{start + length:,}{_CUT}"
                )
            if kind in b"xL":  # what belongs to the next member: PAX records, GNU's long name
                data = os.pread(file.fileno(), length, start)
                if kind == b"x":
                    pax = _pax_records(data, path)
                else:
                    long_name = data.rstrip(b"\0").decode("utf-8", "replace")
                continue
            if kind in b"0\0":
                yield Member(long_name or pax.get("path") or name, start, length)
            long_name, pax = None, {}


_CUT = "; fetch it again or take it out of the folder"


def _parse_header(header: bytes, path: Path, offset: int) -> tuple[bytes, str, int]:
    """Kind, name and size of a member."""

    def number(field: bytes) -> int:
        return int(field.strip(b" \0") or b"0", 8)

    try:
        checksum, size = number(header[148:156]), number(header[124:136])
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        packed = header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7") or header[:4] == b"\x28\xb5\x2f\xfd"
        what = "compressed; unpack it to a plain .tar" if packed and not offset else "damaged" + _CUT
        raise DataError(f"no tar header at byte {offset:,} of {path}: the shard is {what}")
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    name = prefix + b"/" + name if prefix else name
    return header[156:157], name.decode("utf-8", "replace"), size


def _pax_records(data: bytes, path: Path) -> dict[str, str]:
    """``length key=value`` records; only those that say where the next member is or what it is called."""
    records = {}
    try:
        while data.strip(b"\0"):
            space = data.index(b" ")
            length = int(data[:space])
            if length <= space:
                raise ValueError(length)
            key, _, value = data[space + 1 : length - 1].partition(b"=")
            if key in (b"path", b"size"):
                records[key.decode()] = (
                    str(int(value)) if key == b"size" else value.decode("utf-8", "replace")
                )
            data = data[length:]
    except ValueError:
        raise DataError(f"damaged PAX header in tar shard {path}{_CUT}") from None
    return records


def make_index(path: Path) -> ShardIndex:
    """Reads all headers and texts of a shard; DataError as :func:`read_members`."""
    rows: dict[str, list[Member | None]] = {}
    repeated: dict[str, str] = {}
    unused: list[str] = []
    for member in read_members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.rpartition(".")
        ending = ending.lower()
        column = 0 if ending in IMAGES else 1 if ending == TEXT else None
        if column is None or not stem:
            unused += [member.name] * (ending in OTHER_IMAGES)
            continue
        key = f"{folder}/{stem}" if folder.strip("./") else stem
        row = rows.setdefault(key, [None, None])
        if row[column] is not None:
            repeated.setdefault(key, member.name)
        else:
            row[column] = member
    for key in [key for key in rows if _is_extra(key, rows)]:
        unused += [member.name for member in rows.pop(key) if member is not None]
    places = np.zeros((len(rows), 2, 2), np.int64)
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for i, (key, members) in enumerate(rows.items()):
            for column, member in enumerate(members):
                if member is not None:
                    places[i, column] = member.start, member.size
            start, size = places[i, 1].tolist()
            text = os.pread(file.fileno(), size, start) if start else b""
            digest.update(repr((key, text, int(places[i, 0, 1]))).encode())
    second = _texts([repeated.get(key, "") for key in rows])
    return ShardIndex(_texts(rows), places, second, _texts(unused), digest.hexdigest())


def _is_extra(key: str, rows: Mapping[str, list[Member | None]]) -> bool:
    """Whether half a sample only adds to a whole one, whose key it begins with (``7.mask`` to ``7``)."""
    folder, slash, name = key.rpartition("/")
    whole = rows.get(folder + slash + name.partition(".")[0], [None])
    return None in rows[key] and None not in whole


def _texts(values: Iterable[str]) -> np.ndarray:
    found = [value.encode() for value in values]
    return np.array(found, np.bytes_) if found else np.zeros(0, "S1")


def _index_file(shard: Path, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return shard.with_name(shard.name + ".index.npz")
    folder = hashlib.sha256(str(shard.parent.resolve()).encode()).hexdigest()[:12]
    return cache_dir / f"{folder}-{shard.name}.index.npz"


def _identity(shard: Path) -> np.ndarray:
    status = shard.stat()
    return np.array([FORMAT, status.st_size, status.st_mtime_ns], np.int64)


def _read_index(file: Path, shard: Path) -> ShardIndex | None:
    """A kept index, or None where there is none that belongs to the shard as it is now."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if np.array_equal(arrays["identity"], _identity(shard)):
                names = ("keys", "places", "repeated", "unused")
                return ShardIndex(*(arrays[name] for name in names), str(arrays["digest"]))
    except (OSError, ValueError, KeyError, EOFError):
        pass
    except Exception as error:  # a damaged zip file, in one of several types
        logger.debug("index %s cannot be read and is rebuilt (%s)", file, error)
    return None


def _keep_index(file: Path, shard: Path, index: ShardIndex) -> bool:
    """Writes an index whole or not at all; False where the folder cannot be written."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            np.savez(out, identity=_identity(shard), **vars(index))
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return False
    return True


def load_indices(shards: Sequence[Path], cache_dir: Path | None = None) -> list[ShardIndex]:
    """The index of each shard: kept ones read, the others made, with a progress bar, and kept.

    Args:
      shards: tar files.
      cache_dir: where indices are kept; default: beside the shards.

    Raises:
      DataError: as :func:`make_index`.
    """
    indices = [_read_index(_index_file(shard, cache_dir), shard) for shard in shards]
    todo = [i for i, index in enumerate(indices) if index is None]
    kept = True
    for i in tqdm(todo, desc="indexing tar shards", unit="shard", disable=not todo):
        indices[i] = make_index(shards[i])
        kept &= _keep_index(_index_file(shards[i], cache_dir), shards[i], indices[i])
    if not kept:
        place = cache_dir or shards[0].parent
        logger.warning("no index of tar shards can be kept in %s: it is rebuilt by every run", place)
    return indices
