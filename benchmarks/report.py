"""One line of the scoreboard: its keys, and what made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

from benchmarks.goals import GOALS

KEYS = (
    "row", "case", "ours", "peer", "ratio", "limit", "fraction_of_limit",
    "goal", "met", "spread", "command", "versions",
)  # fmt: skip
PACKAGES = ("jax", "flax", "torch", "transformers", "diffusers", "numpy")


def line(
    row: int | str,
    case: str,
    *,
    ours: float | None,
    peer: float | None,
    ratio: float | None = None,
    limit: float | None = None,
    spread: list[float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The finished line, :data:`KEYS` first.

    Args:
      ours, peer: less is better.  ratio: ``peer / ours`` by default; of timings the median over pairs.
      limit: what ``ours`` cannot go below; that of the goal by default.
      spread: lowest and highest ratio of a pair of blocks.
      more: further values, ``unit`` among them; goals may name them.
    """
    goal = GOALS[row, case]
    if ratio is None and ours and peer is not None:
        ratio = peer / ours
    limit = goal.limit if limit is None else limit
    fraction = limit / ours if limit is not None and ours else None
    values = {"ours": ours, "ratio": ratio, **more}
    told = {
        "row": row,
        "case": case,
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        "limit": limit,
        "fraction_of_limit": fraction,
        "goal": f"{goal.described()} ({goal.source})" if goal.described() else goal.source,
        "met": goal.met(values),
        "spread": spread,
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "versions": versions(),
    }
    return {key: _short(value) for key, value in {**told, **more}.items()}


def versions() -> dict[str, str]:
    """Packages, machine, load and date of a measurement."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    load = round(os.getloadavg()[0], 2)
    return {"python": platform.python_version(), **found, "machine": machine, "date": date, "load": load}


def _short(value: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value
