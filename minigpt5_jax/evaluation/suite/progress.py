"""Lines about how far a stage is, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts what is done of a stage, and reports it.

    Args:
      what: name of the stage.  report: takes a line.  clock: seconds, growing.
    """

    def __init__(self, what: str, report: Report, clock: Callable[[], float]):
        self._what, self._report, self._clock = what, report, clock
        self._total = self._count = 0
        self._began = 0.0

    def start(self, total: int) -> None:
        """Before the first of ``total``."""
        self._total, self._count, self._began = total, 0, self._clock()

    def done(self, count: int) -> None:
        """``count`` more are done."""
        self._count += count
        spent = self._clock() - self._began
        left = spent / self._count * (self._total - self._count)
        self._report(f"{self._what}: {self._count} of {self._total}, {duration(left)} left")
