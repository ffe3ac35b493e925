"""A claim of the paper beside our numbers."""

from __future__ import annotations

import dataclasses

from benchmarks.ablations.paper import Claim
from benchmarks.ablations.results import METRICS, Results, difference, estimate, verdict
from benchmarks.ablations.rows import STAGE1, STAGE2

NOT_RUN, OTHER_SETTINGS = "not run", "not comparable"
AGREEMENT = ("agrees", "does not agree", "within noise", "no error known", OTHER_SETTINGS, NOT_RUN)
"""Every verdict."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """Our side of a claim: ``0.120 ± 0.031`` and the verdict."""

    difference: str
    verdict: str


def compare(results: Results, claim: Claim) -> Compared:
    """Our difference beside the paper's sign."""
    variants = dict.fromkeys(variant for _, variant, _ in claim.terms)
    terms = [
        (weight, estimate(results.get(variant, []), METRICS[metric]))
        for weight, variant, metric in claim.terms
    ]
    if any(term is None for _, term in terms):
        return Compared("–", NOT_RUN)
    if reason := unlike(results, list(variants)):
        return Compared(reason, OTHER_SETTINGS)
    value, error = difference(terms)
    return Compared(
        f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}"), verdict(value, error, claim.expected)
    )


def unlike(results: Results, variants: list[str]) -> str:
    """In what rows differ that should differ in their variant only: backbones, or the steps of one stage."""
    first = [results[variant][0] for variant in variants]
    if len({result["settings"]["assets"] for result in first}) > 1:
        return "other backbones"
    for stage in (STAGE1, STAGE2):
        steps = [r["training"]["step"] for r in first if r["variant"] in stage]
        if len(set(steps)) > 1:
            return f"steps {' and '.join(map(str, dict.fromkeys(steps)))}"
    return ""
