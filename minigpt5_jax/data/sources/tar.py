"""CC3M in tar shards as img2dataset writes them: the samples of :mod:`~minigpt5_jax.data.samples.pairs`."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.cc3m import PairSource
from minigpt5_jax.data.sources.tar_index import load_indices

logger = logging.getLogger(__name__)

IMAGE, TEXT = 0, 1  # columns of an index
SHOWN = 5


def find_shards(shards: str | Path | Sequence[Path]) -> list[Path]:
    """Tar files by name: all of a folder, those a pattern finds, a single one, or those of a list.

    Raises:
      DataError: there are none.
    """
    if not isinstance(shards, str | Path):
        return list(shards)
    path = Path(shards)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        place = f"no .tar file in the folder {path}"
    else:
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(shards), recursive=True)))
        place = f"tar shards not found: {shards} is no file, no folder and no pattern that finds one"
    if not found:
        raise DataError(place)
    return found


class Cc3mTarSource(PairSource):
    """Pairs of caption and image from tar shards (``00000.tar`` with ``000000000.jpg``, ``.txt``, ``.json``).

    They are the samples that ``Cc3mSource`` makes of a table.  The caption is the ``.txt`` member.  Rows are
    numbered by the shards' names, then by the order of samples in a shard.  Images are read as bytes when a
    sample is asked for; ``.json`` members and the
    ``.parquet`` and ``_stats.json`` files beside the shards are not read.

    Args:
      shards: a folder, a pattern (``cc3m/*.tar``), one file, or a list of files.
      cache_dir: where indices of byte offsets are kept; default: beside the shards
        (``00000.tar.index.npz``).  They are made by the first run and whenever a shard's size or time
        has changed.
      rules: how its pairs become samples.

    Attributes:
      rows: samples in the shards, one pair each.  A sample with two images or texts, and one that another
        shard of the folder holds as well, cannot be fetched.
      unused: (shard, member) of images and texts that belong to no sample.

    Raises:
      DataError: no shards; a shard that is empty, cut short, compressed or damaged; no samples.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[Path],
        rules: PairRules = PairRules(),
        *,
        cache_dir: str | Path | None = None,
    ):
        self._shards = find_shards(shards)
        indices = load_indices(self._shards, None if cache_dir is None else Path(cache_dir))
        counts = [len(index.keys) for index in indices]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._keys = np.concatenate([index.keys for index in indices])
        self._places = np.concatenate([index.places for index in indices])
        self._repeated = [name.decode() for index in indices for name in index.repeated]
        self.unused = [
            (shard, name.decode()) for shard, index in zip(self._shards, indices) for name in index.unused
        ]
        digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()
        if not len(self._keys):
            raise DataError(f"no samples (images with .txt captions) in {shards}")
        self._copies = self._find_copies()
        if self.unused:
            named = "\n  ".join(f"{shard}: {name}" for shard, name in self.unused[:SHOWN])
            logger.warning(
                "%d images and texts in tar shards belong to no sample; the first:\n  %s",
                len(self.unused),
                named,
            )
        place = f"pairs in {len(self._shards):,} tar shards ({shards})"
        super().__init__(rules, len(self._keys), f"cc3m-tar {digest}", place)

    def shard(self, row: int) -> Path:
        """The shard of a row."""
        return self._shards[self._shard[row]]

    def _find_copies(self) -> dict[int, int]:
        """Row -> the first row of its folder with the same key and sizes: it may be a copy."""
        folders = {folder: i for i, folder in enumerate(dict.fromkeys(p.parent for p in self._shards))}
        folder = np.array([folders[path.parent] for path in self._shards], np.int32)[self._shard]
        sizes = self._places[:, :, 1]
        order = np.lexsort((sizes[:, TEXT], sizes[:, IMAGE], self._keys, folder))
        same = np.diff(folder[order]) == 0
        for column in (self._keys, sizes[:, IMAGE], sizes[:, TEXT]):
            same &= column[order][1:] == column[order][:-1]
        copies: dict[int, int] = {}
        for place in np.flatnonzero(same).tolist():
            first, second = int(order[place]), int(order[place + 1])
            copies[second] = copies.get(first, first)
        return copies

    def _refuse_copy(self, row: int, where: str, data: list[bytes]) -> None:
        """SampleError where another shard holds the very bytes of this row."""
        if row not in self._copies:
            return
        first = self._copies[row]
        with open(self.shard(first), "rb", buffering=0) as file:
            same = data == [self._read(file.fileno(), first, column, where) for column in (IMAGE, TEXT)]
        if same:
            raise SampleError(
                where,
                f"the same sample is in {self.shard(first)}; remove the copy, or give each split a folder or "
                "a pattern of its own",
            )

    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A pair as it is in its shard, the image as bytes (empty where not asked for).

        Raises:
          SampleError: the image or the caption is missing or there twice, the sample is in another shard too,
            the caption is not UTF-8, or the shard has changed since it was indexed.
        """
        shard = self.shard(row)
        where = f"{shard}:{self._keys[row].decode()}"
        if self._repeated[row]:
            raise SampleError(
                where, f"the sample has two images or two texts, the second is {self._repeated[row]}"
            )
        for column, name in ((IMAGE, "image (.jpg, .png or .webp)"), (TEXT, "caption (.txt)")):
            if not self._places[row, column, 0]:
                raise SampleError(where, f"no {name} in the shard")
        try:
            file = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise SampleError(where, f"shard cannot be read ({error.strerror})") from None
        try:
            caption = self._read(file, row, TEXT, where)
            wanted = image or row in self._copies
            data = self._read(file, row, IMAGE, where) if wanted else b""
        finally:
            os.close(file)
        self._refuse_copy(row, where, [data, caption])
        try:
            return Pair(row, caption.decode("utf-8"), data if image else b"", where)
        except UnicodeDecodeError as error:
            raise SampleError(where, f"caption is not UTF-8 (byte 0x{caption[error.start]:02x})") from None

    def _read(self, file: int, row: int, column: int, where: str) -> bytes:
        start, size = self._places[row, column].tolist()
        data = os.pread(file, size, start)
        if len(data) != size:
            raise SampleError(where, f"shard ends early, {len(data):,} of {size:,} bytes; has it changed?")
        return data
