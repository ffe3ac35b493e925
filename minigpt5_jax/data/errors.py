"""What can be wrong with data: errors that stop the run, and samples that are left out and counted."""

from __future__ import annotations

from typing import NamedTuple


class DataError(ValueError):
    """A file or a setting is unusable.  The message says where, what and how to mend it."""


class SampleError(DataError):
    """One sample is unusable; the pipeline leaves it out, counts it and names it.

    Args:
      where: the sample, as a user finds it again (``train.tsv:17``, ``photos/a.jpg``).
      reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both in args: the error crosses process borders by pickle
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Problem(NamedTuple):
    """Something that cannot be used, a sample for one: its place in the data, what to call it, and why."""

    index: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
