"""The ablations' driver on a faked trainer and judge, and the page on made-up results."""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
from pathlib import Path

import pytest

from benchmarks.ablations import __main__ as command
from benchmarks.ablations import page, paper, rows, work
from benchmarks.ablations.compare import compare
from benchmarks.ablations.results import METRICS, estimate, mean_share, read_results, verdict
from benchmarks.ablations.rows import GUIDANCE, STAGE1, STAGE2, VARIANTS, Row, RowError, plan

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
            "picture_only": {name: number(share) | {"chance": 0.25} for name in ("together", "texture")},
            "all_attributes": {"together": number(share), "all_right": number(share / 2)},
        }
        for context, share in shares.items()
    }
    told = {"rouge_l": {"mean": rouge, "count": 100, "standard_error": 0.02}}
    return {"contexts": contexts, "multimodal": told, "understanding": told}


def result(variant: str, scores: dict, seed: int = 0, steps: int = 100, **settings) -> dict:
    """A result of a row."""
    row = Row(variant, seed)
    judged = {"seed": seed, **({"pairs": 200} if row.judged == "pairs" else {"stories": 60})}
    training = {"step": steps, "losses": {"loss": 1.0}, "validation": {"caption": 0.25, "image": 0.5}}
    return {
        "variant": variant, "seed": seed, "scale": "small",
        "settings": {"assets": "a" * 64, "judge": judged, **settings},
        "command": "python -m minigpt5_jax.train" if row.trains else None,
        "git_revision": "0123456789abcdef", "machine": "a machine",
        "seconds": {"training": 60.0, "judging": 30.0},
        "training": training if row.trains else None, "scores": scores,
    }  # fmt: skip


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


# Rows


def test_rows_are_the_variants_of_the_configuration_file():
    spec = importlib.util.spec_from_file_location("ablations_config", rows.ROOT / rows.CONFIG_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = {variant: "stage1" for variant in STAGE1} | {variant: "stage2" for variant in STAGE2}
    # eight vokens are the plain run
    assert {n: s for n, s in ours.items() if n != "plain"} == {
        n: s for n, s in module.ROWS.items() if n != "vokens_8"
    }
    plain = rows.variant_config(Row("plain"), argparse.Namespace(steps=None, story_steps=None))
    assert plain.model.backbone.num_vokens == paper.VOKENS["plain"] == 8


def test_needs_come_first_and_one_seed_after_the_other():
    planned = plan(["guidance_15", "lora", "no_cap"], [1, 0, 1])
    assert [(row.variant, row.seed) for row in planned] == [
        (variant, seed) for seed in (1, 0) for variant in ("plain", "no_cap", "lora", "guidance_15")
    ]
    for position, row in enumerate(plan(VARIANTS, [0])):
        assert row.need is None or plan(VARIANTS, [0]).index(row.need) < position
    assert Row("no_stage1").need is None and Row("prefix").need == Row("plain")
    with pytest.raises(RowError, match="unknown row 'vokens_3'; known: plain"):
        plan(["vokens_3"], [0])


def test_steps_scale_the_warm_up_and_settings_name_what_numbers_depend_on():
    options = argparse.Namespace(steps=None, story_steps=None, pairs=20, stories=5)
    whole = rows.variant_config(Row("no_cap"), options)
    options.steps = whole.run.num_steps // 5
    fifth = rows.variant_config(Row("no_cap"), options)
    assert fifth.optimizer.warmup_steps == round(whole.optimizer.warmup_steps / 5) > 0
    settings = rows.row_settings(Row("no_cap", 3), options, "hash")
    assert settings["config"]["loss.caption"] == 0.0 and settings["config"]["run.seed"] == 3
    assert settings["judge"] == {"seed": 3, "pairs": 20, "native": False}
    lora = rows.row_settings(Row("lora"), options, "hash")
    assert lora["from"]["run.num_steps"] == options.steps != lora["config"]["run.num_steps"]
    sweep = rows.row_settings(Row("guidance_7.5"), options, "hash")
    assert sweep["judge"]["guidance"] == 7.5 and "config" not in sweep and sweep["from"] == lora["from"]
    options.steps = 1
    assert rows.variant_config(Row("plain"), options).optimizer.warmup_steps == 0


# The driver


class Machine:
    """Stands in for the trainer and the judge: notes what is run, can fail or be stopped at a row."""

    def __init__(self):
        self.ran, self.fails, self.stops = [], set(), set()

    def __call__(self, line):
        line = list(line)
        flag = lambda name: line[line.index(name) + 1]  # noqa: E731
        if line[1] == "minigpt5_jax.train":
            folder, [steps] = Path(flag("--workdir")), [
                int(word.partition("=")[2]) for word in line if word.startswith("--config.run.num_steps=")
            ]  # fmt: skip
            self.ran.append(("train", folder.name, line))
            if folder.name in self.fails:
                raise RowError("ended with status 1")
            if folder.name in self.stops:
                raise KeyboardInterrupt
            (folder / "checkpoints" / f"{steps:08d}").mkdir(parents=True, exist_ok=True)
            lines = [{"step": 1, "loss": 2.0}, {"step": steps, "loss": 1.0, "text": 3.0},
                     {"step": steps, "validation/caption": 0.5}]  # fmt: skip
            (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
            return
        assert line[1] == "minigpt5_jax.shapes.judge" and list(Path(flag("--run"), "checkpoints").iterdir())
        self.ran.append(("judge", Path(flag("--out")).parent.name, line))
        pairs = flag("--what") == "pairs"
        scores = pair_scores(0.5) if pairs else story_scores(dict.fromkeys(CONTEXTS, 0.5))
        Path(flag("--out")).write_text(json.dumps({"result": scores, "step": 7}))

    def names(self, what):
        return [name for kind, name, _ in self.ran if kind == what]


@pytest.fixture
def machine(monkeypatch):
    """The faked trainer and judge; backbones and plots are left alone."""
    fake = Machine()
    monkeypatch.setattr(work, "run_command", fake)
    monkeypatch.setattr(work, "git_revision", lambda: "0123")
    monkeypatch.setattr(work, "machine", lambda: "a machine")
    monkeypatch.setattr(command, "assets_hash", lambda: "hash")
    monkeypatch.setattr(page, "draw", lambda path, *args, **kwargs: path.write_bytes(b"png"))
    return fake


@pytest.fixture
def call(tmp_path, machine):
    """``call("--rows", "plain")`` in folders of its own."""
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "shapes")]
    return lambda *argv: command.main([*folders, *argv])


