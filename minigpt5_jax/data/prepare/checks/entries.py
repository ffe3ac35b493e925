"""What the readers of a check yield: entries in the order of the file, with what is wrong with each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.paths import ImageFolder

Texts = list[tuple[str, str]]


@dataclasses.dataclass
class Entry:
    """A line, row, story or record.

    Attributes:
      where: ``file:line``.
      problems: what makes it unusable, whole or in part.
      notes: (kind, detail) of what is accepted but worth knowing; counted by kind.
      images: what it names, in order.
      samples: for each of its training samples, (source, target) in every wording.
      without_image: it lacks an image that its samples need.
      of_file: it is about the file, and none of the data's own lines, rows, stories or records.
    """

    where: str
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    images: list[ImageSource] = dataclasses.field(default_factory=list)
    samples: list[Texts] = dataclasses.field(default_factory=list)
    without_image: bool = False
    of_file: bool = False

    def add_image(self, folder: ImageFolder, name: str) -> None:
        """Takes an image by the path that the file names it by, or the problem with that path."""
        try:
            self.images.append(folder.path(name, self.where))
        except SampleError as error:
            self.problems.append(error.reason)
            self.without_image = True

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Takes a SampleError in the block down as a problem."""
        try:
            yield
        except SampleError as error:
            self.problems.append(error.reason)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user said besides the path.

    Attributes:
      image_root: folder that image paths are relative to; None for the file's own.
      mapping: VIST's image paths; None for the file beside the stories.
      count_tokens: length of a text, or None without a tokenizer.
      allow_outside_images: whether image paths may lead out of their folder.
    """

    image_root: Path | None = None
    mapping: Path | None = None
    count_tokens: Callable[[str], int] | None = None
    allow_outside_images: bool = False

    def folder(self, path: Path) -> ImageFolder:
        """Folder that the image paths of a file are relative to."""
        root = path.parent if self.image_root is None else self.image_root
        return ImageFolder(root, self.allow_outside_images)


@runtime_checkable
class Reader(Protocol):
    """Entries of a data set, about ``len`` of them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...
