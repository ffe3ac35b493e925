"""A claim of the paper beside our numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
AGREEMENT = (
    "agrees",
    "does not agree",
    "within noise",
    "none seen",
    "no error known",
    OTHER_SETTINGS,
    NOT_RUN,
)
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


SHARED = (
    "run.num_steps",
    "optimizer.",
    "data.global_batch",
    "data.shapes_",
    "data.context_dropout",
    "inference.guidance_scale",
)
"""Beginnings of the keys of a configuration that no variant changes; a key that is not there has its
default."""


def shared_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a row's configuration in which rows of one stage are the same."""
    return {name: value for name, value in config.items() if name.startswith(SHARED)}


def unlike(results: Results, variants: list[str]) -> str:
    """In what rows differ that should differ in their variant only: backbones, how they are judged, what rows
    of one stage share, or the run they start from or judge.  A row's seeds are alike (``check_alike``), so
    its first one stands for it."""
    first = [results[variant][0] for variant in variants]
    if len({result["settings"]["assets"] for result in first}) > 1:
        return "other backbones"
    for count in ("pairs", "stories"):
        counts = [r["settings"]["judge"][count] for r in first if count in r["settings"]["judge"]]
        if len(set(counts)) > 1:
            return f"judged on {' and '.join(map(str, dict.fromkeys(counts)))} {count}"
    for stage in (STAGE1, STAGE2):
        alike = [shared_keys(r["settings"]["config"]) for r in first if r["variant"] in stage]
        if changed := [line for other in alike for line in differences(alike[0], other)]:
            return changed[0].replace(" there, ", " and ").removesuffix(" now")
    before = [without_seed(result["settings"]["from"]) for result in first if "from" in result["settings"]]
    changed = [line for other in before for line in differences(before[0], other)]
    return f"from runs of other {changed[0].partition(':')[0]}" if changed else ""
