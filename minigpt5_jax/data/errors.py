"""What can be wrong with data: errors that stop the run, and samples that are left out and counted."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


def printable(text: str) -> str:
    """Text whose control characters are spelled out: those of a file must not steer a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def allowed_errors(budget: int | float, length: int) -> int:
    """Unusable samples or units that a budget allows: a share below 1, rounded down, or a count.

    Raises:
      DataError: neither of these.
    """
    if isinstance(budget, bool) or budget < 0 or (budget >= 1 and budget != int(budget)):
        raise DataError(f"error_budget must be a share below 1 (0.01) or a count (10), got {budget!r}")
    return math.floor(budget * length) if budget < 1 else int(budget)


class DataError(ValueError):
    """A file or a setting is unusable.  The message says where, what and how to mend it."""

    def __str__(self) -> str:
        return printable(super().__str__())


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
        return printable(f"{self.where}: {self.reason}")


class Problem(NamedTuple):
    """Something that cannot be used, a sample for one: its place in the data, what to call it, and why."""

    index: int
    where: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}")
