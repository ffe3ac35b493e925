"""What every source is, and lines of a text file by number.

A source checks its file once when it is opened, keeps byte offsets only, and reads a line when it is
asked for, so that it is small to hold and small to send to worker processes.  What is wrong with the
file as a whole raises :class:`~minigpt5_jax.data.errors.DataError`; what is wrong with one sample
raises :class:`~minigpt5_jax.data.errors.SampleError` when it is fetched, which the pipeline counts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.example import Example


@runtime_checkable
class Source(Protocol):
    """A random-access data set.  Everything it returns is a function of its files and arguments.

    ``example(index, epoch)`` gives sample ``index``; prompts that are drawn again each epoch are drawn
    by ``epoch``.  ``texts(index)`` are the (source, target) of all wordings the sample may have, with its
    whole context, made without touching an image: the length index takes the longest.  ``fingerprint()``
    changes with the content and the meaning of the samples, and ``describe()`` is one line for the log.
    The sources of this package inherit from it.

    Attributes:
      ends_in_vokens: every sample is words alone, then the vokens, then one token.
    """

    ends_in_vokens: bool = False

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def example(self, index: int, epoch: int = 0) -> Example: ...

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index``: one, where wordings are not drawn; errors as ``example``."""
        return [self.example(index).words]

    def fingerprint(self) -> str: ...

    def describe(self) -> str: ...


@runtime_checkable
class OfStories(Protocol):
    """A source whose samples may be those of stories, one story after another."""

    def stories(self) -> Int64[np.ndarray, " n1"] | None:
        """First sample of each story, and the number of samples; None where samples are no stories."""
        ...


def stories_of(source: Source) -> Int64[np.ndarray, " n1"] | None:
    """:meth:`OfStories.stories`; None for a source that knows no stories."""
    return source.stories() if isinstance(source, OfStories) else None


def check_index(index: int, source: Source) -> None:
    """IndexError where a source has no such sample."""
    if not 0 <= index < len(source):
        raise IndexError(f"sample {index} of {len(source)}")


def image_folder(path: str | Path, image_root: str | Path | None) -> Path:
    """Folder that a file's image paths are relative to, the file's own where None; DataError if missing."""
    root = Path(path).parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise DataError(f"image folder not found: {root}")
    return root


class TextLines:
    """Lines of a UTF-8 file by number, through an index of byte offsets (8 bytes a line).

    LF and CR LF line ends, with or without one at the end of the file, and a byte order mark are
    accepted.  Blank lines are not counted as lines of content.

    Attributes:
      path: the file.
      sha256: of its content.

    Raises:
      DataError: missing file, no content, or text that is not UTF-8 (names the line).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"data file not found: {self.path}")
        data = self.path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{self.path}:{line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, for "
                f"example with: iconv -f latin1 -t utf-8 {self.path.name}"
            ) from None
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
    if data.startswith(b"\xef\xbb\xbf"):
        starts[:1] = 3
    if len(view):
        stops -= (stops > starts) & (view[np.maximum(stops, 1) - 1] == ord("\r"))
    filled = stops > starts
    return starts[filled], stops[filled], np.flatnonzero(filled) + 1
