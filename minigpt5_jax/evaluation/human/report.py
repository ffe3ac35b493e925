"""What a study found: wins, ties and losses, tests and agreement, and a table like the paper's Table 3."""

from __future__ import annotations

import html
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.json_files import read_jsonl
from minigpt5_jax.evaluation.human.answers import JUDGEMENTS, read_key
from minigpt5_jax.evaluation.human.items import ITEM
from minigpt5_jax.evaluation.human.questions import LEFT, NAMES, PAPER, TIE
from minigpt5_jax.evaluation.human.statistics import holm, krippendorff_alpha, raw_agreement, sign_test
from minigpt5_jax.evaluation.suite.report import STYLE, number, range_of, table
from minigpt5_jax.evaluation.suite.resampling import Terms, interval, ratio

FILE, PAGE = "report.json", "report.html"
RATES = {"without_ties": None, "ties_as_zero": 0.0, "ties_as_half": 0.5}
"""What a tie counts for the first system; None leaves ties out."""
Rows = Sequence[Mapping[str, Any]]


def report(study: str | Path) -> dict[str, Any]:
    """The content of ``report.json``, which is written with a page into the study's folder.

    The first system of the study is the one whose wins are counted.

    Raises:
      ConfigError: the folder holds no study, or its answers were not merged.
      DataError: the key or the judgements are damaged, or no judgement is left.
    """
    folder, key = Path(study), read_key(study)
    if not (folder / JUDGEMENTS).is_file():
        raise ConfigError(f"{folder} has no {JUDGEMENTS}; merge the answers first: human merge")
    rows = read_jsonl(folder / JUDGEMENTS, "merge the answers again: human merge")
    excluded = exclusions(rows, key)
    left = [row for row in rows if row["rater"] not in excluded]
    judged = [row for row in left if row["kind"] == ITEM and not row["repeat"]]
    if not any(value for row in judged for value in row["answers"].values()):
        raise DataError(f"no judgement is left of {len(rows)}; {len(excluded)} raters were left out")
    found = {name: _question(judged, name, key["systems"]) for name in key["questions"]}
    corrected = holm({name: entry["p"] for name, entry in found.items()})
    for name, p in corrected.items():
        found[name]["p_holm"] = p
    result = {
        "study_sha256": key["study_sha256"],
        "systems": key["systems"],
        "rules": key["rules"],
        "n_items": len({row["item"] for row in judged}),
        "n_raters": len({row["rater"] for row in judged}),
        "excluded": [{"rater": rater, "why": why} for rater, why in excluded.items()],
        "questions": found,
        "checks": _checks(left, key),
    }
    (folder / FILE).write_text(
        json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
    (folder / PAGE).write_text(_page(result), "utf-8")
    return result


# --------------------------------------------------------------------------------- raters


def controls_right(rows: Rows, key: Mapping[str, Any]) -> list[bool]:
    """Whether each answer to a control is the right one."""
    return [
        row["answers"][name] == right
        for row in rows
        for name, right in key["items"][row["item"]]["expected"].items()
        if row["answers"][name] is not None
    ]


def exclusions(rows: Rows, key: Mapping[str, Any]) -> dict[str, str]:
    """Rater -> why all of its judgements are left out, by the rules that were fixed with the study."""
    by_rater: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_rater[row["rater"]].append(row)
    rules, found = key["rules"], {}
    for rater, some in by_rater.items():
        checks = controls_right(some, key)
        seconds = statistics.median(row["seconds"] for row in some)
        if checks and sum(checks) < rules["least_controls_right"] * len(checks):
            found[rater] = f"{sum(checks)} of {len(checks)} controls right"
        elif seconds < rules["least_median_seconds"]:
            found[rater] = f"{seconds:g} s for half of the items or less"
    return found


def _checks(rows: Rows, key: Mapping[str, Any]) -> dict[str, Any]:
    """How reliable the raters that stay are: controls, repeats, and preference for a side."""
    controls = controls_right(rows, key)
    first = {(r["rater"], r["item"]): r["answers"] for r in rows if not r["repeat"]}
    again = [
        row["answers"][name] == before[name]
        for row in rows
        if row["repeat"] and (before := first.get((row["rater"], row["item"])))
        for name in before
        if None not in (row["answers"][name], before[name])
    ]
    sides = Counter(v for r in rows if r["kind"] == ITEM for v in r["sides"].values() if v not in (None, TIE))
    return {
        "controls_right": _share(controls),
        "repeats_equal": _share(again),
        "left_chosen": sides[LEFT] / sides.total() if sides else None,
        "median_seconds": statistics.median(row["seconds"] for row in rows),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


# ------------------------------------------------------------------------------- questions


def _question(rows: Rows, name: str, systems: Sequence[str]) -> dict[str, Any]:
    """Everything about one question."""
    by_item: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["answers"][name] is not None:
            by_item[row["item"]].append(row["answers"][name])
    answers = Counter(value for values in by_item.values() for value in values)
    first, second = systems
    majority = Counter(_majority(values, systems) for values in by_item.values())
    units = list(by_item.values())
    rates = {}
    for rule, tie in RATES.items():
        terms = [_terms(values, first, tie) for values in units]
        rates[rule] = {"value": ratio(terms), "ci": interval([t for t in terms if t[1]], "items")}
    return {
        "judgements": {"wins": answers[first], "ties": answers[TIE], "losses": answers[second]},
        "items": {"wins": majority[first], "ties": majority[TIE], "losses": majority[second]},
        "win_rate": rates,
        "p": sign_test(majority[first], majority[second]),
        "test": "sign test over items with a winner, two-sided",
        "alpha": krippendorff_alpha(units),
        "raw_agreement": raw_agreement(units),
    }


def _majority(values: Sequence[str], systems: Sequence[str]) -> str:
    """Whom most raters of an item chose; a tie where as many chose the other."""
    counts = Counter(values)
    balance = counts[systems[0]] - counts[systems[1]]
    return TIE if balance == 0 else systems[balance < 0]


def _terms(values: Sequence[str], system: str, tie: float | None) -> Terms:
    """What an item adds to wins and to judgements."""
    wins, ties = values.count(system), values.count(TIE)
    if tie is None:
        return float(wins), float(len(values) - ties)
    return wins + tie * ties, float(len(values))


# ------------------------------------------------------------------------------------ page


def _page(result: Mapping[str, Any]) -> str:
    """The report as a page."""
    systems, checks = result["systems"], result["checks"]
    total = {name: sum(entry["judgements"].values()) for name, entry in result["questions"].items()}
    rows, rates, paper = [], [], []
    for name, entry in result["questions"].items():
        shares = [100 * entry["judgements"][what] / (total[name] or 1) for what in ("wins", "ties", "losses")]
        agreement = [number(entry["alpha"]), number(entry["p"]), number(entry["p_holm"])]
        rows.append([NAMES[name], *(f"{share:.2f}" for share in shares), str(total[name]), *agreement])
        items = entry["items"]
        rates.append(
            [NAMES[name], f"{items['wins']} / {items['ties']} / {items['losses']}"]
            + [f"{number(rate['value'])} {range_of(rate['ci'])}" for rate in entry["win_rate"].values()]
        )
        paper.append([NAMES[name], *(f"{share:.2f}" for share in PAPER[name])])
    said = (
        f"{result['n_items']} items, {result['n_raters']} raters, {len(result['excluded'])} left out. "
        f"Controls right: {number(checks['controls_right'])}; repeats judged alike: "
        f"{number(checks['repeats_equal'])}; left side among decided answers: "
        f"{number(checks['left_chosen'])}; "
        f"median time of an item: {checks['median_seconds']:g} s."
    )
    left_out = [[entry["rater"], entry["why"]] for entry in result["excluded"]]
    body = [
        f"<h1>Human study: {html.escape(systems[0])} against {html.escape(systems[1])}</h1>",
        f"<p>{html.escape(said)}</p>",
        "<h2>Judgements in percent</h2>",
        table(["question", systems[0], "tie", systems[1], "n", "alpha", "p (items)", "p, Holm"], rows),
        f"<h2>Win rate of {html.escape(systems[0])}</h2>",
        table(["question", "items won / tied / lost", "without ties", "ties as 0", "ties as 0.5"], rates),
        "<p>Intervals: 95 %, percentile bootstrap over items. p: sign test over items with a winner. alpha: "
        "Krippendorff's, nominal.</p>",
        "<h2>The paper's Table 3</h2>",
        table(["question", "MiniGPT-5", "tie", "two-stage baseline"], paper),
        *(["<h2>Raters left out</h2>", table(["rater", "why"], left_out)] if left_out else []),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Human study</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
