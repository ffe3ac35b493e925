"""Text and JSON files as every command reads them: lines by number, and what is wrong with a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.paths import not_found

BOM = b"\xef\xbb\xbf"


def check_utf8(data: bytes, path: Path) -> None:
    """DataError naming the first line that is not UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, for "
            f"example with: iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def check_jsonl(path: Path, first: str) -> None:
    """DataError where a file of JSON lines is another kind of file, which its first line shows.

    Args:
      first: its first line of content.
    """
    start = first.strip()
    if start in ("{", "[", "[{"):
        way = f"python -m json.tool --no-indent {path.name}" if start == "{" else f"jq -c '.[]' {path.name}"
        raise DataError(
            f"{path} is one JSON value over several lines, and JSONL has one object on each; this makes such "
            f"a file: {way} > new.jsonl"
        )
    if "\t" in first and not start.startswith(("{", "[")):
        raise DataError(f"{path} is a table, not JSONL; read it with data.format=cc3m (check: --format cc3m)")


class TextLines(Sequence[str]):
    """Lines of a UTF-8 file by number, through an index of byte offsets (8 bytes a line).

    LF and CR LF line ends, with or without one at the end of the file, and a byte order mark are
    accepted.  Blank lines are not counted as lines of content.

    Attributes:
      path: the file.
      sha256: of its content.
      quotes: whether a double quote occurs in it.

    Raises:
      DataError: missing file, no content, or text that is not UTF-8 (names the line).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            raise DataError(
                f"{self.path} is a folder; name a file in it, or for tar shards and prepared data say so: "
                "data.format=cc3m_tar or data.format=prepared"
            )
        if not self.path.is_file():
            raise DataError(not_found("data file", self.path))
        data = self.path.read_bytes()
        self.quotes = b'"' in data
        self.sha256 = hashlib.sha256(data).hexdigest()
        check_utf8(data, self.path)
        self._starts, self._stops, self._numbers = _line_table(data)
        if not len(self._starts):
            raise DataError(f"data file is empty: {self.path}")
        self._file = None

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, line: int) -> int:
        """Number of a content line in the file, from 1, blank lines counted."""
        return int(self._numbers[line])

    def where(self, line: int) -> str:
        """``file:number`` of a content line."""
        return f"{self.path}:{self.number(line)}"

    def __getitem__(self, line: int) -> str:
        """Text of a content line, without its line end."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        start, stop = int(self._starts[line]), int(self._stops[line])
        return os.pread(self._file, stop - start, start).decode("utf-8")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # an open file stays in its process

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(self._file)


def _line_table(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, stop (line end excluded) and number of each line that is not blank."""
    view = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(view == ord("\n")).astype(np.int64)
    if len(view) and view[-1] != ord("\n"):
        ends = np.append(ends, len(view))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    stops = ends.copy()
    if data.startswith(BOM):
        starts[:1] = 3
    if len(view):
        stops -= (stops > starts) & (view[np.maximum(stops, 1) - 1] == ord("\r"))
    filled = stops > starts
    return starts[filled], stops[filled], np.flatnonzero(filled) + 1