def test_a_row_is_trained_judged_and_written(tmp_path, machine, call):
    call("--rows", "lora,guidance_3", "--steps", "40", "--story_steps", "30", "--pairs", "8")
    assert machine.names("train") == ["plain_seed0", "lora_seed0"]
    assert machine.names("judge") == ["plain_seed0", "lora_seed0", "guidance_3_seed0"]
    line = machine.ran[2][2]
    assert "configs/ablations.py:shapes,lora" in line and "--config.run.num_steps=30" in line
    assert f"--config.run.init_from={tmp_path / 'work/plain_seed0/checkpoints'}" in line
    judged = {name: " ".join(line[2:]) for kind, name, line in machine.ran if kind == "judge"}
    run = f"--run {tmp_path / 'work/plain_seed0'} --what pairs --count 8 --seed 0"
    assert judged["plain_seed0"].startswith(f"{run} --native --out ")
    assert judged["guidance_3_seed0"].startswith(f"{run} --inference guidance_scale=3 --native --out ")
    assert f"--run {tmp_path / 'work/lora_seed0'} --what stories --count 60 " in judged["lora_seed0"]
    written = json.loads((tmp_path / "shapes/plain_seed0.json").read_text())
    assert written["training"] == {
        "step": 7, "losses": {"loss": 1.0, "text": 3.0}, "validation": {"caption": 0.5}
    }  # fmt: skip
    assert written["command"].startswith("python -m minigpt5_jax.train --config configs/ablations.py:shapes ")
    assert written["settings"]["judge"] == {"seed": 0, "pairs": 8, "native": True}
    assert json.loads((tmp_path / "shapes/guidance_3_seed0.json").read_text())["command"] is None
    assert (tmp_path / "shapes.md").read_text().startswith("# The paper's ablations")


def test_rows_of_a_seed_share_the_drawn_files(tmp_path, machine, call):
    call("--rows", "no_cap,lora", "--steps", "40")
    plain, no_cap, lora = ((tmp_path / f"work/{v}_seed0/data").resolve() for v in ("plain", "no_cap", "lora"))
    assert plain == no_cap != lora and plain.parent == tmp_path / "work" and plain.is_dir()
    call("--rows", "plain", "--seeds", "1", "--steps", "40")
    assert (tmp_path / "work/plain_seed1/data").resolve() not in (plain, lora)


