"""Agreement between raters and tests of their judgements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from scipy.stats import binomtest


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 for full agreement, 0 for that of chance.

    Args:
      units: the values that each unit was given; those of fewer than two are left out, so answers may be
        missing.

    Returns:
      None where no unit has two values, or all values are the same, which leaves it undefined.
    """
    units = [unit for unit in units if len(unit) > 1]
    margins = Counter(value for unit in units for value in unit)
    total = sum(margins.values())
    if len(margins) < 2:
        return None
    differing = sum(
        count * (len(unit) - count) / (len(unit) - 1) for unit in units for count in Counter(unit).values()
    )
    expected = sum(count * (total - count) for count in margins.values()) / (total - 1)
    return 1 - differing / expected


def raw_agreement(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Share of pairs of values of one unit that are equal; None without pairs."""
    pairs = sum(len(unit) * (len(unit) - 1) for unit in units)
    equal = sum(count * (count - 1) for unit in units for count in Counter(unit).values())
    return equal / pairs if pairs else None


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p of as many wins under even odds; None where nothing was decided."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else None


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each p corrected for all of them by Holm's rule; None stays and does not count."""
    known = sorted((p, name) for name, p in values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(values)
    least = 0.0
    for place, (p, name) in enumerate(known):
        least = max(least, min(1.0, (len(known) - place) * p))
        found[name] = least
    return found
