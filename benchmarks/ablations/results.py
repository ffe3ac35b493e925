"""Committed results: read, measured, put together over seeds, compared with an ordering."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.rows import Row, RowError, differences
from minigpt5_jax.data.samples.stories import CONTEXTS
from minigpt5_jax.shapes import world

KEYS = {
    "variant",
    "seed",
    "scale",
    "settings",
    "command",
    "git_revision",
    "machine",
    "seconds",
    "training",
    "scores",
}
ATTRIBUTES = ("background", *world.ATTRIBUTES)
Result = dict[str, Any]
Results = dict[str, list[Result]]
"""Variant -> its results, one for each seed, in order."""


def read_result(path: Path) -> Result:
    """One row's JSON.

    Raises:
      RowError: it is none.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RowError(f"{path} is no JSON ({error}); delete it and run its row again") from None
    if not isinstance(value, dict) or value.keys() != KEYS:
        raise RowError(f"{path} is no result of a row: it must have {', '.join(sorted(KEYS))}")
    return value


def read_results(folder: Path) -> dict[str, Results]:
    """Scale -> results of every row in ``folder``.

    Raises:
      RowError: a file is no result, has the name of another, or two seeds of a row have other settings.
    """
    found: dict[str, Results] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        row = Row(result["variant"], result["seed"], result["scale"])
        if path.stem != row.name:
            raise RowError(f"{path} holds row {row.name}; call it {row.name}.json")
        found.setdefault(row.scale, {}).setdefault(row.variant, []).append(result)
    for scale in found.values():
        for variant, results in scale.items():
            results.sort(key=lambda result: result["seed"])
            check_alike(variant, results)
    return found


def check_alike(variant: str, results: Sequence[Result]) -> None:
    """Seeds of a row may differ in nothing else.

    Raises:
      RowError: naming the keys in which they do.
    """
    plain = [without_seed(result["settings"]) for result in results]
    for result, other in zip(results[1:], plain[1:]):
        if changed := differences(plain[0], other):
            seeds = f"seeds {results[0]['seed']} and {result['seed']}"
            raise RowError(
                f"{seeds} of {variant} are of other settings; make one of them again:\n  "
                + "\n  ".join(changed)
            )


def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every key named ``seed`` left out."""
    kept = {name: value for name, value in settings.items() if name.rpartition(".")[2] != "seed"}
    return {n: without_seed(value) if isinstance(value, Mapping) else value for n, value in kept.items()}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number, and its standard error where one result tells it (shares do)."""

    value: float
    error: float | None = None


def mean_share(shares: Sequence[tuple[float, float]]) -> Measured:
    """Mean of (share, count) pairs, with the binomial standard error.

    Two right and two wrong are added to each count for the error (Agresti and Coull), so that a share of 0
    or 1 has one too.
    """
    value = sum(share for share, _ in shares) / len(shares)
    variance = 0.0
    for share, count in shares:
        p = (share * count + 2) / (count + 4)
        variance += p * (1 - p) / (count + 4)
    return Measured(value, math.sqrt(variance) / len(shares))


def pairs(name: str, objects: Sequence[str] = ("1", "2", "3"), by: str = "vokens") -> Callable:
    """Reads a share of images, the mean over numbers of objects."""

    def read(result: Result) -> Measured | None:
        scores = result["scores"]
        if not all(by in scores.get(number, {}) for number in objects):
            return None
        names = ATTRIBUTES if name == "attributes" else (name,)
        rows = [scores[number] for number in objects]
        # The attributes of an image are right or wrong together, so it counts once.
        return mean_share(
            [(sum(row[by].get(n, 0.0) for n in names) / len(names), row["count"]) for row in rows]
        )

    return read


def held_out(name: str) -> Callable:
    """Reads a number of the last validation."""

    def read(result: Result) -> Measured | None:
        value = (result["training"] or {}).get("validation", {}).get(name)
        return None if value is None else Measured(value)

    return read


