"""Intervals of scores that are ratios of sums over groups, and paired comparisons of two runs.

Pairs, stories and dialogues are drawn, never single turns: turns of one story are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
PIECE = 2**22
"""Draws that are in memory at once."""
Terms = tuple[float, float]
"""What a group adds to the numerator and the denominator of a score."""


def ratio(terms: Sequence[Terms]) -> float | None:
    """Sum over sum; None for an empty denominator."""
    below = sum(term[1] for term in terms)
    return sum(term[0] for term in terms) / below if below else None


def _drawn(terms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ratios f64[resamples k] of terms f64[groups k 2] whose groups are drawn with replacement."""
    groups, found = len(terms), []
    size = max(1, PIECE // groups)
    for start in range(0, RESAMPLES, size):
        places = rng.integers(groups, size=(min(size, RESAMPLES - start), groups))
        sums = np.stack(
            [[terms[:, k, j][places].sum(1) for j in (0, 1)] for k in range(terms.shape[1])], axis=-1
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(sums[0] / sums[1])
    return np.concatenate(found)


def interval(terms: Sequence[Terms], unit: str) -> dict[str, Any] | None:
    """The percentile bootstrap interval of :func:`ratio`; None of fewer than two groups.

    Args:
      unit: what the groups are, for the result.
    """
    if len(terms) < 2:
        return None
    values = _drawn(np.asarray(terms, np.float64)[:, None], np.random.default_rng(SEED))[:, 0]
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"low": float(low), "high": float(high), **_how(unit)}


def _how(unit: str) -> dict[str, Any]:
    return {"level": LEVEL, "method": "percentile bootstrap", "resamples": RESAMPLES, "unit": unit}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Score of one run minus that of another, over their common groups.

    Attributes:
      ci: its interval.  p: two-sided, by the paired bootstrap.  groups: how many both have.
    """

    value: float
    ci: dict[str, Any] | None
    p: float | None
    groups: int


def compare(ours: Mapping[str, Terms], theirs: Mapping[str, Terms], unit: str) -> Difference | None:
    """The difference of a score over common groups, each drawn for both runs together; None without any."""
    common = [group for group in ours if group in theirs]
    mine, other = ratio([ours[g] for g in common]), ratio([theirs[g] for g in common])
    if mine is None or other is None:
        return None
    if len(common) < 2:
        return Difference(mine - other, None, None, len(common))
    terms = np.array([[ours[g], theirs[g]] for g in common], np.float64)
    values = _drawn(terms, np.random.default_rng(SEED))
    values = values[np.isfinite(values).all(1)]
    differences = values[:, 0] - values[:, 1]
    low, high = np.quantile(differences, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (int(rarer) + 1) / (len(differences) + 1))
    ci = {"low": float(low), "high": float(high), **_how(unit)}
    return Difference(mine - other, ci, p, len(common))
