"""Users' JSONL: pairs, stories and dialogues in the schema of :mod:`minigpt5_jax.data.samples.records`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.lines import TextLines, check_jsonl
from minigpt5_jax.data.paths import image_folder
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.records import Record, RecordRules, parse_record
from minigpt5_jax.data.sources.base import Source, check_index


def repeated_id(name: str, where: str, first: int) -> SampleError:
    """What is wrong with a record whose id the one in line ``first`` has."""
    return SampleError(where, f"id {name!r} was used in line {first} already")


class JsonlSource(Source):
    """Users' pairs, stories and dialogues, one JSON object a line (:mod:`minigpt5_jax.data.samples.records`).

    Every assistant turn is a sample (one for each of its images, if it has several): the turns before it are
    read, it is written.  A line that breaks the
    schema, or that repeats an id, counts as one sample that cannot be fetched.

    Args:
      path: the file.
      image_root: folder that image paths are relative to; default: the file's folder.
      rules: how its records become samples.
      allow_outside_images: whether image paths may lead out of their folder.

    Attributes:
      lines: of the file.

    Raises:
      DataError: the file or the folder is missing, not UTF-8 or empty.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        rules: RecordRules = RecordRules(),
        *,
        allow_outside_images: bool = False,
    ):
        self.lines = TextLines(path)
        check_jsonl(self.lines.path, self.lines[0])
        self._images, self._rules = image_folder(path, image_root, allow_outside_images), rules
        self.image_root = str(self._images.root)
        lines, places, self._bad = [], [], 0
        self._repeats: dict[int, int] = {}
        ids: dict[str, int] = {}
        for line in range(len(self.lines)):
            try:
                record = self.record(line)
                if record.id is not None and ids.setdefault(record.id, line) != line:
                    self._repeats[line] = ids[record.id]
                    self.record(line)
            except SampleError:
                samples = [(-1, 0)]
                self._bad += 1
            else:
                samples = record.samples()
            lines.extend([line] * len(samples))
            places.extend(samples)
        self._sample_line, self._sample_place = np.asarray(lines, np.int64), np.asarray(places, np.int32)

    def __len__(self) -> int:
        return len(self._sample_line)

    @property
    def rows(self) -> int:
        """Records of the file, unusable ones included."""
        return len(self.lines)

    def record(self, line: int) -> Record:
        """A record as it is written; SampleError: it breaks the schema, has no answer or repeats an id."""
        record = parse_record(self.lines[line], self.lines.where(line))
        if line in self._repeats:
            raise repeated_id(record.id, self.lines.where(line), self.lines.number(self._repeats[line]))
        if not record.answers():
            raise SampleError(self.lines.where(line), "no assistant turn, so nothing to learn from")
        for image in (image for turn in record.turns for image in turn.images()):
            self._images.path(image.path, self.lines.where(line))
        return record

    def name(self, line: int) -> str:
        """Name of a record that has no id."""
        return f"{self.lines.path.stem}_{self.lines.number(line)}"

    def example(self, index: int, epoch: int = 0) -> Example:
        """Sample ``index``, the same in every epoch; SampleError for a line that breaks the schema."""
        check_index(index, self)
        line = int(self._sample_line[index])
        return self._rules.example(
            self.record(line),
            *map(int, self._sample_place[index]),
            image_root=self._images.root,
            name=self.name(line),
            where=self.lines.where(line),
        )

    def image_fingerprint(self) -> str:
        """Hash of which images each sample has, whatever stands for them in the text."""
        return hashlib.sha256(f"jsonl images {self.lines.sha256}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash of the file and of everything that changes the samples made of it."""
        return hashlib.sha256(f"jsonl {self.lines.sha256} {self._rules.num_vokens}".encode()).hexdigest()

    def describe(self) -> str:
        bad = f", {self._bad:,} lines unusable" if self._bad else ""
        return f"JSONL: {len(self):,} samples of {len(self.lines):,} lines in {self.lines.path}{bad}"
