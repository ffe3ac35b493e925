"""The study with people: who judges what, answers from every source, and what follows of them."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from human_study import SYSTEMS, answer_file, honest, materials, study_in
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.evaluation.human.answers import merge
from minigpt5_jax.evaluation.human.design import Draw, arrange, deal
from minigpt5_jax.evaluation.human.make import Plan, make
from minigpt5_jax.evaluation.human.report import report
from minigpt5_jax.evaluation.human.statistics import holm, krippendorff_alpha, raw_agreement, sign_test


@pytest.fixture
def study(tmp_path):
    return study_in(tmp_path)


# ------------------------------------------------------------------------------------- design


@pytest.mark.parametrize("count, judgements, per_rater", [(40, 3, 20), (7, 2, 3), (51, 2, 50), (1, 1, 1)])
def test_sides_are_balanced_by_item_and_by_rater(count, judgements, per_rater):
    names = [f"i{n}" for n in range(count)]
    hands = deal(names, judgements, per_rater, Draw(3))
    by_item = defaultdict(list)
    for hand in hands:
        assert 0 < len(hand) <= per_rater and len({s.item for s in hand}) == len(hand)
        lefts = sum(screen.first_left for screen in hand)
        assert abs(2 * lefts - len(hand)) <= 2
        for screen in hand:
            by_item[screen.item].append(screen.first_left)
    assert by_item.keys() == set(names)
    for lefts in by_item.values():
        assert len(lefts) == judgements and abs(2 * sum(lefts) - judgements) <= 1
    assert deal(names, judgements, per_rater, Draw(3)) == hands
    assert count < 7 or deal(names, judgements, per_rater, Draw(4)) != hands


def test_a_rater_gets_controls_and_repeats_far_from_their_first_showing():
    [hand] = deal([f"i{n}" for n in range(40)], 1, 40, Draw(0))
    screens = arrange(hand, ["c1", "c2"], "rater", Draw(0))
    assert Counter(s.item for s in screens if not s.repeat) == Counter([s.item for s in hand] + ["c1", "c2"])
    repeats = [place for place, screen in enumerate(screens) if screen.repeat]
    assert len(repeats) == 2
    for place in repeats:
        [first] = [n for n, s in enumerate(screens) if s.item == screens[place].item and not s.repeat]
        assert first < 21 <= place and screens[first].first_left != screens[place].first_left


# --------------------------------------------------------------------------------------- make


def test_the_page_does_not_tell_systems_from_each_other(study):
    folder, key = study
    page = (folder / "page/index.html").read_text()
    data = page.partition('id="study">')[2].partition("</script>")[0]
    assert "<" not in data, "texts cannot end the script"
    shown = json.loads(data)
    for name in (*SYSTEMS, "identical", "shuffled", "s0_2"):
        assert f'"{name}"' not in data
    assert shown["sha256"] == key["study_sha256"]
    firsts = Counter(i["options"][0] for i in key["items"].values() if i["kind"] == "item")
    assert firsts.total() == 8 and len(firsts) == 2, (
        "the page's first answer is now one system's, now the other's"
    )
    assert {len(screens) for screens in shown["raters"].values()} == {7}, "4 items, 2 controls, a repeat"
    item = next(iter(shown["items"].values()))
    assert [part.keys() for part in item["options"][0]] == [{"text"}, {"image"}]
    assert "###" not in data and len(item["scenes"]) == 2
    assert item["options"][0][1]["image"].startswith("data:image/png;base64,")
    kinds = Counter(key["items"][s["item"]]["kind"] for screens in key["raters"].values() for s in screens)
    assert kinds == {"item": 20, "truth": 4, "identical": 4}


def test_images_may_lie_beside_the_page(tmp_path):
    folder, _ = study_in(tmp_path, inline=False)
    data = (folder / "page/index.html").read_text()
    assert "data:image" not in data
    shown = json.loads(data.partition('id="study">')[2].partition("</script>")[0])
    sources = [p["image"] for i in shown["items"].values() for o in i["options"] for p in o if "image" in p]
    assert sources and all((folder / "page" / source).is_file() for source in sources)


def test_what_cannot_be_made_is_refused(tmp_path):
    given = materials(tmp_path / "given", 4)
    plan = {**given, "output": str(tmp_path / "study")}
    make(Plan(**plan))
    with pytest.raises(ConfigError, match="holds a study, whose answers would no longer fit; choose another"):
        make(Plan(**plan))
    plan["output"] = str(tmp_path / "next")
    with pytest.raises(ConfigError, match="give two systems.*got 1"):
        make(Plan(**plan | {"systems": {"ours": given["systems"]["ours"]}}))
    with pytest.raises(ConfigError, match="9 items are wanted, but there are 4 samples; lower --count"):
        make(Plan(**plan, count=9))
    with pytest.raises(ConfigError, match="unknown question beauty; known: continuity, quality, coherence"):
        make(Plan(**plan, questions=["beauty"]))
    with pytest.raises(ConfigError, match="must begin with https://"):
        make(Plan(**plan, base_url="http://a.org"))
    for name in SYSTEMS:
        path = Path(given["systems"][name]) / "conversations.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            del line["turns"][0]["content"][0]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="no answer has texts.*give --questions quality,coherence"):
        make(Plan(**plan))
    assert make(Plan(**plan, questions=["quality", "coherence"]))["items"] == 4, "the remedy"


# -------------------------------------------------------------------------------------- merge


def test_answers_of_the_page_become_judgements(study, tmp_path):
    folder, key = study
    first, *others = key["raters"]
    answer_file(tmp_path / "in", key, first, honest)
    path = answer_file(tmp_path / "in", key, others[0], honest)
    value = json.loads(path.read_text())
    value["items"][0]["answers"]["quality"] = None
    value["items"].pop()  # a screen that was never seen
    path.write_text(json.dumps(value))
    found = merge(folder, [tmp_path / "in"])
    assert (found["judgements"], found["raters"], found["missing"], found["twice"]) == (38, 2, 4, 0)
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    items = [row for row in rows if row["kind"] == "item"]
    assert {v for row in items for v in row["answers"].values()} == {"ours", None}
    lefts = {row["left"] for row in items}
    assert lefts == set(SYSTEMS), "the first system was on both sides"


def test_files_that_are_no_answers_of_this_study_are_refused(study, tmp_path):
    folder, key = study
    token = next(iter(key["raters"]))
    path = answer_file(tmp_path / "in", key, token, honest)
    text = path.read_text()
    path.write_text(text[:200])
    with pytest.raises(
        DataError, match=r"answers_.*cut off or no JSON; .*saved once more on the page .*or leave"
    ):
        merge(folder, [tmp_path / "in"])
    path.write_text(text.replace(key["study_sha256"], "0" * 64))
    with pytest.raises(
        DataError, match=r"answers another study \(000000000000... instead of .*give the --study"
    ):
        merge(folder, [path])
    path.write_text(text)
    (path.parent / "answers_copy.json").write_text(text)
    with pytest.raises(DataError, match=f"answers_copy.json have the same rater, {token}; keep one of them"):
        merge(folder, [tmp_path / "in"])
    assert merge(folder, [path])["raters"] == 1, "the remedy: one of them"
    path.write_text(text.replace('"quality": "', '"quality": "9'))
    with pytest.raises(DataError, match="is none of 1, 2, tie"):
        merge(folder, [path])
    path.write_text('{"items": [{}]}')
    with pytest.raises(DataError, match="holds no answers; give files that the page saved.*KeyError"):
        merge(folder, [path])
    with pytest.raises(ConfigError, match=r"holds no key.json; give the --output of `human make`"):
        merge(tmp_path, [path])
    with pytest.raises(DataError, match="no files of answers; give --answers"):
        merge(folder, [])


def test_damaged_files_are_named(study, tmp_path):
    folder, key = study
    path = answer_file(tmp_path / "in", key, next(iter(key["raters"])), honest)
    text = path.read_text()
    for bad in ("NaN", "Infinity", "-1", '"soon"', "null"):
        path.write_text(text.replace('"seconds": 10.0', f'"seconds": {bad}', 1))
        with pytest.raises(DataError, match=r"answers_.*holds no answers; .*(Value|Type)Error"):
            merge(folder, [path])
    path.write_text(text.replace('"comment": ""', '"comment": "a\u2028b"', 1))
    table = tmp_path / "results.csv"
    for content in (
        b"Input.study,Input.rater,Input.place,WorkerId\na,b,first,c\n",
        b"Input.study\xff\n",
        b"Input.study,Input.rater,Input.place,WorkerId,Answer.taskAnswers\na,b,0,c,[{\n",
    ):
        table.write_bytes(content)
        with pytest.raises(DataError, match=r"results.csv holds no answers; .*Mechanical Turk"):
            merge(folder, [table])
    merge(folder, [path])
    judgements, named = folder / "judgements.jsonl", folder / "key.json"
    assert report(folder)["n_raters"] == 1, "a comment may hold what ends lines elsewhere"
    judgements.write_text(judgements.read_text()[:-20])
    with pytest.raises(DataError, match=r"judgements.jsonl:7 is cut off or no JSON; merge the answers again"):
        report(folder)
    merge(folder, [path])
    assert report(folder)["n_raters"] == 1, "the remedy"
    for damaged in (named.read_text()[:100], "[]"):
        named.write_text(damaged)
        with pytest.raises(DataError, match="key.json is .*restore it from a copy"):
            merge(folder, [path])


def test_nobody_can_compute_what_was_drawn(tmp_path):
    given = materials(tmp_path / "given", 4)
    keys = []
    for number in range(2):
        make(Plan(**given, output=str(tmp_path / f"{number}")))
        keys.append(json.loads((tmp_path / f"{number}/key.json").read_text()))
    assert keys[0]["seed"] != keys[1]["seed"] and not keys[0]["raters"].keys() & keys[1]["raters"].keys()
    make(Plan(**given, output=str(tmp_path / "again"), seed=keys[0]["seed"]))
    again = json.loads((tmp_path / "again/key.json").read_text())
    assert again["raters"] == keys[0]["raters"], "the seed of the key draws the same"
    (tmp_path / "intro.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="intro.txt is no text in UTF-8; save it in this encoding"):
        make(Plan(**given, output=str(tmp_path / "x"), introduction=str(tmp_path / "intro.txt")))


def test_platforms(tmp_path):
    """Exports have a screen a row; results come back by the forms of Mechanical Turk and of Label Studio."""
    folder, key = study_in(tmp_path, base_url="https://example.org/s", completion_code="C0DE")
    with (folder / "exports/mturk.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 7 and "https://example.org/s/images/" in rows[0]["left"]
    layout = (folder / "exports/mturk.html").read_text()
    assert all(f"${{{name}}}" in layout for name in ("scenes", "left", "right")) and "crowd-form" in layout
    prolific = json.loads((folder / "exports/prolific.json").read_text())
    assert [a["external_url"].partition("?rater=")[2] for a in prolific["access_details"]] == list(
        key["raters"]
    )
    assert prolific["completion_codes"][0]["code"] == "C0DE"
    tasks = json.loads((folder / "exports/label_studio.json").read_text())
    assert len(tasks) == 28 and "/data/local-files/?d=images/" in tasks[0]["data"]["left"]
    assert 'alias="tie"' in (folder / "exports/label_studio.xml").read_text()

    def right(row):
        screen = key["raters"][row["rater"]][int(row["place"])]
        item = key["items"][screen["item"]]
        sides = item["options"][::-1] if screen["exchanged"] else item["options"]
        return {name: honest(*sides, item, name) for name in key["questions"]}

    results = []
    for number, row in enumerate(rows[:10]):
        cells = {f"Input.{name}": cell for name, cell in row.items()}
        cells |= {"WorkerId": f"W{number % 2}", "WorkTimeInSeconds": "30"}
        one, two, three = right(row).items()
        cells["Answer.taskAnswers"] = json.dumps([{one[0]: {c: c == one[1] for c in ("1", "2", "tie")}}])
        cells[f"Answer.{two[0]}"] = two[1]
        cells |= {f"Answer.{three[0]}.{c}": str(c == three[1]).lower() for c in ("1", "2", "tie")}
        results.append(cells)
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0].keys())
        writer.writeheader()
        writer.writerows(results)
    found = merge(folder, [path])
    lines = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert found["raters"] == 2 and found["missing"] == 0
    assert {v for line in lines if line["kind"] == "item" for v in line["answers"].values()} == {"ours"}
    assert "W0" not in (folder / "judgements.jsonl").read_text(), "names of workers are hashed"
    same = [dict(row, WorkerId="W0") for row in results]  # one worker on two raters' screens of an item
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0].keys())
        writer.writeheader()
        writer.writerows([*same, *same[:1]])
    assert merge(folder, [path])["twice"] >= 1

    said = {"1": "Output 1", "2": "Output 2", "tie": "tie"}
    for task in tasks:
        chosen = [
            {"type": "choices", "from_name": name, "value": {"choices": [said[value]]}}
            for name, value in right(task["data"]).items()
        ]
        task["annotations"] = [{"completed_by": 7, "lead_time": 9.5, "result": chosen}]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks[:7]))
    assert merge(folder, [path])["judgements"] == 21
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"has no column Input.study.*table of results that Mechanical Turk"):
        merge(folder, [tmp_path / "other.csv"])


# ------------------------------------------------------------------------------------- report


def test_agreement_and_tests():
    rng = np.random.default_rng(1)
    one = rng.integers(0, 3, 200)
    two = np.where(rng.random(200) < 0.6, one, rng.integers(0, 3, 200))
    units = [[int(a)] if n < 20 else [int(a), int(b)] for n, (a, b) in enumerate(zip(one, two))]
    assert krippendorff_alpha(units) == pytest.approx(0.591856, abs=5e-7)
    assert raw_agreement(units) == pytest.approx(np.mean(one[20:] == two[20:]))
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1
    assert krippendorff_alpha([["a", "a"]]) is None and krippendorff_alpha([["a"], ["b"]]) is None
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 1024) and sign_test(0, 0) is None
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": None}


def test_a_report_has_rates_tests_and_agreement(tmp_path):
    folder, key = study_in(tmp_path, count=12, judgements=3, per_rater=6)
    places = {
        name: n for n, name in enumerate(sorted(n for n, i in key["items"].items() if i["kind"] == "item"))
    }

    def choose(left, right, item, question):
        if item["kind"] != "item":
            return honest(left, right, item, question)
        number = places[next(n for n, i in key["items"].items() if i is item)]
        wanted = "ours" if number < 8 else "other" if number < 10 else "tie"
        return "tie" if wanted == "tie" else "12"[wanted == right]

    *some, careless, hasty = key["raters"]
    for token in some:
        answer_file(tmp_path / "in", key, token, choose)
    answer_file(tmp_path / "in", key, careless, lambda *_: "1")
    answer_file(tmp_path / "in", key, hasty, choose, seconds=1.0)
    merge(folder, [tmp_path / "in"])
    found = report(folder)
    why = {entry["rater"]: entry["why"] for entry in found["excluded"]}
    assert why.keys() == {careless, hasty} and "controls right" in why[careless] and "1 s" in why[hasty]
    entry = found["questions"]["quality"]
    assert entry["items"] == {"wins": 8, "ties": 2, "losses": 2}
    assert entry["judgements"] == {"wins": 16, "ties": 4, "losses": 4}
    rates = {rule: rate["value"] for rule, rate in entry["win_rate"].items()}
    assert rates == {"without_ties": 0.8, "ties_as_zero": pytest.approx(16 / 24), "ties_as_half": 0.75}
    ci = entry["win_rate"]["without_ties"]["ci"]
    assert ci["low"] < 0.8 < ci["high"] and ci["unit"] == "items"
    assert entry["p"] == pytest.approx(sign_test(8, 2)) and entry["p_holm"] == pytest.approx(3 * entry["p"])
    assert entry["alpha"] == 1 == entry["raw_agreement"]
    assert found["checks"]["controls_right"] == 1 == found["checks"]["repeats_equal"]
    assert found["n_items"] == 12 and found["n_raters"] == 4
    page = (folder / "report.html").read_text()
    assert "ours against other" in page and "66.67" in page and "55.22" in page and careless in page


def test_a_report_wants_answers(study, tmp_path):
    folder, key = study
    with pytest.raises(ConfigError, match="has no judgements.jsonl; merge the answers first"):
        report(folder)
    for token in key["raters"]:
        answer_file(tmp_path / "in", key, token, honest, seconds=0.5)
    merge(folder, [tmp_path / "in"])
    with pytest.raises(DataError, match="no judgement is left of 28; 4 raters were left out"):
        report(folder)
