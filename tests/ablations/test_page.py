"""Numbers, verdicts and the page of the ablations, on made-up results."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path

import pytest

from benchmarks.ablations import __main__ as command
from benchmarks.ablations import page, paper
from benchmarks.ablations.compare import compare
from benchmarks.ablations.results import METRICS, estimate, mean_share, read_results, verdict
from benchmarks.ablations.rows import GUIDANCE, VARIANTS, Row, RowError

ATTRIBUTES = ("background", "shape", "colour", "size", "texture", "place")
CONTEXTS = ("none", "text", "image", "image+text")


def pair_scores(share: float, count: int = 200, native: float | None = None) -> dict:
    """What judge_pairs returns, every share the same."""
    row = {"count": count, "vokens": {name: share for name in ("all", *ATTRIBUTES, "drawn")}}
    if native is not None:
        row["native"] = {name: native for name in ("all", *ATTRIBUTES, "drawn")}
    return {number: row for number in "123"}


def number(share: float, count: int = 100) -> dict:
    """A share as judge_stories returns it."""
    return {"share": share, "count": count, "standard_error": math.sqrt(share * (1 - share) / count)}


def story_scores(shares: dict[str, float], rouge: float = 0.5) -> dict:
    """What judge_stories returns."""
    contexts = {
        context: {
            "image_only": {name: number(share) | {"chance": 0.25} for name in ("together", "texture")},
            "all_attributes": {"together": number(share), "all_right": number(share / 2)},
        }
        for context, share in shares.items()
    }
    told = {"rouge_l": {"mean": rouge, "count": 100, "standard_error": 0.02}}
    other = {"of_another": {**told["rouge_l"], "mean": 0.125}}
    return {"contexts": contexts, "multimodal": {**told, **other}, "understanding": told}


def result(variant: str, scores: dict, seed: int = 0, steps: int = 100, **settings) -> dict:
    """A result of a row."""
    row = Row(variant, seed)
    judged = {"seed": seed, **({"pairs": 200} if row.judged == "pairs" else {"stories": 60})}
    if row.trains:
        settings = {"config": {"run.num_steps": steps, "data.max_length": 72 + len(variant)}, **settings}
    training = {"step": steps, "losses": {"loss": 1.0}, "validation": {"caption": 0.25, "image": 0.5}}
    return {
        "variant": variant,
        "seed": seed,
        "scale": "small",
        "settings": {"assets": "a" * 64, "judge": judged, **settings},
        "command": "python -m minigpt5_jax.train" if row.trains else None,
        "git_revision": "0123456789abcdef",
        "machine": "a machine",
        "seconds": {"training": 60.0, "judging": 30.0},
        "training": training if row.trains else None,
        "scores": scores,
    }


def write(folder: Path, *results: dict) -> Path:
    """Results where the page looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in results:
        (folder / f"{Row(one['variant'], one['seed']).name}.json").write_text(json.dumps(one))
    return folder


def grouped(*results: dict) -> dict:
    found = collections.defaultdict(list)
    for one in results:
        found[one["variant"]].append(one)
    return dict(found)


def test_errors_of_shares_and_of_seeds():
    one = mean_share([(0.5, 96)])
    assert one.value == 0.5 and one.error == pytest.approx(0.05)  # sqrt(.25 / 100)
    assert mean_share([(0.5, 96)] * 4).error == pytest.approx(0.025)
    assert mean_share([(1.0, 96)]).error == pytest.approx(math.sqrt(0.98 * 0.02 / 100))
    seeds = [result("plain", pair_scores(share, 96), seed) for seed, share in enumerate((0.4, 0.6))]
    found = estimate(seeds, METRICS["all 1"])
    assert (found.value, found.seeds) == (pytest.approx(0.5), 2)
    assert found.spread == pytest.approx(math.sqrt(0.02)) and found.error == pytest.approx(0.1)
    alike = [result("plain", pair_scores(0.5, 96), seed) for seed in range(2)]
    found = estimate(alike, METRICS["all 1"])
    assert found.spread == 0 and found.error == pytest.approx(0.05 / math.sqrt(2))
    assert estimate(alike, METRICS["caption"]).value == 0.25
    assert estimate(alike, METRICS["native"]) is None


@pytest.mark.parametrize(
    ("value", "error", "expected", "said"),
    [
        (0.21, 0.1, 1, "agrees"),
        (0.19, 0.1, 1, "within noise"),
        (-0.19, 0.1, 1, "within noise"),
        (-0.21, 0.1, 1, "does not agree"),
        (-0.21, 0.1, -1, "agrees"),
        (0.19, 0.1, 0, "none seen"),
        (0.21, 0.1, 0, "does not agree"),
        (0.5, None, 1, "no error known"),
    ],
)
def test_verdicts_take_two_standard_errors(value, error, expected, said):
    assert verdict(value, error, expected) == said


