"""CC3M: pairs of caption and image (fidelity 5.2)."""

from __future__ import annotations

import abc
import hashlib
import os
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import TextLines
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.base import Source, check_index, image_folder


class PairSource(Source):
    """The samples of numbered pairs, whatever form they are read from.

    Args:
      rules: how pairs become samples.
      rows: number of pairs.
      content: name of the form and hash of what it holds, for fingerprints.
      place: where the pairs are, for the log.
    """

    ends_in_vokens = True

    def __init__(self, rules: PairRules, rows: int, content: str, place: str):
        self._rules, self._content, self._place = rules, content, place
        self.rows = rows

    @abc.abstractmethod
    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A pair as it is written; where no ``image`` is asked for, bytes of its image need not be read."""

    def __len__(self) -> int:
        return self._rules.count(self.rows)

    def _find(self, index: int) -> tuple[int, bool]:
        check_index(index, self)
        return self._rules.find(index)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError as :meth:`pair`, or for an empty caption."""
        row, instruction = self._find(index)
        return self._rules.example(self.pair(row), instruction, epoch)

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index`` in every wording it may have; errors as ``example``."""
        row, instruction = self._find(index)
        return self._rules.texts(self.pair(row, image=False), instruction)

    def image_fingerprint(self) -> str:
        """Hash of which image each sample draws, whatever its wording."""
        return hashlib.sha256(f"{self._content} {self._rules.instruction_every}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of the content and of everything that changes the samples made of it."""
        return hashlib.sha256(f"{self._content} {self._rules.settings()}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._rules.training else "test"
        return f"CC3M {kind}: {len(self):,} samples of {self.rows:,} {self._place}"


class Cc3mSource(PairSource):
    """Pairs of caption and image from a tab-separated table (fidelity 5.2).

    The table has a header naming at least ``caption`` and ``image_path``; other columns are ignored.
    The source of sample ``cc3m_i`` is its cleaned caption and its target the vokens.  In training, rows
    0, 100, 200, ... give a second sample, ``cc3m_i_instruction``, with a system prompt and one of seven
    wordings.

    Args:
      tsv: the table.
      image_root: folder that ``image_path`` is relative to; default: the table's folder.
      rules: how its pairs become samples.

    Attributes:
      rows: rows of the table, one pair each.

    Raises:
      DataError: the table or the folder is missing, not UTF-8, empty, or lacks a column.
    """

    def __init__(self, tsv: str | Path, image_root: str | Path | None = None, rules: PairRules = PairRules()):
        self._lines = TextLines(tsv)
        self._image_root = image_folder(tsv, image_root)
        header = self._lines[0].split("\t")
        missing = [name for name in ("caption", "image_path") if name not in header]
        if missing:
            raise DataError(
                f"{self._lines.where(0)}: no column {' and '.join(missing)}; columns found: {header}. The "
                "first line must name caption and image_path, separated by a tab"
            )
        self._columns = len(header)
        self._caption, self._path = header.index("caption"), header.index("image_path")
        rows = len(self._lines) - 1
        if not rows:
            raise DataError(f"{self._lines.path} has a header and no rows")
        super().__init__(rules, rows, f"cc3m {self._lines.sha256}", f"rows in {self._lines.path}")

    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A row as it is written; SampleError for too few columns or no path."""
        where = self._lines.where(row + 1)
        cells = self._lines[row + 1].split("\t")
        if len(cells) != self._columns:
            raise SampleError(where, f"{len(cells)} tab-separated cells, the header has {self._columns}")
        path = cells[self._path].strip()
        if not path:
            raise SampleError(where, "empty image_path")
        return Pair(row, cells[self._caption], os.path.join(self._image_root, path), where)
