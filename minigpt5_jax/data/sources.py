"""Data on disk as random-access sequences of :class:`Example`: CC3M's table, and JSONL of one's own.

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

from minigpt5_jax.data import templates
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.example import Example
from minigpt5_jax.data.records import Record, parse_record, to_example


@runtime_checkable
class Source(Protocol):
    """A random-access data set.  Everything it returns is a function of its files and arguments.

    ``example(index, epoch)`` gives sample ``index``; prompts that are drawn anew each epoch are drawn
    by ``epoch``.  ``fingerprint()`` changes with the content and the meaning of the samples, and
    ``describe()`` is one line for the log.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def example(self, index: int, epoch: int = 0) -> Example: ...

    def fingerprint(self) -> str: ...

    def describe(self) -> str: ...


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


class Cc3mSource:
    """Pairs of caption and picture from a tab-separated table (reference 5.2).

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
      resample_prompts: draw the wording anew each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one picture.

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
        if prompt_set not in templates.CC3M_PROMPTS:
            known = ", ".join(templates.CC3M_PROMPTS)
            raise DataError(f"unknown prompt_set {prompt_set!r}; known: {known}")
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
        if instruction_every < 0:
            raise DataError(f"instruction_every must not be negative, got {instruction_every}")
        self._training, self._every = training, instruction_every if training else 0
        self._prompt_set, self._seed = prompt_set, seed
        self._resample, self._num_vokens = resample_prompts, num_vokens

    def __len__(self) -> int:
        return self._rows + (-(-self._rows // self._every) if self._every else 0)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def _row(self, index: int) -> tuple[int, bool]:
        """Row of a sample and whether it is the instruction sample that follows the row's plain one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if not self._every:
            return index, False
        block, place = divmod(index, self._every + 1)
        return block * self._every + max(0, place - 1), place == 1

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``; SampleError for a row with too few columns or an empty caption."""
        row, is_instruction = self._row(index)
        where = self._lines.where(row + 1)
        cells = self._lines[row + 1].split("\t")
        if len(cells) != self._columns:
            raise SampleError(where, f"{len(cells)} tab-separated cells, the header has {self._columns}")
        caption, path = templates.clean_caption(cells[self._caption]), cells[self._path].strip()
        if not caption:
            raise SampleError(where, "empty caption")
        if not path:
            raise SampleError(where, "empty image_path")
        source = caption
        if is_instruction:
            prompts = templates.CC3M_PROMPTS[self._prompt_set]
            key = (self._seed, epoch if self._resample else 0, row)
            source = templates.cc3m_instruction(
                caption, prompts[np.random.default_rng(key).integers(len(prompts))]
            )
        return Example(
            source=source,
            target=templates.target_text("", draws=True, num_vokens=self._num_vokens),
            images=(),
            target_image=str(self._image_root / path),
            caption=caption,
            task="cc3m-instruction" if is_instruction else "cc3m",
            item_id=f"cc3m_{row}_instruction" if is_instruction else f"cc3m_{row}",
            where=where,
        )

    def fingerprint(self) -> str:
        """Hash of the table and of everything that changes the samples made of it."""
        settings = (self._every, self._prompt_set, self._seed, self._resample, self._num_vokens)
        return hashlib.sha256(f"cc3m {self._lines.sha256} {settings}".encode()).hexdigest()

    def describe(self) -> str:
        kind = "training" if self._training else "test"
        return f"CC3M {kind}: {len(self):,} samples of {self._rows:,} rows in {self._lines.path}"


class JsonlSource:
    """Pairs, stories and dialogues of one's own, one JSON object a line in the schema of
    :mod:`~minigpt5_jax.data.records`.

    Every assistant turn is a sample: the turns before it are read, it is written.

    Args:
      path: the file.
      image_root: folder that picture paths are relative to; default: the file's folder.
      strict: raise on lines that break the schema, naming the first of them; False keeps such a line
        as a sample that cannot be fetched, which the pipeline counts against its budget.
      num_vokens: vokens of one picture.

    Raises:
      DataError: the file or the folder is missing, not UTF-8 or empty, an id occurs twice, or (strict)
        a line breaks the schema.
    """

    SHOWN = 5

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        strict: bool = True,
        num_vokens: int = 8,
    ):
        self._lines = TextLines(path)
        self._image_root = Path(path).parent if image_root is None else Path(image_root)
        if not self._image_root.is_dir():
            raise DataError(f"image folder not found: {self._image_root}")
        self._num_vokens = num_vokens
        lines, turns, bad, ids = [], [], [], {}
        for line in range(len(self._lines)):
            try:
                record = self._record(line)
            except SampleError as error:
                bad.append(error)
                lines.append(line)
                turns.append(-1)
                continue
            if record.id is not None and ids.setdefault(record.id, line) != line:
                first = self._lines.number(ids[record.id])
                raise DataError(
                    f"{self._lines.where(line)}: id {record.id!r} was used in line {first} already"
                )
            for turn in record.answers():
                lines.append(line)
                turns.append(turn)
        if bad and strict:
            shown = "\n  ".join(map(str, bad[: self.SHOWN]))
            raise DataError(f"{len(bad)} of {len(self._lines)} lines of {path} are unusable:\n  {shown}")
        self._bad = len(bad)
        self._sample_line, self._sample_turn = np.asarray(lines, np.int64), np.asarray(turns, np.int32)

    def __len__(self) -> int:
        return len(self._sample_line)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def _record(self, line: int) -> Record:
        record = parse_record(self._lines[line], self._lines.where(line))
        if not record.answers():
            raise SampleError(self._lines.where(line), "no assistant turn, so nothing to learn from")
        return record

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``, the same in every epoch; SampleError for a line that breaks the schema."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        line = int(self._sample_line[index])
        return to_example(
            self._record(line),
            int(self._sample_turn[index]),
            image_root=self._image_root,
            name=f"{self._lines.path.stem}_{self._lines.number(line)}",
            where=self._lines.where(line),
            num_vokens=self._num_vokens,
        )

    def fingerprint(self) -> str:
        """Hash of the file and of everything that changes the samples made of it."""
        return hashlib.sha256(f"jsonl {self._lines.sha256} {self._num_vokens}".encode()).hexdigest()

    def describe(self) -> str:
        bad = f", {self._bad:,} lines unusable" if self._bad else ""
        return f"JSONL: {len(self):,} samples of {len(self._lines):,} lines in {self._lines.path}{bad}"