def test_a_claim_is_compared_on_the_rows_that_were_run():
    [claim] = [
        c
        for c in paper.orderings(paper.TABLE5, "all", "Table 5")
        if "plain" in c.terms[0] and "no_cap" in c.terms[1]
    ]
    assert claim.expected == 1 and claim.paper == "Table 5: CLIP-I 0.61 and 0.54"
    plain = result("plain", pair_scores(0.9))
    assert compare(grouped(plain), claim).verdict == "not run"
    assert compare(grouped(plain, result("no_cap", pair_scores(0.5))), claim).verdict == "agrees"
    assert compare(grouped(plain, result("no_cap", pair_scores(0.9))), claim).verdict == "within noise"
    worse = compare(grouped(result("plain", pair_scores(0.5)), result("no_cap", pair_scores(0.9))), claim)
    assert worse.verdict == "does not agree" and worse.difference.startswith("-0.400 ± 0.0")
    # Over the seeds that both have, seed by seed: .4 and .2 of seeds 0 and 1.
    more = [result("plain", pair_scores(share), seed) for seed, share in enumerate((0.9, 0.8, 0.1))]
    less = [result("no_cap", pair_scores(share), seed) for seed, share in enumerate((0.5, 0.6))]
    assert compare(grouped(*more, *less), claim).difference == "+0.300 ± 0.100 (2 seeds)"
    longer = result("no_cap", pair_scores(0.5), steps=200)
    assert compare(grouped(plain, longer), claim).verdict == "not comparable"
    assert compare(grouped(plain, longer), claim).difference == "run.num_steps: 100 and 200"
    other = result("no_cap", pair_scores(0.5), config={"run.num_steps": 100, "optimizer.lr_mapper": 0.5})
    assert compare(grouped(plain, other), claim).difference.startswith("optimizer.lr_mapper: 'not there' and")
    other = result("no_cap", pair_scores(0.5), config={"run.num_steps": 100, "inference.guidance_scale": 2.0})
    assert compare(grouped(plain, other), claim).verdict == "not comparable"
    other = result("no_cap", pair_scores(0.5, 100), judge={"seed": 0, "pairs": 100})
    assert compare(grouped(plain, other), claim).difference == "judged on 200 and 100 pairs"


def test_rows_that_differ_in_more_than_their_variant_are_not_compared():
    claim = paper.GUIDANCE_CLAIMS[0]
    made = {"guidance_1": 0.5, "guidance_7.5": 0.9}
    alike = [result(v, pair_scores(s), **{"from": {"run.num_steps": 5}}) for v, s in made.items()]
    assert compare(grouped(*alike), claim).verdict == "agrees"
    other = result("guidance_7.5", pair_scores(0.9), **{"from": {"run.num_steps": 6}})
    found = compare(grouped(alike[0], other), claim)
    assert (found.verdict, found.difference) == ("not comparable", "from runs of other run.num_steps")
    seeds = [result("guidance_1", pair_scores(0.5), s, **{"from": {"run.seed": s}}) for s in (0, 1)]
    later = result("guidance_7.5", pair_scores(0.9), 1, **{"from": {"run.seed": 1}})
    assert compare(grouped(*seeds, later), claim).verdict == "agrees", "the seed of a run is no other run"
    other = result("guidance_7.5", pair_scores(0.9), assets="b" * 64)
    assert compare(grouped(alike[0], other), claim).difference == "other backbones"


def test_the_paper_s_ties_and_contrasts():
    ties = [c.text for c in paper.context_claims(paper.TABLE6, "attributes, {}") if not c.expected]
    assert ties == [
        "stage 1 only (zero-shot): image against text",
        "stage 1 only (zero-shot): image+text against image",
        "w/o stage 1: image+text against image",
    ]
    gain = paper.VOKEN_CLAIMS[-1]  # (v4 - v1) - (v8 - v4)
    curve = {"vokens_1": 0.2, "vokens_4": 0.8, "plain": 0.9}
    found = compare(grouped(*(result(v, pair_scores(s)) for v, s in curve.items())), gain)
    assert found.difference.startswith("+0.500 ±") and found.verdict == "agrees"


def everything(seeds: int = 1) -> list[dict]:
    """A result for every row, the same every time."""
    made = []
    for seed in range(seeds):
        for position, variant in enumerate(VARIANTS):
            share = 0.3 + 0.02 * position + 0.05 * seed
            if Row(variant).judged == "pairs":
                native = 0.97 if variant == "plain" or variant in GUIDANCE else None
                scores = pair_scores(share, native=native)
            else:
                scores = story_scores({c: share + 0.05 * i for i, c in enumerate(CONTEXTS)})
            made.append(result(variant, scores, seed))
    return made