def test_what_is_there_is_not_run_again_and_a_stopped_row_goes_on(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    machine.stops = {"no_cap_seed0"}
    with pytest.raises(KeyboardInterrupt):
        call("--rows", "plain,no_cap", "--steps", "40")
    assert not (tmp_path / "shapes/no_cap_seed0.json").exists()
    note = json.loads((tmp_path / "work/no_cap_seed0/row.json").read_text())
    (tmp_path / "work/no_cap_seed0/row.json").write_text(json.dumps({**note, "seconds": 100.0}))
    (tmp_path / "work/no_cap_seed0/kept").touch()
    machine.stops = set()
    call("--rows", "plain,no_cap", "--steps", "40")
    assert machine.names("train") == ["plain_seed0", "no_cap_seed0", "no_cap_seed0"]
    assert (tmp_path / "work/no_cap_seed0/kept").exists()  # the trainer found its folder as it left it
    seconds = json.loads((tmp_path / "shapes/no_cap_seed0.json").read_text())["seconds"]
    assert seconds["training"] >= 100.0
    before = len(machine.ran)
    call("--rows", "plain,no_cap", "--steps", "40")
    assert len(machine.ran) == before


def test_results_of_other_settings_are_refused_before_anything_runs(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    with pytest.raises(RowError, match=r"run\.num_steps: 40 there, 50 now(.|\n)*--force"):
        call("--rows", "no_cap,plain", "--steps", "50")
    assert machine.names("train") == ["plain_seed0"]
    (tmp_path / "work/plain_seed0/old").touch()
    call("--rows", "no_cap,plain", "--steps", "50", "--force")
    assert machine.names("train") == ["plain_seed0", "plain_seed0", "no_cap_seed0"]
    assert not (tmp_path / "work/plain_seed0/old").exists()
    # Another count needs another judgement, not another training.
    with pytest.raises(RowError, match=r"judge\.pairs: 200 there, 9 now"):
        call("--rows", "plain", "--steps", "50", "--pairs", "9")
    call("--rows", "plain", "--steps", "50", "--pairs", "9", "--force")
    assert machine.names("train").count("plain_seed0") == 2 and machine.names("judge")[-1] == "plain_seed0"
    assert json.loads((tmp_path / "shapes/plain_seed0.json").read_text())["settings"]["judge"]["pairs"] == 9


def test_another_seed_must_have_the_same_settings(machine, call):
    call("--rows", "plain", "--steps", "40")
    with pytest.raises(RowError, match=r"row plain_seed1: .*plain_seed0.json is of other settings"):
        call("--rows", "plain", "--seeds", "1", "--steps", "50")
    call("--rows", "plain", "--seeds", "1", "--steps", "40")
    assert machine.names("train") == ["plain_seed0", "plain_seed1"]


def test_a_row_begun_with_other_settings_is_refused(machine, call):
    machine.stops = {"plain_seed0"}
    with pytest.raises(KeyboardInterrupt):
        call("--rows", "plain", "--steps", "40")
    machine.stops = set()
    with pytest.raises(RowError, match=r"plain_seed0 is of other settings(.|\n)*40 there, 50 now"):
        call("--rows", "plain", "--steps", "50")
    call("--rows", "plain", "--steps", "40")


def test_a_need_without_its_checkpoint_is_named(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    call("--list", "--work", str(tmp_path / "elsewhere"), "--steps", "40")
    with pytest.raises(RowError, match="row plain_seed0: lora_seed0 needs its checkpoint, which is not in"):
        call("--rows", "lora", "--steps", "40", "--work", str(tmp_path / "elsewhere"))
    assert machine.names("train") == ["plain_seed0"]
    call("--rows", "lora", "--steps", "40", "--work", str(tmp_path / "elsewhere"), "--force")
    assert machine.names("train") == ["plain_seed0", "plain_seed0", "lora_seed0"]


def test_a_failed_row_stops_only_those_that_need_it(tmp_path, machine, call, capsys):
    machine.fails = {"plain_seed0"}
    with pytest.raises(RowError, match="2 rows failed: plain_seed0, lora_seed0"):
        call("--rows", "lora,no_cap", "--steps", "40")
    assert machine.names("judge") == ["no_cap_seed0"]
    assert "not run, because plain_seed0 failed" in capsys.readouterr().err
    assert "no_cap, seed 0" in (tmp_path / "shapes.md").read_text()


def test_a_foreign_folder_is_left_alone(tmp_path, machine, call):
    (tmp_path / "work/plain_seed0").mkdir(parents=True)
    (tmp_path / "work/plain_seed0/thesis.txt").touch()
    with pytest.raises(RowError, match="holds something that is no row"):
        call("--rows", "plain", "--force")
    assert (tmp_path / "work/plain_seed0/thesis.txt").exists() and not machine.ran


# Numbers


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
        (0.19, 0.1, 0, "agrees"),
        (0.21, 0.1, 0, "does not agree"),
        (0.5, None, 1, "no error known"),
    ],
)
def test_verdicts_take_two_standard_errors(value, error, expected, said):
    assert verdict(value, error, expected) == said


def test_a_claim_is_compared_on_the_rows_that_were_run():
    [claim] = [c for c in paper.orderings(paper.TABLE5, "all", "Table 5") if "plain" in c.terms[0]
               and "no_cap" in c.terms[1]]  # fmt: skip
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
    assert compare(grouped(plain, longer), claim).difference == "steps 100 and 200"


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


# The page


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
def read(tmp_path, machine):
    """``read(results) -> page``, without plots."""

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


def test_a_whole_page_has_every_row_and_spread_over_seeds(read):
    text = read(*everything(2))
    assert "- Not run: nothing." in text and "not run |" not in text
    assert "- 44 results: 22 of 22 rows, with up to 2 seeds (0, 1);" in text
    assert "| MiniGPT-5 (plain) | 2 | 100 | 0.325 ± 0.035 |" in text  # stdev of .30 and .35
    assert "(shapes/guidance.png)" in text and "(shapes/vokens.png)" in text
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
