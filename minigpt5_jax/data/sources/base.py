"""What every source is.

A source checks its file once when it is opened, keeps byte offsets only, and reads a line when it is
asked for, so that it is small to hold and small to send to worker processes.  What is wrong with the
file as a whole raises :class:`~minigpt5_jax.data.errors.DataError`; what is wrong with one sample
raises :class:`~minigpt5_jax.data.errors.SampleError` when it is fetched, which the pipeline counts.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from minigpt5_jax.data.errors import DataError, SampleError
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
      image_root: folder that the names of images begin with; images are called by what follows it.
    """

    ends_in_vokens: bool = False
    image_root: str = ""

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


FETCH = (
    "fetch the images first, for example with img2dataset (--input_format tsv --url_col url --caption_col "
    "caption --output_format webdataset), and read the folder of tar shards that it writes "
    "(data.format=cc3m_tar)"
)


def is_url(text: str) -> bool:
    """Whether a path is in truth an address."""
    return re.match(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The folder that the image paths of a file are relative to.

    Attributes:
      root: the folder.
      allow_outside: whether paths may lead out of it; a file from elsewhere could name any file else.
    """

    root: Path
    allow_outside: bool = False

    def path(self, name: str, where: str) -> str:
        """Path of an image as a file names it; SampleError for a URL and for one outside of the folder."""
        if is_url(name):
            raise SampleError(where, f"{name} is a URL, and images are read from files; {FETCH}")
        root = os.path.abspath(self.root)
        full = os.path.normpath(os.path.join(root, name))
        if not (self.allow_outside or full.startswith(root.rstrip(os.sep) + os.sep)):
            raise SampleError(
                where,
                f"image path {name} leads out of the image folder {self.root}; name a folder above both as "
                "the image root, or allow it: data.allow_outside_images=True "
                "(prepare: --allow_outside_images)",
            )
        return os.path.join(self.root, name)


def image_folder(path: str | Path, image_root: str | Path | None, allow_outside: bool = False) -> ImageFolder:
    """Folder that a file's image paths are relative to, the file's own where None; DataError if missing."""
    root = Path(path).parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise DataError(f"image folder not found: {root}")
    return ImageFolder(root, allow_outside)