def test_the_same_results_give_the_same_page_and_plots(tmp_path):
    contents = []
    for name in ("a", "b"):
        folder = write(tmp_path / name / "shapes", *everything(2))
        command.main(["--page_only", "--results", str(folder)])
        command.main(["--page_only", "--results", str(folder)])
        contents.append({p.name: p.read_bytes() for p in [folder.with_suffix(".md"), *folder.glob("*.png")]})
    assert contents[0] == contents[1] and contents[0].keys() == {"shapes.md", "guidance.png", "vokens.png"}
    assert all(contents[0][name].startswith(b"\x89PNG") for name in ("guidance.png", "vokens.png"))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``read(results) -> page``, without plots."""
    monkeypatch.setattr(page, "draw", lambda path, *args: path.write_bytes(b"png"))

    def made(*results: dict) -> str:
        return page.write_page(write(tmp_path / "shapes", *results)).read_text()

    return made


def test_the_page_says_what_was_run_and_what_was_not(read):
    text = read(result("plain", pair_scores(0.9, native=0.97)), result("no_cap", pair_scores(0.5)))
    assert "- 2 results: 2 of 22 rows, with up to 1 seeds (0);" in text
    assert "- Not run: no_ldm, no_cfg," in text and "guidance_15." in text
    assert "A larger scale (128 pixels, wider towers, on an H200) was not run." in text
    assert "| w/o L_LDM | not run |" in text
    assert "| MiniGPT-5 (plain) | 1 | 100 | 0.900 ± 0.022 |" in text  # sqrt(182/204 * 22/204 / 204)
    assert "| 0.61 | 0.22 | 28.09 | 31.47 |" in text
    against = "| MiniGPT-5 (plain) against w/o L_CAP | +0.400 ± "
    assert next(line for line in text.splitlines() if line.startswith(against)).endswith("| **agrees** |")
    assert "1 object 0.970 ± " in text and "Comparisons with the paper: 1 agrees, " in text
    assert "No plot: fewer than two of these rows were run." in text


def test_the_page_says_where_nothing_was_right_and_which_guidance_is_best(read):
    rows = [result("plain", pair_scores(0.9)), result("no_cap", pair_scores(0.0))]
    rows += [
        result(name, pair_scores(s, native=n))
        for name, s, n in (("guidance_1", 0.5, 0.9), ("guidance_5", 0.7, 0.8), ("guidance_15", 0.6, 0.7))
    ]
    text = read(*rows)
    assert "Not one image was all right of: w/o L_CAP. A verdict about such a row" in text
    assert "Most is right, by the means: from vokens at 5, natively at 1." in text
    assert text.count("Not one image") == 1  # of two tables


def test_a_whole_page_has_every_row_and_spread_over_seeds(read):
    text = read(*everything(2))
    assert "- Not run: nothing." in text and "not run |" not in text
    assert "- 44 results: 22 of 22 rows, with up to 2 seeds (0, 1);" in text
    assert "| MiniGPT-5 (plain) | 2 | 100 | 0.325 ± 0.035 |" in text  # stdev of .30 and .35
    assert "(shapes/guidance.png)" in text and "(shapes/vokens.png)" in text
    assert "| 0.500 ± 0.000 | 0.125 ± 0.000 | 0.66 | 366.62 |" in text  # narrations of LoRA, Table 1
    for variant in VARIANTS:
        assert f"| {variant}, seed 1 |" in text


def test_results_that_cannot_be_read_together_are_refused(tmp_path, read):
    with pytest.raises(RowError, match="no results in"):
        read()
    plain = result("plain", pair_scores(0.9), config={"run.num_steps": 100, "run.seed": 0})
    other = result("plain", pair_scores(0.9), 1, config={"run.num_steps": 200, "run.seed": 1})
    with pytest.raises(RowError, match=r"seeds 0 and 1 of plain(.|\n)*num_steps: 100 there, 200 now"):
        read(plain, other)
    (tmp_path / "shapes/plain_seed1.json").write_text(json.dumps(plain))
    with pytest.raises(RowError, match="call it plain_seed0.json"):
        read_results(tmp_path / "shapes")
    (tmp_path / "shapes/plain_seed1.json").write_text("{")
    with pytest.raises(RowError, match="plain_seed1.json is no JSON"):
        read_results(tmp_path / "shapes")
    (tmp_path / "shapes/plain_seed1.json").write_text("{}")
    with pytest.raises(RowError, match="is no result of a row"):
        read_results(tmp_path / "shapes")
