"""CC3M: pairs of caption and image (fidelity 5.2)."""

from __future__ import annotations

import abc
import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.lines import TextLines
from minigpt5_jax.data.paths import FETCH, image_folder, is_url
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.sources.base import Source, check_index


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

    The table has a header naming at least ``caption`` and ``image_path``; other columns are ignored.  Cells
    may be in quotes, as pandas writes and reads them; then a cell may hold tabs, line ends and double quotes.
    The source of sample ``cc3m_i`` is its cleaned caption and its target the vokens.  In training, rows
    0, 100, 200, ... give a second sample, ``cc3m_i_instruction``, with a system prompt and one of seven
    wordings.

    Args:
      tsv: the table.
      image_root: folder that ``image_path`` is relative to; default: the table's folder.
      rules: how its pairs become samples.
      allow_outside_images: whether image paths may lead out of their folder.

    Attributes:
      rows: rows of the table, one pair each.

    Raises:
      DataError: the table or the folder is missing, not UTF-8, empty, or lacks a column.
    """

    def __init__(
        self,
        tsv: str | Path,
        image_root: str | Path | None = None,
        rules: PairRules = PairRules(),
        *,
        allow_outside_images: bool = False,
    ):
        self._lines = TextLines(tsv)
        self._images = image_folder(tsv, image_root, allow_outside_images)
        self.image_root = str(self._images.root)
        header = split_row(self._lines[0]) or [self._lines[0]]
        missing = [name for name in ("caption", "image_path") if name not in header]
        if missing:
            raise DataError(
                f"{self._lines.where(0)}: no column {' and '.join(missing)}; columns found: {header}. "
                + header_hint(self._lines.path, header)
            )
        self._columns = len(header)
        self._caption, self._path = header.index("caption"), header.index("image_path")
        self._first = np.arange(1, len(self._lines))  # line where each row begins
        if self._lines.quotes:
            self._first = np.fromiter(row_starts(self._lines, self._columns), np.int64)
        rows = len(self._first)
        if not rows:
            raise DataError(f"{self._lines.path} has a header and no rows")
        super().__init__(rules, rows, f"cc3m {self._lines.sha256}", f"rows in {self._lines.path}")

    def pair(self, row: int, *, image: bool = True) -> Pair:
        """A row as it is written; SampleError for too few columns, an open quote or no path."""
        first = int(self._first[row])
        where = self._lines.where(first)
        cells = read_row(self._lines, first, self._columns, where)[0]
        path = cells[self._path].strip()
        if not path:
            raise SampleError(where, "empty image_path")
        return Pair(row, cells[self._caption], self._images.path(path, where), where)


def header_hint(path: Path, header: Sequence[str]) -> str:
    """What a first line without the columns of a table probably is, and what to do."""
    if header[0].lstrip().startswith(("{", "[")):
        return "This looks like JSONL: read it with data.format=jsonl (check: --format jsonl)"
    if any(is_url(cell) or cell.lower() in ("url", "image_url") for cell in header):
        named = ""
        if any(map(is_url, header)):  # as CC3M is published: no header at all
            command = f"(printf 'caption\\turl\\n'; cat {path.name}) > named.tsv"
            named = f"give it a header, with: {command}; then "
        return f"This is a table of URLs and not of images: {named}{FETCH}"
    if len(header) == 1 and "," in header[0]:
        tabs = "csv.writer(open('new.tsv', 'w', newline=''), 'excel-tab')"
        code = f"import csv, sys; {tabs}.writerows(csv.reader(open(sys.argv[1], newline='')))"
        command = f'python -c "{code}" {shlex.quote(path.name)}'
        return f"This looks like a table with commas, and tabs are wanted; convert it with: {command}"
    return "The first line must name caption and image_path, separated by a tab"


_QUOTED = re.compile(r'"((?:[^"]|"")*+)"')
MAX_JOINED = 100  # lines of one row in quotes


def split_row(text: str) -> list[str] | None:
    """Cells of a row by the rules of pandas: quotes count where a cell begins; None where one stays open."""
    if '"' not in text:
        return text.split("\t")
    found, place = [], 0
    while True:
        value = ""
        if text.startswith('"', place):
            match = _QUOTED.match(text, place)
            if match is None:
                return None
            value, place = match[1].replace('""', '"'), match.end()
        stop = text.find("\t", place)
        if stop < 0:
            return [*found, value + text[place:]]
        found.append(value + text[place:stop])
        place = stop + 1


def read_row(lines: Sequence[str], first: int, columns: int, where: str) -> tuple[list[str], int]:
    """(cells, line behind them) of the row that begins in a line.

    A quote that stays open joins the lines up to where it closes.  But a line that is a row as it stands is
    read as written, so that a lone quote takes no other lines with it.

    Raises:
      SampleError: another number of cells than ``columns``, or a quote that never closes.
    """
    text = lines[first]
    cells, stop = split_row(text), first + 1
    if cells is None:
        plain = text.split("\t")
        if len(plain) == columns:
            return plain, stop
        while cells is None and stop < min(first + MAX_JOINED, len(lines)):
            text += "\n" + lines[stop]
            cells, stop = split_row(text), stop + 1
        if cells is None or len(cells) != columns:
            raise SampleError(
                where, "opens a quote that it does not close; write the table with quoting=csv.QUOTE_NONE"
            )
    if len(cells) != columns:
        raise SampleError(where, f"{len(cells)} tab-separated cells, the header has {columns}")
    return cells, stop


def row_starts(lines: Sequence[str], columns: int) -> Iterator[int]:
    """The lines where the rows behind the header begin; a line that is no row counts as one."""
    line = 1
    while line < len(lines):
        yield line
        try:
            line = read_row(lines, line, columns, "")[1]
        except SampleError:
            line += 1
