"""CC3M: pairs of caption and image (fidelity 5.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.base import TextLines


class Cc3mSource:
    """Pairs of caption and image from a tab-separated table (fidelity 5.2).

    The table has a header naming at least ``caption`` and ``image_path``; other columns are ignored.
    The source of sample ``cc3m_i`` is its cleaned caption and its target the vokens.  In training, rows
    0, 100, 200, ... give a second sample, ``cc3m_i_instruction``, with a system prompt and one of seven
    wordings.

    Args:
      tsv: the table.
      image_root: folder that ``image_path`` is relative to; default: the table's folder.
      training: with instruction samples.
      instruction_every: rows from one instruction sample to the next; 0 for none.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      seed: of the wording.
      resample_prompts: draw the wording again each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one image.

    Raises:
      DataError: the table or the folder is missing, not UTF-8, empty, or lacks a column.
    """

    def __init__(
        self,
        tsv: str | Path,
        image_root: str | Path | None = None,
        *,
        training: bool = True,
        instruction_every: int = 100,
        prompt_set: str = "head",
        seed: int = 0,
        resample_prompts: bool = True,
        num_vokens: int = 8,
    ):
        self._lines = TextLines(tsv)
        self._image_root = Path(tsv).parent if image_root is None else Path(image_root)
        if not self._image_root.is_dir():
            raise DataError(f"image folder not found: {self._image_root}")
        self._rules = PairRules(
            instruction_every if training else 0, prompt_set, seed, resample_prompts, num_vokens
        )
        header = self._lines[0].split("\t")
        missing = [name for name in ("caption", "image_path") if name not in header]
        if missing:
            raise DataError(
                f"{self._lines.where(0)}: no column {' and '.join(missing)}; columns found: {header}. The "
                "first line must name caption and image_path, separated by a tab"
            )
        self._columns = len(header)
        self._caption, self._path = header.index("caption"), header.index("image_path")
        self._rows = len(self._lines) - 1
        if not self._rows:
            raise DataError(f"{self._lines.path} has a header and no rows")
        self._training = training

    @property
    def rows(self) -> int:
        """Rows of the table, one pair each."""
        return self._rows

    def __len__(self) -> int:
        return self._rules.count(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def pair(self, row: int) -> Pair:
        """A row as it is written; SampleError for too few columns or no path."""
        where = self._lines.where(row + 1)
        cells = self._lines[row + 1].split("\t")
        if len(cells) != self._columns:
            raise SampleError(where, f"{len(cells)} tab-separated cells, the header has {self._columns}")
        path = cells[self._path].strip()
        if not path:
            raise SampleError(where, "empty image_path")
        return Pair(row, cells[self._caption], os.path.join(self._image_root, path), where)

    def _find(self, index: int) -> tuple[Pair, bool]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row, instruction = self._rules.find(index)
        return self.pair(row), instruction

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError for a row with too few columns or an empty caption."""
        return self._rules.example(*self._find(index), epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording it may have; errors as ``example``."""
        return self._rules.texts(*self._find(index))

    def image_fingerprint(self) -> str:
        """Hash of which image each sample draws, whatever its wording."""
        return hashlib.sha256(f"cc3m {self._lines.sha256} {self._rules.every}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of the table and of everything that changes the samples made of it."""
        settings = dataclasses.astuple(self._rules)
        return hashlib.sha256(f"cc3m {self._lines.sha256} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._training else "test"
        return f"CC3M {kind}: {len(self):,} samples of {self._rows:,} rows in {self._lines.path}"
