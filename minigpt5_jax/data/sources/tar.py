"""CC3M in tar shards as img2dataset writes them: the samples of :mod:`~minigpt5_jax.data.samples.pairs`."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.cc3m import PairSource
from minigpt5_jax.data.sources.tar_index import load_indices

IMAGE, TEXT = 0, 1  # columns of an index


def find_shards(shards: str | Path) -> list[Path]:
    """Tar files by name: all of a folder, those a pattern finds, or a single one.

    Raises:
      DataError: there are none.
    """
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
      shards: a folder, a pattern (``cc3m/*.tar``) or one file.
      cache_dir: where indices of byte offsets are kept; default: beside the shards
        (``00000.tar.index.npz``).  They are made by the first run and whenever a shard's size or time
        has changed.
      rules: how its pairs become samples.

    Attributes:
      rows: samples in the shards, one pair each.

    Raises:
      DataError: no shards; a shard that is empty, cut short, compressed or damaged; a key twice in
        one shard or in two shards of a folder; no samples.
    """

    def __init__(
        self,
        shards: str | Path,
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
        digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()
        if not len(self._keys):
            raise DataError(f"no samples (images with .txt captions) in {shards}")
        self._refuse_duplicates()
        place = f"pairs in {len(self._shards):,} tar shards ({shards})"
        super().__init__(rules, len(self._keys), f"cc3m-tar {digest}", place)

    def _refuse_duplicates(self) -> None:
        folders = {folder: i for i, folder in enumerate(dict.fromkeys(p.parent for p in self._shards))}
        folder = np.array([folders[path.parent] for path in self._shards], np.int32)[self._shard]
        order = np.lexsort((self._keys, folder))
        same = (np.diff(folder[order]) == 0) & (self._keys[order][1:] == self._keys[order][:-1])
        if same.any():
            place = int(np.flatnonzero(same)[0])
            first, second = (self._shards[self._shard[order[place + k]]] for k in (0, 1))
            key = self._keys[order[place]].decode()
            raise DataError(
                f"{int(same.sum())} keys occur in two shards, the first is {key} in {first} and {second}; "
                "take the copies out of the folder"
            )

    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A pair as it is in its shard, the image as bytes (empty where not asked for).

        Raises:
          SampleError: the image or the caption is missing, the caption is not UTF-8, or the shard
            has changed since it was indexed.
        """
        shard = self._shards[self._shard[row]]
        where = f"{shard}:{self._keys[row].decode()}"
        for column, name in ((IMAGE, "image (.jpg, .png or .webp)"), (TEXT, "caption (.txt)")):
            if not self._places[row, column, 0]:
                raise SampleError(where, f"no {name} in the shard")
        try:
            file = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise SampleError(where, f"shard cannot be read ({error.strerror})") from None
        try:
            caption = self._read(file, row, TEXT, where)
            data = self._read(file, row, IMAGE, where) if image else b""
        finally:
            os.close(file)
        try:
            return Pair(row, caption.decode("utf-8"), data, where)
        except UnicodeDecodeError as error:
            raise SampleError(where, f"caption is not UTF-8 (byte 0x{caption[error.start]:02x})") from None

    def _read(self, file: int, row: int, column: int, where: str) -> bytes:
        start, size = self._places[row, column].tolist()
        data = os.pread(file, size, start)
        if len(data) != size:
            raise SampleError(where, f"shard ends early, {len(data):,} of {size:,} bytes; has it changed?")
        return data
