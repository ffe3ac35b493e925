"""What can be wrong with data: errors that stop the run, and samples that are left out and counted."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line break, separators, changes of direction, halves of surrogate pairs."""


def printable(text: str) -> str:
    """``text`` with control characters written out (``\\x1b``), so that a terminal does not obey them.

    Line breaks and tabs stay.  Captions and names of files may hold anything.
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


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
