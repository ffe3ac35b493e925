"""CC3M in tar shards as img2dataset writes them: the samples of :mod:`~minigpt5_jax.data.samples.pairs`."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.tar_index import load_indices

PICTURE, TEXT = 0, 1  # columns of an index


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


class Cc3mTarSource:
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
      training, instruction_every, prompt_set, seed, resample_prompts, num_vokens: as for
        :class:`~minigpt5_jax.data.sources.cc3m.Cc3mSource`.

    Raises:
      DataError: no shards; a shard that is empty, cut short, compressed or damaged; a key twice in
        one shard or in two shards of a folder; no samples.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        cache_dir: str | Path | None = None,
        training: bool = True,
        instruction_every: int = 100,
        prompt_set: str = "head",
        seed: int = 0,
        resample_prompts: bool = True,
        num_vokens: int = 8,
    ):
        self._rules = PairRules(
            instruction_every if training else 0, prompt_set, seed, resample_prompts, num_vokens
        )
        self._given, self._training = str(shards), training
        self._shards = find_shards(shards)
        indices = load_indices(self._shards, None if cache_dir is None else Path(cache_dir))
        counts = [len(index.keys) for index in indices]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._keys = np.concatenate([index.keys for index in indices])
        self._places = np.concatenate([index.places for index in indices])
        self._digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()
        if not len(self._keys):
            raise DataError(f"no samples (images with .txt captions) in {shards}")
        self._refuse_duplicates()

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

    @property
    def rows(self) -> int:
        """Samples in the shards, one pair each."""
        return len(self._keys)

    def __len__(self) -> int:
        return self._rules.count(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def pair(self, row: int, *, picture: bool = True) -> Pair:
        """A pair as it is in its shard, the image as bytes (empty where not asked for).

        Raises:
          SampleError: the image or the caption is missing, the caption is not UTF-8, or the shard
            has changed since it was indexed.
        """
        shard = self._shards[self._shard[row]]
        where = f"{shard}:{self._keys[row].decode()}"
        for column, name in ((PICTURE, "image (.jpg, .png or .webp)"), (TEXT, "caption (.txt)")):
            if not self._places[row, column, 0]:
                raise SampleError(where, f"no {name} in the shard")
        try:
            file = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise SampleError(where, f"shard cannot be read ({error.strerror})") from None
        try:
            caption = self._read(file, row, TEXT, where)
            data = self._read(file, row, PICTURE, where) if picture else b""
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

    def _find(self, index: int) -> tuple[int, bool]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._rules.find(index)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError as :meth:`pair`, or for an empty caption."""
        row, instruction = self._find(index)
        return self._rules.example(self.pair(row), instruction, epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording it may have; errors as ``example``."""
        row, instruction = self._find(index)
        return self._rules.texts(self.pair(row, picture=False), instruction)

    def image_fingerprint(self) -> str:
        """Hash of which image each sample draws, whatever its wording."""
        return hashlib.sha256(f"cc3m-tar {self._digest} {self._rules.every}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of keys, captions and sizes of images, and of everything that changes the samples."""
        settings = dataclasses.astuple(self._rules)
        return hashlib.sha256(f"cc3m-tar {self._digest} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._training else "test"
        shards = f"{len(self._shards):,} tar shards"
        return f"CC3M {kind}: {len(self):,} samples of {self.rows:,} pairs in {shards} ({self._given})"
