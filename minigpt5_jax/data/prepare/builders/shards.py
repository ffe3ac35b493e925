"""The records of one shard, and what is kept of it should the run be interrupted.

TFDS writes a data set into a temporary folder that it deletes when the run fails, so it cannot continue.
Here each shard is first written whole into a folder of ``parts`` beside the data set, with what was
counted, and linked into TFDS's folder; a later run takes finished parts as they are.  A part is finished
when its ``.array_record`` is there: that file is moved into place last.  Records keep the order of the raw
files, so a shard is a range of units, the same from one process and from many.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.data.errors import DataError, Problem, SampleError, allowed_errors
from minigpt5_jax.data.prepare.builders.units import Encoded, Raw, Unit, Units, encode_image, keep_images
from minigpt5_jax.data.sources.prepared import current_tally

PARTS = "parts"
SHARD_BYTES = 128 * 2**20
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Job:
    """One split of one data set to prepare.

    Attributes:
      raw: its files.
      output: folder that the data set's folder is made in.
      split: name of the split.
      count: units of the raw files.
      fingerprint: of the raw files.
      num_shards: files that are written.
      letterbox: side of the square images are fitted into; None keeps their bytes.
      budget: units that may be unusable.
    """

    raw: Raw
    output: Path
    split: str
    count: int
    fingerprint: str
    num_shards: int
    letterbox: int | None
    budget: int

    @classmethod
    def plan(
        cls,
        raw: Raw,
        output: str | Path,
        *,
        split: str = "train",
        num_shards: int | None = None,
        letterbox: int | None = None,
        error_budget: int | float = 0.01,
    ) -> Job:
        """Opens the raw files and decides on the shards (files of about 128 MiB unless told).

        Raises:
          DataError: as the data set's source, or a value out of range.
        """
        units = raw.open()
        if num_shards is None:
            num_shards = max(1, round(len(units) * _mean_bytes(units) / SHARD_BYTES))
            num_shards = min(num_shards, len(units))
        if not 1 <= num_shards <= len(units):
            raise DataError(f"num_shards must be 1 ... {len(units)} (units of {raw.path}), got {num_shards}")
        budget = allowed_errors(error_budget, len(units))
        return cls(raw, Path(output), split, len(units), units.fingerprint, num_shards, letterbox, budget)

    @property
    def folder(self) -> Path:
        """Folder of the split."""
        return self.output / self.raw.dataset / self.split

    @property
    def parts(self) -> Path:
        return self.folder / PARTS

    def absolute(self) -> Job:
        """With paths that a worker with another working folder understands."""
        names = ("path", "image_root", "mapping")
        paths = {name: os.path.abspath(path) for name in names if (path := getattr(self.raw, name))}
        raw = dataclasses.replace(self.raw, **paths)
        return dataclasses.replace(self, raw=raw, output=self.output.absolute())

    def settings(self) -> dict[str, Any]:
        """What the content of the data set depends on."""
        names = ("split", "count", "fingerprint", "num_shards", "letterbox")
        return {"dataset": self.raw.dataset, **{name: getattr(self, name) for name in names}}

    def shard(self, index: int, progress: Callable[[int], None] | None = None) -> ShardWork:
        """The work of one shard."""
        first, stop = (self.count * i // self.num_shards for i in (index, index + 1))
        return ShardWork(self, index, first, stop, progress)


def _mean_bytes(units: Units, looks: int = 100) -> float:
    """Mean size of a unit's image files, from some of them spread over the data set."""
    sizes = []
    for index in sorted({len(units) * i // looks for i in range(looks)}):
        try:
            images = units[index].images
            sizes.append(sum(len(p) if isinstance(p, bytes) else os.stat(p).st_size for p in images) + 1000)
        except (SampleError, OSError, ValueError):
            continue
    return float(np.mean(sizes)) if sizes else 0.0


@dataclasses.dataclass(frozen=True)
class Record:
    """A unit ready to be written: its images, its fields, and the images it has lost."""

    unit: Unit
    images: list[Encoded]
    fields: dict[str, Any]
    lost: list[SampleError]

    def example(self) -> dict[str, Any]:
        """What TFDS encodes."""
        return {**self.fields, "image": [io.BytesIO(image.data) for image in self.images]}

    def line(self, raw: Raw) -> str:
        """The unit without its images, one line of JSON."""
        return json.dumps({**self.fields, "where": raw.place(self.unit.where)}, ensure_ascii=False) + "\n"


@dataclasses.dataclass
class Tally:
    """What became of the units of a shard.

    Attributes:
      kept: records written.
      skipped: those that were left out, by unit.
      cut: images that dialogues go without, by unit; each ends before it.
      images: how many were stored, of ``bytes`` in all.
      sizes: images by ``WIDTHxHEIGHT``.
      bytes_log2: images by the power of two below their number of bytes.
    """

    kept: int = 0
    skipped: list[Problem] = dataclasses.field(default_factory=list)
    cut: list[Problem] = dataclasses.field(default_factory=list)
    images: int = 0
    bytes: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    bytes_log2: dict[str, int] = dataclasses.field(default_factory=collections.Counter)

    def count(self, index: int, record: Record) -> None:
        """Enters a record that was written."""
        self.kept += 1
        self.cut += [Problem(index, error.where, error.reason) for error in record.lost]
        for image in record.images:
            self.images += 1
            self.bytes += len(image.data)
            self.sizes[f"{image.width}x{image.height}"] += 1
            self.bytes_log2[str(len(image.data).bit_length() - 1)] += 1

    def add(self, other: Tally) -> None:
        """Joins the tally of another shard."""
        self.kept += other.kept
        self.skipped += other.skipped
        self.cut += other.cut
        self.images += other.images
        self.bytes += other.bytes
        for mine, theirs in ((self.sizes, other.sizes), (self.bytes_log2, other.bytes_log2)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number

    @classmethod
    def read(cls, path: Path) -> Tally:
        values = current_tally(json.loads(path.read_text(encoding="utf-8")))
        lists = {name: [Problem(*problem) for problem in values[name]] for name in ("skipped", "cut")}
        return cls(**{**values, **lists})


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """Makes the records of units ``first`` ... ``stop - 1``; calling it yields (key, record).

    It is what TFDS calls an example generator, and what Beam sends to a worker.  ``progress`` is told of
    units done; it stays None where the work travels.
    """

    job: Job
    index: int
    first: int
    stop: int
    progress: Callable[[int], None] | None = None

    def file(self, ending: str) -> Path:
        """A file of this part."""
        return self.job.parts / f"{self.index:05d}.{ending}"

    def done(self) -> bool:
        """Whether an earlier run finished this part, and what it left out is unusable still."""
        if not self.file("array_record").is_file():
            return False
        tally = Tally.read(self.file("json"))
        return all(self._lost(index) for index in {index for index, _, _ in tally.skipped + tally.cut})

    def _lost(self, index: int) -> bool:
        try:
            return bool(self.record(index).lost)
        except SampleError:
            return True

    def __call__(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        if self.done():
            for index in range(Tally.read(self.file("json")).kept):
                yield index, None  # TFDS counts them; the writer has the file
            self._tell(self.stop - self.first)
            return
        self.file("array_record").unlink(missing_ok=True)
        self.job.parts.mkdir(parents=True, exist_ok=True)
        if self.job.raw.open().fingerprint != self.job.fingerprint:
            raise DataError(f"{self.job.raw.path} has changed since the preparation began; start again")
        tally, spent, lines = Tally(), skipped_before(self.job), io.StringIO()
        for index in range(self.first, self.stop):
            try:
                record = self.record(index)
            except SampleError as error:
                tally.skipped.append(Problem(index, error.where, error.reason))
                check_budget(self.job, spent + len(tally.skipped), tally.skipped)
            else:
                yield tally.kept, record.example()
                lines.write(record.line(self.job.raw))
                tally.count(index, record)
            self._tell(1)
        write_whole(self.file("jsonl"), lines.getvalue())
        write_whole(self.file("json"), json.dumps(vars(tally)))

    def record(self, index: int) -> Record:
        """A unit with its images read; SampleError naming the unit and the image."""
        unit = self.job.raw.open()[index]
        images, kept, lost = [], [], []
        for number, image in enumerate(unit.images):
            try:
                images.append(encode_image(image, self.job.letterbox))
                kept.append(number)
            except SampleError as error:
                lost.append(SampleError(f"{unit.where}, {error.where}", error.reason))
                if unit.whole:
                    raise lost[0] from None
        return Record(unit, images, keep_images(unit.fields, kept) if lost else unit.fields, lost)

    def _tell(self, units: int) -> None:
        if self.progress is not None:
            self.progress(units)


def skipped_before(job: Job) -> int:
    """Units left out by the parts that are finished."""
    done = (job.parts / f"{path.stem}.json" for path in job.parts.glob("*.array_record"))
    return sum(len(Tally.read(path).skipped) for path in done)


def check_budget(job: Job, count: int, skipped: list[Problem]) -> None:
    """DataError with the first reasons where more units are unusable than the job allows."""
    if count > job.budget:
        shown = "\n  ".join(map(str, skipped[:SHOWN]))
        raise DataError(
            f"{count} of {job.count} units are unusable, the error budget allows {job.budget}; the first:"
            f"\n  {shown}\n`python -m minigpt5_jax.prepare check` lists all of them. Mend or remove them, or "
            "raise --error_budget; finished shards are kept"
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name and moves it into place."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links; replaces ``target``."""
    target.unlink(missing_ok=True)  # of an earlier attempt: Beam repeats work that failed
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
