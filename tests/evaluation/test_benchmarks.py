"""Benchmarks of others: from their prompts to their layout, their judge's requests, and their scores."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.records import parse_record
from minigpt5_jax.evaluation.benchmarks import dpg_bench, isg_bench, mmie, opening
from minigpt5_jax.evaluation.benchmarks.contract import NAMES, find
from minigpt5_jax.evaluation.benchmarks.judge import Judge, Request
from minigpt5_jax.evaluation.benchmarks.run import Task, run


def picture(path: Path, shade: int, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, 60, 90)).save(path)
    return path


def lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(folder: Path, prompts: Path, parts) -> Path:
    """Answers to all prompts; ``parts(number, id)`` gives texts and, as numbers, shades of images."""
    rows = []
    for number, line in enumerate(prompts.read_text().splitlines()):
        record = parse_record(line, str(prompts))  # what `generate chat` reads
        turns = json.loads(line)["turns"]
        for place, part in enumerate(parts(number, record.id)):
            name = f"{number}_{place}.png"
            if isinstance(part, int):
                picture(folder / name, part)
            made = (
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "path": name}
            )
            turns.append({"role": "assistant", "content": [made]})
        rows.append({"id": record.id, "turns": turns})
    lines(folder / "conversations.jsonl", rows)
    return folder


def reply(request: str, said: str) -> str:
    name = json.loads(request)["custom_id"]
    message = {"choices": [{"message": {"role": "assistant", "content": said}}]}
    return json.dumps({"custom_id": name, "response": {"status_code": 200, "body": message}, "error": None})


class Bench:
    """The steps of a benchmark in a folder."""

    def __init__(self, folder: Path, name: str, file: Path, parts):
        self.folder, self.given = folder, {"name": name, "file": str(file)}
        prompts = folder / "prompts.jsonl"
        self.made = run("prompts", Task(**self.given, output=str(prompts)))
        self.given["predictions"] = str(answer(folder / "answers", prompts, parts))

    def __call__(self, step: str, **more):
        return run(step, Task(**{**self.given, "output": str(self.folder / step), **more}))


def test_geneval(tmp_path):
    rows = [{"tag": tag, "include": [], "prompt": f"a photo of {tag}"} for tag in ("cow", "two cows")]
    bench = Bench(tmp_path, "geneval", lines(tmp_path / "meta.jsonl", rows), lambda n, _: ["here", 20 * n])
    assert bench.made["items"] == 8
    assert bench("layout")["items"] == 8
    made = tmp_path / "layout"
    assert json.loads((made / "00001/metadata.jsonl").read_text()) == rows[1]
    shades = [np.asarray(Image.open(made / f"00001/samples/0000{k}.png"))[0, 0, 0] for k in range(4)]
    assert shades == [80, 100, 120, 140]
    results = [
        {"tag": row["tag"], "correct": k < right, "metadata": json.dumps(row)}
        for row, right in zip(rows, (4, 1))
        for k in range(4)
    ]
    found = bench("score", answers=[str(lines(tmp_path / "results.jsonl", results))])
    assert found == {"overall": 0.625, "cow": 1.0, "two cows": 0.25, "images": 0.625, "prompts": 1.0}
    with pytest.raises(DataError, match=r"judged by its own program; give the results.jsonl"):
        bench("score")
    with pytest.raises(DataError, match="has 7 images, the benchmark 8; run its program on all"):
        bench("score", answers=[str(lines(tmp_path / "results.jsonl", results[1:]))])
    with pytest.raises(ConfigError, match="geneval is judged by its own program"):
        bench("requests", judge="m")


@pytest.fixture
def dpg(tmp_path):
    table = tmp_path / "dpg_bench.csv"
    questions = [
        ("entity - whole (cow)", "0"),
        ("attribute - color (cow, red)", "1"),
        ("relation (cow, hill)", "2"),
    ]
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(dpg_bench.COLUMNS)
        writer.writerow(["none", "left out, as in its program", 1, "0", "x", "x?"])
        for name in ("a1", "b2"):
            for number, (what, parents) in enumerate(questions, 1):
                writer.writerow([name, f"{name}: a red cow", number, parents, what, f"Is it {what}?"])
    return Bench(tmp_path, "dpg_bench", table, lambda n, _: [10 + 20 * n])


def test_dpg_bench(dpg, tmp_path):
    dpg("layout")
    grid = np.asarray(Image.open(tmp_path / "layout/b2.png"))
    assert grid.shape == (16, 16, 3) and [grid[y, x, 0] for y in (0, 8) for x in (0, 8)] == [
        90,
        110,
        130,
        150,
    ]
    asked = tmp_path / "requests.jsonl"
    assert dpg("requests", judge="m", output=str(asked))["requests"] == 24
    requests = asked.read_text().splitlines()
    body = json.loads(requests[0])["body"]
    [image, text] = body["messages"][1]["content"]
    assert body["model"] == "m" and text["text"] == "Is it entity - whole (cow)?"
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (8, 8)

    # The colour of every image of a1 is wrong, so what depends on it counts as wrong too.
    said = ["no" if n < 12 and n % 3 == 1 else "Yes." for n in range(24)]
    replies = tmp_path / "replies.jsonl"
    replies.write_text("\n".join(map(reply, requests[:20], said)))
    with pytest.raises(DataError, match="4 of 24 requests have no reply of m, b2_2 3 for one; write those"):
        dpg("score", judge="m", answers=[str(replies)])
    left = dpg("requests", judge="m", output=str(asked))
    assert (left["requests"], left["answered"]) == (4, 20), "the remedy: what was answered is kept"
    (tmp_path / "more.jsonl").write_text("\n".join(map(reply, asked.read_text().splitlines(), said[20:])))
    found = dpg("score", judge="m", answers=[str(tmp_path / "more.jsonl")])
    assert found == {
        "dpg_bench": pytest.approx(100 * (1 / 3 + 1) / 2),
        "entity": 100,
        "attribute": 50,
        "relation": 100,
    }
    assert dpg("score", judge="m") == found, "from the cache alone"
    assert dpg("requests", judge="another", output=str(asked))["requests"] == 24, "whose replies are others"
    picture(Path(dpg.given["predictions"]) / "0_0.png", 255)
    assert dpg("requests", judge="m", output=str(asked))["requests"] == 3, "of the image that changed"


def test_what_is_no_reply_is_refused(dpg, tmp_path):
    dpg("requests", judge="m", output=str(tmp_path / "r.jsonl"))
    [first, *_] = (tmp_path / "r.jsonl").read_text().splitlines()
    file = tmp_path / "replies.jsonl"
    for text, said in (
        (reply(first, "yes")[:-20], "is no reply of a judge .*give lines with custom_id and response"),
        (
            reply(first, "yes").replace("200", "500"),
            r"the call \w+... failed; run it again, or delete the line",
        ),
        (reply(first, None), r"the call \w+... has no text as its reply; run it again, or delete the line"),
        (json.dumps({"custom_id": "a", "response": "text"}), "is no reply of a judge .*AttributeError"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            dpg("score", judge="m", answers=[str(file)])
    with pytest.raises(ConfigError, match="give the model that judges, --judge MODEL"):
        dpg("score", answers=[str(file)])


def test_questions_below_a_no_count_as_no():
    assert dpg_bench.item_score({1: False, 2: True, 3: True}, {1: [0], 2: [1], 3: [2]}) == 0
    assert dpg_bench.item_score({1: True, 2: False, 3: True}, {1: [0], 2: [1], 3: [1, 2]}) == pytest.approx(
        1 / 3
    )


def test_opening(tmp_path):
    picture(tmp_path / "images/a.png", 5)
    asked = [
        {"text": "<BEGIN> A fox wakes. <image>", "image": "images/a.png"},
        {"text": "Go on.", "image": None},
    ]
    rows = [{"total_uid": "0301096", "conversations": [{"input": asked}, {"output": []}]}]
    data = lines(tmp_path / "dev_data.jsonl", rows)
    bench = Bench(tmp_path, "opening", data, lambda *_: ["It runs.", 40, 80, "It sleeps."])
    assert bench.made["images"] == 1
    bench("layout")
    made = json.loads((tmp_path / "layout/0301096.json").read_text())
    output = [("It runs.", "0301096-o-0.jpg"), ("", "0301096-o-1.jpg"), ("It sleeps.", None)]
    assert [(s["text"], s["image"]) for s in made["conversations"][1]["output"]] == output
    assert Image.open(tmp_path / "layout/0301096-o-1.jpg").format == "JPEG"
    (tmp_path / "system.txt").write_text("You are a judge.")
    given = {"judge": "m", "instructions": str(tmp_path / "system.txt")}
    bench("requests", output=str(tmp_path / "r.jsonl"), **given)
    [request] = (tmp_path / "r.jsonl").read_text().splitlines()
    system, user = json.loads(request)["body"]["messages"]
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert system["content"] == "You are a judge."
    assert texts == [
        "INPUT: A fox wakes. <IMG_0></IMG_0>",
        "Go on.",
        "\nOUTPUT: It runs. <IMG_1></IMG_1>",
        " <IMG_2></IMG_2>",
        "It sleeps.",
        opening.ENDING,
    ]
    scores = {name: {"Score": n, "Justification": ""} for n, name in enumerate(opening.CRITERIA)}
    (tmp_path / "a.jsonl").write_text(reply(request, f"```json\n{json.dumps({'scores': scores})}\n```"))
    found = bench("score", answers=[str(tmp_path / "a.jsonl")], **given)
    assert found["overall"] == 3 and found["Content Richness"] == 6
    with pytest.raises(DataError, match="does not have the seven scores .*ask again"):
        opening.criteria('{"scores": {}}', "0301096")
    with pytest.raises(ConfigError, match="--judge MODEL and --instructions FILE"):
        bench("requests", judge="m")
    battles = [
        {"model_A": {"name": a}, "model_B": {"name": b}, "winner": winner}
        for a, b, winner in (("x", "y", "A"), ("y", "x", "A"), ("x", "y", "Tie(A)"), ("x", "y", "A"))
    ]
    (tmp_path / "battles.json").write_text(json.dumps(battles))
    rates = bench("score", answers=[str(tmp_path / "battles.json")])
    assert {rule: rates[f"x {rule}"] for rule in ("forced", "no_tie", "tie_0", "tie_half")} == {
        "forced": 0.75,
        "no_tie": pytest.approx(2 / 3),
        "tie_0": 0.5,
        "tie_half": 0.625,
    }


def test_isg_bench(tmp_path):
    picture(tmp_path / "images/q.png", 5)
    block = {"text": {"type": "text", "content": "t"}, "image": {"type": "image", "content": "images/q.png"}}
    golden = [block["text"], block["image"], block["image"]]
    rows = [{"id": f"000{n}", "Category": "HowTo", "Query": golden[:2], "Golden": golden} for n in range(2)]
    data = lines(tmp_path / "ISG-Bench.jsonl", rows)
    bench = Bench(tmp_path, "isg_bench", data, lambda n, _: ["text", 10, 20] if n else [10, "text"])
    bench("layout")
    made = [json.loads(line) for line in (tmp_path / "layout/output.jsonl").read_text().splitlines()]
    assert [part["type"] for part in made[1]["output"]] == ["text", "image", "image"]
    assert Path(made[1]["output"][1]["content"]).is_file() and made[0]["Golden"] == golden
    assert bench("score") == {"structure": 0.5}
    result = {
        "structure": True,
        "block": [{"VQA_judge_Score": {"Judge": 8}}, {"VQA_judge_Score": {"Judge": 6}}, {}],
        "image": [{"judge": {"Judge": "Yes"}}, {"id": 1}],
        "holistic": {"overall_score": 7},
    }
    judged = lines(tmp_path / "judged.jsonl", [{**made[1], "result": result}, {**made[0], "result": {}}])
    assert bench("score", answers=[str(judged)]) == {
        "structure": 0.5,
        "block": 4,
        "image": 0.25,
        "holistic": 4,
    }
    assert isg_bench.levels({"id": "x"}) == {"structure": 0, "block": 1, "image": 0, "holistic": 1}


def test_mmie(tmp_path):
    picture(tmp_path / "images/q.png", 5)
    asked = [{"text": "What next?", "image": "images/q.png"}]
    rows = [
        {"id": "SA-1", "question": asked},
        {"id": "MSR-2", "question": asked, "gt_answer": [{"text": "4", "image": None}]},
    ]
    (tmp_path / "mmie.json").write_text(json.dumps(rows))
    bench = Bench(tmp_path, "mmie", tmp_path / "mmie.json", lambda *_: ["So.", 10, "Then.", 20, 30, 40])
    bench("layout")
    made = json.loads((tmp_path / "layout/data.json").read_text())
    assert [part["text"] for part in made[0]["answer"]] == ["So.", "Then.", None, None]
    assert all((tmp_path / "layout" / part["image"]).is_file() for part in made[1]["answer"])
    assert made[0]["gt_answer"] == [{"text": None, "image": None}] and made[1]["gt_answer"][0]["text"] == "4"
    (tmp_path / "i.json").write_text(json.dumps(dict.fromkeys(mmie.TASKS, "Judge.")))
    given = {"judge": "m", "instructions": str(tmp_path / "i.json")}
    bench("requests", output=str(tmp_path / "r.jsonl"), **given)
    requests = (tmp_path / "r.jsonl").read_text().splitlines()
    content = json.loads(requests[1])["body"]["messages"][0]["content"]
    assert (
        len(content) == 4
        and "should be: 4" in content[-1]["text"]
        and "Image-2: <image>" in content[-1]["text"]
    )
    said = ["### Feedback\ngood\n### Score\n5.6", "### Score: 9"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(reply, requests, said)))
    assert bench("score", answers=[str(tmp_path / "a.jsonl")], **given) == {"average": 6, "SA": 6, "n": 1}
    results = [
        {"id": "SA-1", "gpt_feedback": "### Score\n4"},
        {"id": "MSR-2", "gpt_feedback": "### Score\n1"},
    ]
    (tmp_path / "eval_result.json").write_text(json.dumps(results))
    found = bench("score", answers=[str(tmp_path / "eval_result.json")])
    assert found == {"average": 2.5, "SA": 4, "MSR": 1, "n": 2}
    with pytest.raises(ConfigError, match="is a JSON object with the keys SA, PBL, MSR"):
        bench("requests", judge="m", instructions=str(tmp_path / "i.json").replace("i.json", "mmie.json"))


def test_comm(tmp_path):
    steps = []
    for n in range(4):
        picture(tmp_path / f"{n}.jpg", 10 * n)
        text = {"type": "text", "content": f"Step {n} of the tea."}
        steps.append([text, {"type": "image", "content": f"{n}.jpg"}])
    data = tmp_path / "comm.json"
    data.write_text(json.dumps([{"data_id": "d1", "title": "tea", "step_info": steps}]))
    third = Bench(tmp_path / "3", "comm_task3", data, lambda *_: ["(3) Pour.", 50, "(4) Drink.", 60])
    third("layout")
    made = tmp_path / "3/layout/d1_task3"
    result = json.loads((made / "results.json").read_text())
    assert result["model_input"].startswith(
        "Here are step-by-step instructions with images about tea: (1) Step 0 of the tea. <IMAGE> (2) Step 1"
    )
    assert result["model_output"] == "(3) Pour. <IMAGE> (4) Drink. <IMAGE>"
    assert result["input_image_list"] == ["input_1.jpg", "input_2.jpg"]
    assert result["output_gt_image_list"] == ["output_gt_3.jpg", "output_gt_4.jpg"]
    assert result["prediction_image_list"] == ["predict_3.jpg", "predict_4.jpg"]
    assert (made / "origin/output_gt_4.jpg").is_file() and (made / "predict_4.jpg").is_file()
    judged = {
        "Completeness": {"Score": 8},
        "coherence_score": {"style_consistency": 6, "entity_consistency": "NA"},
    }
    (tmp_path / "out/d1_task3").mkdir(parents=True)
    (tmp_path / "out/d1_task3/evaluation_results.json").write_text(json.dumps(judged))
    found = third("score", answers=[str(tmp_path / "out")])
    assert found == {"Completeness": 8, "style_consistency": 6, "entity_consistency": 0}
    with pytest.raises(DataError, match="task 3 of CoMM is judged by its own program"):
        third("score")
    said = "(1) Step 0 of the tea. (2) Step 1 of the tea. (3) Step 2 of the tea. (4) no"
    first = Bench(tmp_path / "1", "comm_task1", data, lambda *_: [said])
    scored = first("score")
    assert scored["cider_d_steps"] > 5 and scored.keys() == {"cider_d_steps", "cider_d_texts"}
    with pytest.raises(DataError, match=r"no answer has steps, \(1\)"):
        Bench(tmp_path / "1b", "comm_task1", data, lambda *_: ["nothing"])("score")


def test_every_benchmark_is_found_and_others_are_named(tmp_path):
    assert all(find(name).read for name in NAMES)
    with pytest.raises(ConfigError, match="--benchmark=None is none of geneval, dpg_bench"):
        find(None)
    with pytest.raises(ConfigError, match="own file of prompts: --references FILE"):
        run("prompts", Task("geneval", None, "out"))
    file = lines(tmp_path / "other.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match="record 0 has no tag; is it the benchmark's file"):
        run("prompts", Task("geneval", str(file), str(tmp_path / "p")))
    file = lines(tmp_path / "meta.jsonl", [{"tag": "a", "prompt": "x"}])
    with pytest.raises(ConfigError, match="give the answers to the benchmark's prompts: --predictions DIR"):
        run("layout", Task("geneval", str(file), str(tmp_path / "p")))
    lines(
        tmp_path / "few/conversations.jsonl", [{"id": "00000_0", "turns": [{"role": "user", "content": "x"}]}]
    )
    with pytest.raises(
        DataError, match="3 of 4 prompts have no answer in .*, 00000_1 for one; generate from all"
    ):
        run("layout", Task("geneval", str(file), str(tmp_path / "p"), str(tmp_path / "few")))


def test_answers_are_of_one_kind(dpg, tmp_path):
    dpg("requests", judge="m", output=str(tmp_path / "r.jsonl"))
    replies, own, empty = (str(tmp_path / name) for name in ("a.jsonl", "results.txt", "empty.jsonl"))
    Path(replies).write_text(
        "\n".join(reply(line, "yes") for line in (tmp_path / "r.jsonl").read_text().splitlines())
    )
    Path(own).write_text("DPG-Bench score: 80")
    Path(empty).write_text("\n")
    for answers, said in (
        ([replies, own], "or one file or folder that the program of dpg_bench wrote, got .*of one kind"),
        ([own, own], "give those of one kind"),
        ([own], "results.txt has no replies of a judge; .*give the replies of a --judge"),
        ([empty], "empty.jsonl is empty; give the file that the judge's replies were written to"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            dpg("score", judge="m", answers=answers)
    assert dpg("score", judge="m", answers=[replies])["dpg_bench"] == 100, "the remedy"


def damaged(name: str, **change) -> list[dict]:
    """A record of a benchmark with one image, some keys of it changed."""
    part = {"type": "image", "content": "images/q.png"}
    step = {"text": "x", "image": "images/q.png"}
    row = {
        "isg_bench": {"id": "1", "Category": "x", "Query": [part], "Golden": [part]},
        "mmie": {"id": "SA-1", "question": [step]},
        "opening": {"total_uid": "1", "conversations": [{"input": [step]}]},
        "comm_task1": {"data_id": "1", "title": "x", "step_info": [[part]]},
    }[name]
    return [row | change]


@pytest.mark.parametrize("name", ["isg_bench", "mmie", "opening", "comm_task1"])
def test_files_of_prompts_are_not_trusted(name, tmp_path):
    file = tmp_path / "given/prompts.json"
    task = Task(name, str(file), str(tmp_path / "p.jsonl"))

    def prompts(rows, **more):
        file.parent.mkdir(exist_ok=True)
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return run("prompts", dataclasses.replace(task, **more))

    rows = damaged(name)
    assert prompts(rows)["images"] == 1
    [key, *_] = rows[0]
    for path in ("../../x.png", "/etc/x.png"):
        outside = json.dumps(rows).replace("images/q.png", path)
        with pytest.raises(DataError, match="leads out of .*or allow it: --allow_outside_images"):
            prompts(outside)
        assert prompts(outside, allow_outside_images=True)["images"] == 1, "the remedy"
    for bad in ("../a", "a/b", "a\\b"):
        with pytest.raises(DataError, match="prompts.json: id .* is no text without / and"):
            prompts(damaged(name, **{key: bad}))
    last = list(rows[0])[-1]
    for bad in [{key: 7}, *({last: value} for value in (None, ["x"], [["x"]], [{}], [[{}]]))]:
        with pytest.raises(
            DataError, match=f"prompts.json is not a file of prompts of {name}; get the bench"
        ):
            prompts(damaged(name, **bad))
    with pytest.raises(DataError, match="prompts.json is cut off or no JSON; get the file again"):
        prompts(json.dumps(rows)[:-5])


def test_files_of_programs_and_instructions_are_not_trusted(dpg, tmp_path):
    table = Path(dpg.given["file"])
    text = table.read_text()
    table.write_text(text.replace("b2,b2: a red cow,2", "b2,b2: a red cow,two"))
    with pytest.raises(DataError, match=r"dpg_bench.csv is not a file of prompts of dpg_bench; .*'two'"):
        dpg("layout")
    table.write_text(text)
    for name, said in (("i.json", "i.json is cut off or no JSON"), ("i.txt", "i.txt is no text in UTF-8")):
        (tmp_path / name).write_bytes(b'{"\xff')
        with pytest.raises(DataError, match=said):
            dpg("requests", judge="m", instructions=str(tmp_path / name))
    rows = [{"tag": "cow", "prompt": "a cow"}]
    bench = Bench(tmp_path / "g", "geneval", lines(tmp_path / "meta.jsonl", rows), lambda n, _: [10])
    results = lines(tmp_path / "results.jsonl", [{"tag": "cow", "correct": "?", "metadata": "x"}] * 4)
    with pytest.raises(DataError, match="results.jsonl is not what the program of geneval writes; run it ag"):
        bench("score", answers=[str(results)])


def test_a_reply_without_a_text_is_asked_again(tmp_path):
    cache, request = tmp_path / "cache", Request(("a",))
    name = Judge("m", cache).name(request)
    cache.write_text(json.dumps({"custom_id": name, "content": None}) + "\n")
    judge = Judge("m", cache)
    assert judge.reply(request) is None and judge.write([request], tmp_path / "r.jsonl") == (1, 0)
    said = "one\u2028two\x85three"  # what splits lines of text, and not of JSON
    (tmp_path / "a.jsonl").write_text(json.dumps({"custom_id": name, "content": said}))
    assert judge.learn([tmp_path / "a.jsonl"]) == 1 and Judge("m", cache).reply(request) == said


def test_a_request_is_known_by_what_it_says(tmp_path):
    judge = Judge("m", tmp_path / "cache")
    names = {judge.name(Request(parts, system)) for parts in (("a",), ("b",)) for system in ("", "s")}
    assert len(names) == 4 and judge.name(Request(("a",))) in names
