"""Curves with error bars, as PNG files that come out the same from the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations.results import Estimate


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a plot; ``style`` is matplotlib's."""

    label: str
    points: Sequence[tuple[float, Estimate]]
    style: str = "o-"


def draw(path: Path, curves: Sequence[Curve], axis: str, ticks: Sequence[float]) -> None:
    """Shares from 0 to 1 against the logarithm of ``axis``, with two standard errors."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own settings change nothing
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for curve in curves:
            x = [point for point, _ in curve.points]
            y = [estimate.value for _, estimate in curve.points]
            error = [2 * (estimate.error or 0.0) for _, estimate in curve.points]
            axes.errorbar(x, y, error, fmt=curve.style, capsize=2, label=curve.label)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel="share right", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
