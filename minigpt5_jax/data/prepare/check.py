"""``prepare check``: what is wrong with a user's data, line by line, before any training.

Everything is listed, not only the first: words by the readers of ``checks/``, and
every image by decoding it.  Nothing is written.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt5_jax.data.batches.lengths import longest
from minigpt5_jax.data.errors import DataError, Problem, SampleError
from minigpt5_jax.data.images import MAX_PIXELS, ImageSource, load_image
from minigpt5_jax.data.paths import not_found
from minigpt5_jax.data.prepare.checks.entries import Entry, Options
from minigpt5_jax.data.prepare.checks.files import READERS, guess_format
from minigpt5_jax.data.text.tokenizer import LanguageTokenizer

BATCH = 512  # images handed to the processes at a time
MANY = 1000  # images from which on processes are worth their start
SHOWN_SIZES = 5
NAMES = {
    "cc3m": "rows",
    "cc3m_tar": "samples of tar shards",
    "vist": "stories",
    "prepared": "records",
}  # of entries, others are lines


@dataclasses.dataclass
class Findings:
    """What a check found.

    Attributes:
      format: of the data, ``guessed`` by what (nothing where the user said it).
      problems: in the order of the file, which their ``index`` is.
      notes: kind -> (how often, the first place and detail).
      entries: lines, rows, stories or records read; ``bad`` of them have a problem.
      made: training samples of each entry, and of what is said of a file (none), by their ``index``;
        ``doubtful`` ones are of entries ``without_image``, ``samples`` the others.
      images: named by entries; ``sizes`` counts the distinct ones that could be decoded.
      of_file: the ``index`` of what is said of a file, and is no entry.
      without_image: the ``index`` of entries with an image that cannot be used.
      lengths: positions of each sample, empty without a tokenizer; ``longest`` is where the longest is.
    """

    format: str
    guessed: str = ""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    entries: int = 0
    made: list[int] = dataclasses.field(default_factory=list)
    images: int = 0
    sizes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lengths: list[int] = dataclasses.field(default_factory=list)
    longest: tuple[int, str] = (0, "")
    of_file: set[int] = dataclasses.field(default_factory=set)
    without_image: set[int] = dataclasses.field(default_factory=set)

    @property
    def bad(self) -> int:
        return len({problem.index for problem in self.problems} - self.of_file)

    @property
    def samples(self) -> int:
        return sum(self.made) - self.doubtful

    @property
    def doubtful(self) -> int:
        return sum(self.made[index] for index in self.without_image)

    def note(self, notes: Iterable[tuple[str, str]]) -> None:
        """Counts (kind, place and detail) of what is worth knowing."""
        for kind, place in notes:
            count, first = self.notes.get(kind, (0, place))
            self.notes[kind] = (count + 1, first)

    def summary(self, max_length: int) -> str:
        """A few lines: counts, lengths, notes, and the verdict."""
        guessed = f" (guessed from {self.guessed}; --format says otherwise)" if self.guessed else ""
        name = NAMES.get(self.format, "lines")
        distinct = sum(self.sizes.values())
        sizes = ", ".join(f"{size} {count:,}" for size, count in self.sizes.most_common(SHOWN_SIZES))
        more = f", {len(self.sizes) - SHOWN_SIZES:,} other sizes" if len(self.sizes) > SHOWN_SIZES else ""
        samples = f"{self.samples:,} training samples"
        samples += f" (and {self.doubtful:,} of {name} with an unusable image)" if self.doubtful else ""
        lines = [
            f"format: {self.format}{guessed}",
            f"read: {self.entries:,} {name}, {samples}, {self.images:,} images",
            f"images decoded: {distinct:,}{': ' * bool(sizes)}{sizes}{more}",
        ]
        if self.lengths:
            lengths = np.asarray(self.lengths)
            middle, high = np.percentile(lengths, (50, 99)).astype(int)
            over = int((lengths > max_length).sum())
            lines.append(
                f"positions of a sample: median {middle}, 99% up to {high}, longest {self.longest[0]} "
                f"({self.longest[1]}); {over:,} are over --max_length {max_length} and would be cut"
            )
        lines += [f"note: {count:,} {kind} (first: {first})" for kind, (count, first) in self.notes.items()]
        verdict = "nothing is wrong"
        if self.problems:
            problems = f"{len(self.problems):,} problem{'s' * (len(self.problems) > 1)}"
            verdict = f"{problems} in {self.bad:,} of {self.entries:,} {name}" if self.bad else problems
        return "\n".join([*lines, verdict])


class Images:
    """Decodes the images of entries in batches, each path once, and says what each reference gets."""

    def __init__(self, findings: Findings, workers: int | None):
        self._findings, self._workers = findings, workers
        self._pool: ProcessPoolExecutor | None = None
        self._good: set[int] = set()  # hashes of paths that could be decoded
        self._failed: dict[str, str] = {}
        self._waiting: dict[ImageSource, list[tuple[int, str]]] = {}

    def add(self, order: int, entry: Entry) -> None:
        for image in entry.images:
            self._findings.images += 1
            if isinstance(image, str) and image in self._failed:
                self._fail(order, entry.where, image, self._failed[image])
            elif isinstance(image, bytes) or hash(image) not in self._good:
                self._waiting.setdefault(image, []).append((order, entry.where))
        if len(self._waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Decodes what is waiting."""
        waiting, self._waiting = self._waiting, {}
        for (image, references), (size, reason, notes) in zip(waiting.items(), self._inspect(list(waiting))):
            if reason:
                for order, where in references:
                    self._fail(order, where, image, reason)
                if isinstance(image, str):
                    self._failed[image] = reason
                continue
            self._findings.sizes[size] += 1
            name = image if isinstance(image, str) else references[0][1]
            self._findings.note((kind, name) for kind in notes)
            if isinstance(image, str):
                self._good.add(hash(image))

    def _fail(self, order: int, where: str, image: ImageSource, reason: str) -> None:
        name = f"{image}: " if isinstance(image, str) else ""
        self._findings.problems.append(Problem(order, where, f"{name}{reason}"))
        self._findings.without_image.add(order)

    def _inspect(self, images: list[ImageSource]) -> Iterable[tuple[str, str, list[str]]]:
        if self._pool is None and (
            self._workers or (self._workers is None and self._findings.images >= MANY)
        ):
            count = self._workers or os.cpu_count() or 1
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        if self._pool is None:
            return map(inspect_image, images)
        return self._pool.map(inspect_image, images, chunksize=16)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def inspect_image(image: ImageSource) -> tuple[str, str, list[str]]:
    """(``WIDTHxHEIGHT``, nothing, notes) of an image that training can use, or (nothing, what is wrong)."""
    notes: list[str] = []
    try:
        width, height = load_image(image, notes=notes).size
    except SampleError as error:
        return "", error.reason, []
    if max(width, height) ** 2 > MAX_PIXELS:
        return "", f"a white square around this image of {width}x{height} has over {MAX_PIXELS:,} pixels", []
    return f"{width}x{height}", "", notes


