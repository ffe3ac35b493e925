"""A claim of the paper beside our numbers."""

from __future__ import annotations

import dataclasses

from benchmarks.ablations.paper import Claim
from benchmarks.ablations.results import (
    METRICS,
    Measured,
    Results,
    combine,
    verdict,
    weighted,
    without_seed,
)
from benchmarks.ablations.rows import STAGE1, STAGE2, differences

NOT_RUN, OTHER_SETTINGS = "not run", "not comparable"
AGREEMENT = ("agrees", "does not agree", "within noise", "no error known", OTHER_SETTINGS, NOT_RUN)
"""Every verdict."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """Our side of a claim: ``0.120 ± 0.031`` and the verdict."""

    difference: str
    verdict: str


def compare(results: Results, claim: Claim) -> Compared:
    """Our difference beside the paper's sign, over the seeds that every row of the claim has.

    It is taken seed by seed, because the rows of a seed are judged on the same captions.
    """
    if (found := combine(by_seed(results, claim))) is None:
        return Compared("–", NOT_RUN)
    if reason := unlike(results, list(dict.fromkeys(variant for _, variant, _ in claim.terms))):
        return Compared(reason, OTHER_SETTINGS)
    error = "" if found.error is None else f" ± {found.error:.3f}"
    seeds = "" if found.seeds == 1 else f" ({found.seeds} seeds)"
    return Compared(f"{found.value:+.3f}{error}{seeds}", verdict(found.value, found.error, claim.expected))


def by_seed(results: Results, claim: Claim) -> list[Measured]:
    """The claim's weighted sum for each seed that has all of its numbers."""
    sums = []
    for seed in sorted({result["seed"] for found in results.values() for result in found}):
        terms = []
        for weight, variant, metric in claim.terms:
            here = [result for result in results.get(variant, []) if result["seed"] == seed]
            measured = METRICS[metric](here[0]) if here else None
            terms.append((weight, measured))
        if all(measured is not None for _, measured in terms):
            sums.append(weighted(terms))
    return sums


def unlike(results: Results, variants: list[str]) -> str:
    """In what rows differ that should differ in their variant only: backbones, steps of one stage, or the run
    they start from or judge.  A row's seeds are alike (``check_alike``), so its first one stands for it."""
    first = [results[variant][0] for variant in variants]
    if len({result["settings"]["assets"] for result in first}) > 1:
        return "other backbones"
    for stage in (STAGE1, STAGE2):
        steps = [r["training"]["step"] for r in first if r["variant"] in stage]
        if len(set(steps)) > 1:
            return f"steps {' and '.join(map(str, dict.fromkeys(steps)))}"
    before = [without_seed(result["settings"]["from"]) for result in first if "from" in result["settings"]]
    changed = [line for other in before for line in differences(before[0], other)]
    return f"from runs of other {changed[0].partition(':')[0]}" if changed else ""
