"""Users' JSONL: pairs, stories and dialogues in the schema of :mod:`minigpt5_jax.data.samples.records`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.records import Record, parse_record, to_example
from minigpt5_jax.data.sources.base import TextLines


class JsonlSource:
    """Users' pairs, stories and dialogues, one JSON object a line (:mod:`minigpt5_jax.data.samples.records`).

    Every assistant turn is a sample: the turns before it are read, it is written.

    Args:
      path: the file.
      image_root: folder that image paths are relative to; default: the file's folder.
      strict: raise on lines that break the schema, naming the first of them; False keeps such a line
        as a sample that cannot be fetched, which the pipeline counts against its budget.
      num_vokens: vokens of one image.

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

    def texts(self, index: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``index``: one, since wordings are not drawn; errors as ``example``."""
        example = self.example(index)
        return [(example.source, example.target)]

    def fingerprint(self) -> str:
        """Hash of the file and of everything that changes the samples made of it."""
        return hashlib.sha256(f"jsonl {self._lines.sha256} {self._num_vokens}".encode()).hexdigest()

    def describe(self) -> str:
        bad = f", {self._bad:,} lines unusable" if self._bad else ""
        return f"JSONL: {len(self):,} samples of {len(self._lines):,} lines in {self._lines.path}{bad}"