def check(
    path: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    mapping: str | Path | None = None,
    allow_outside_images: bool = False,
    tokenizer: LanguageTokenizer | None = None,
    max_length: int = 256,
    image_tokens: int = 32,
    workers: int | None = None,
    show_progress: bool = False,
) -> Findings:
    """Reads all of a data set and decodes all of its images.

    Args:
      path: a file, or a folder of tar shards or of prepared data.
      format: one of :data:`READERS`; guessed where None.
      image_root: folder that image paths are relative to; default: the file's.
      mapping: VIST's image paths; default: the file beside the stories.
      allow_outside_images: whether image paths may lead out of their folder.
      tokenizer: gives lengths, and what the dialogues' limit on tokens leaves out.
      max_length: positions of a row; image_tokens: positions of an input image.
      workers: processes that decode; None for one per core where there are many images.
      show_progress: a bar with the time left.

    Raises:
      DataError: there is nothing to read, or its format cannot be told.
    """
    path, guessed = Path(path), ""
    if format is None:
        format, guessed = guess_format(path)
    elif format not in READERS:
        raise DataError(f"unknown format {format!r}; known: {', '.join(READERS)}")
    elif "*" not in str(path) and not path.exists():
        raise DataError(f"nothing to check: {not_found('data', path)}")
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise DataError(not_found("image folder", root))
    count = None if tokenizer is None else lambda text: len(tokenizer.encode(text))
    mapping = None if mapping is None else Path(mapping)
    reader = READERS[format](path, Options(root, mapping, count, allow_outside_images))
    findings = Findings(format, guessed)
    images = Images(findings, workers)
    try:
        entries = tqdm(reader, desc="checking", unit="entry", disable=not show_progress, delay=1)
        for order, entry in enumerate(entries):
            _enter(findings, order, entry, tokenizer, max_length, image_tokens)
            images.add(order, entry)
        images.flush()
    finally:
        images.close()
    findings.problems.sort(key=lambda problem: problem.index)
    return findings


def _enter(
    findings: Findings,
    order: int,
    entry: Entry,
    tokenizer: LanguageTokenizer | None,
    max_length: int,
    image_tokens: int,
) -> None:
    """Counts an entry, its problems, notes and lengths."""
    findings.made.append(len(entry.samples))
    if entry.without_image:
        findings.without_image.add(order)
    if entry.of_file:
        findings.of_file.add(order)
    else:
        findings.entries += 1
    findings.problems += [Problem(order, entry.where, reason) for reason in entry.problems]
    findings.note((kind, f"{entry.where}: {detail}") for kind, detail in entry.notes)
    if tokenizer is None:
        return
    for texts in entry.samples:
        length, _ = longest(texts, tokenizer, image_tokens)
        if length > findings.longest[0]:
            findings.longest = (length, entry.where)
        findings.lengths.append(length)