def within(scores: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """What lies at a path of nested numbers; empty where it ends before."""
    for name in names:
        scores = scores.get(name, {})
    return scores


def stories(*names: str) -> Callable:
    """Reads one of the story judge's numbers, which come with their standard errors."""

    def read(result: Result) -> Measured | None:
        found = within(result["scores"], names)
        value = found.get("share", found.get("mean"))
        if value is None:
            return None
        # Where all or none are right the judge's error is 0.
        least = mean_share([(value, found["count"])]).error if "share" in found else 0.0
        return Measured(value, max(found["standard_error"], least))

    return read


def chance(name: str) -> Callable:
    """Reads how often guessing is right in what only images reveal."""

    def read(result: Result) -> Measured | None:
        found = within(result["scores"], ("contexts", "none", "image_only", name)).get("chance")
        return None if found is None else Measured(found)

    return read


METRICS: dict[str, Callable[[Result], Measured | None]] = {
    **{f"all {n}": pairs("all", (n,)) for n in ("1", "2", "3")},
    **{f"native {n}": pairs("all", (n,), "native") for n in ("1", "2", "3")},
    "all": pairs("all"),
    "native": pairs("all", by="native"),
    "attributes": pairs("attributes"),
    "emission": pairs("drawn"),
    "caption": held_out("caption"),
    "image": held_out("image"),
    **{f"images only, {c}": stories("contexts", c, "image_only", "together") for c in CONTEXTS},
    **{f"texture, {c}": stories("contexts", c, "image_only", "texture") for c in CONTEXTS},
    "chance, images only": chance("together"),
    "chance, texture": chance("texture"),
    **{f"attributes, {c}": stories("contexts", c, "all_attributes", "together") for c in CONTEXTS},
    **{f"all right, {c}": stories("contexts", c, "all_attributes", "all_right") for c in CONTEXTS},
    **{f"narration, {task}": stories(task, "rouge_l") for task in ("multimodal", "understanding")},
    "narration, another": stories("multimodal", "of_another"),
}
"""Name -> how it is read from a result; None where the result does not have it."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number of a row over its seeds.

    Attributes:
      value: their mean.
      spread: what stands behind the plus-minus sign: standard deviation over seeds; of one seed, its error.
      error: standard error of ``value``; None where one seed has none.
    """

    value: float
    spread: float | None
    error: float | None
    seeds: int


def estimate(results: Sequence[Result], read: Callable[[Result], Measured | None]) -> Estimate | None:
    """A row's number over the seeds that have it; None where none has."""
    return combine([measured for result in results if (measured := read(result)) is not None])


def combine(found: Sequence[Measured]) -> Estimate | None:
    """One number of several seeds; None for no seed.

    With several seeds the standard error is the larger of what their spread says and what the counts say:
    two or three seeds can agree by chance.
    """
    if not found:
        return None
    if len(found) == 1:
        return Estimate(found[0].value, found[0].error, found[0].error, 1)
    count = len(found)
    spread = statistics.stdev(measured.value for measured in found)
    counted = math.sqrt(sum((measured.error or 0.0) ** 2 for measured in found)) / count
    mean = statistics.fmean(measured.value for measured in found)
    return Estimate(mean, spread, max(spread / math.sqrt(count), counted), count)


def weighted(terms: Sequence[tuple[float, Measured]]) -> Measured:
    """Weighted sum of independent numbers; without an error where one of them has none."""
    value = sum(weight * measured.value for weight, measured in terms)
    if any(measured.error is None for _, measured in terms):
        return Measured(value)
    return Measured(value, math.sqrt(sum((weight * measured.error) ** 2 for weight, measured in terms)))


def verdict(value: float, error: float | None, expected: int) -> str:
    """A difference beside the paper's.

    Args:
      expected: sign of the paper's difference; 0 where its two numbers are the same.

    Returns:
      ``agrees``, ``does not agree``, or, where ours is no larger than two standard errors, ``within noise``
      (the paper has a difference) or ``none seen`` (it has none: that noise hides ours proves nothing).
      Without an error: ``no error known``.
    """
    if error is None:
        return "no error known"
    if abs(value) <= 2 * error:
        return "within noise" if expected else "none seen"
    return "agrees" if (value > 0) - (value < 0) == expected else "does not agree"
