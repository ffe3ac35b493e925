"""What every source is.

A source checks its file once when it is opened, keeps byte offsets only, and reads a line when it is
asked for, so that it is small to hold and small to send to worker processes.  What is wrong with the
file as a whole raises :class:`~minigpt5_jax.data.errors.DataError`; what is wrong with one sample
raises :class:`~minigpt5_jax.data.errors.SampleError` when it is fetched, which the pipeline counts.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

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
