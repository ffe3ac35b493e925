"""The evaluate command on a run of the small world: answers, scores, going on after a stop, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jsonschema
import numpy as np
import pytest

import commands
import human_study
import tiny
from minigpt5_jax import evaluate
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.evaluation.suite import evaluate as suite
from minigpt5_jax.evaluation.suite import predict, references
from minigpt5_jax.evaluation.suite.evaluate import Request
from minigpt5_jax.evaluation.suite.samples import read_references
from minigpt5_jax.inference.session import Generation, Prompt
from minigpt5_jax.wiring.restore import OpenedRun, open_run

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "minigpt5_jax/evaluation/suite/results.schema.json").read_text())
QUICK = {"force_image": "first", "max_new_tokens": "3", "num_inference_steps": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of stage 1 in the small world, saved before its first step; it cannot see."""
    config = tiny.shapes_stage1()
    config.data.shapes_validation = 3
    return tiny.save_run(config, tmp_path_factory.mktemp("run"))


def command(capsys, *, allow_skips=False, **values):
    """(exit status, the JSON line, what was told) of the command."""
    status = evaluate.command(Request(**values), allow_skips)
    said = capsys.readouterr()
    return status, json.loads(said.out.splitlines()[-1]), said.err


class Answering:
    """A session that draws white squares and notes what it was asked."""

    asked: ClassVar[list[str]] = []

    def generate(self, prompts):
        Answering.asked += [prompt.source for prompt in prompts]
        white = np.full((64, 64, 3), 255, np.uint8)
        return [Generation(("ok", white, "then"), "ok then", (), p.source, p.seed) for p in prompts]


def test_a_run_is_evaluated_and_goes_on_where_it_was(checkpoint, tmp_path, capsys, monkeypatch):
    given = {"checkpoint": str(checkpoint), "output": str(tmp_path / "eval"), "inference": QUICK}
    status, line, told = command(capsys, count=1, **given)
    assert status == 0 and line.keys() == {"metrics", "skipped", "n"} and line["n"] == 1
    assert line["metrics"]["image_recall"] == 1 and "oracle_all" in line["metrics"]
    assert "no weights" in line["skipped"]["fid"] and "clip_i" in line["skipped"]
    assert "predictions: 1 of 1, 0:00 left" in told and "fid skipped: no weights" in told
    results = json.loads((tmp_path / "eval/results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert results["run"]["step"] == 7 and results["protocol"]["switches"]["inception_resize"] == "clean"

    file = tmp_path / "eval/predictions/conversations.jsonl"
    before = file.read_text()
    file.write_text(before + '{"id": "cc3m_1", "tu')  # stopped while it wrote
    monkeypatch.setattr(OpenedRun, "session", lambda *_, **__: Answering())
    status, line, told = command(capsys, count=2, **given)
    assert "predictions: 1 of 2 are there from before" in told and line["n"] == 2
    assert len(Answering.asked) == 1 and file.read_text().startswith(before)
    answer = json.loads(file.read_text().splitlines()[1])
    assert answer["id"] == "cc3m_1" and [turn["role"] for turn in answer["turns"][1:]] == ["assistant"] * 2
    assert command(capsys, count=1, **given)[1]["n"] == 1 and len(Answering.asked) == 1
    status, line, _ = command(capsys, count=2, metrics=["fid", "image_exact"], **given)
    assert status == 1 and line["skipped"].keys() == {"fid"}
    assert command(capsys, count=2, metrics=["fid"], allow_skips=True, **given)[0] == 0
    with pytest.raises(
        ConfigError, match=r"made otherwise: seed \(was 0, is 1\).*; choose another --output, or"
    ):
        command(capsys, count=2, seed=1, **given)
    with pytest.raises(
        DataError, match="--count=9, but the run's validation data have 3 usable samples; lower"
    ):
        command(capsys, count=9, **given)

    # The run was trained again in its folder, or its data were edited: answers of before are not scored.
    made = tmp_path / "eval/predictions/made.json"
    assert set(json.loads(made.read_text())["prompts"]) == {"cc3m_0", "cc3m_1"}
    description = checkpoint / "checkpoints/00000007/meta/metadata"
    kept = description.read_text()
    other = json.loads(kept)
    other["checksums"]["trainable"] = dict.fromkeys(other["checksums"]["trainable"], "other weights")
    description.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"made otherwise: step_hash \(was '.*choose another --output"):
        command(capsys, count=2, **given)
    description.write_text(kept)
    collected = references.questions

    def edited(*values):
        asked = collected(*values)
        asked.prompts["cc3m_0"] = dataclasses.replace(asked.prompts["cc3m_0"], source="another text")
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(suite, "questions", edited)
        with pytest.raises(
            ConfigError, match="otherwise: texts or images of the prompts cc3m_0: the data were"
        ):
            command(capsys, count=2, **given)

    # What was written is a file of references for any predictions.
    other = {
        "predictions": str(tmp_path / "eval/predictions"),
        "references": str(tmp_path / "eval/references.jsonl"),
    }
    again = command(capsys, output=str(tmp_path / "again"), metrics=["oracle_all"], **other)
    assert again[0] == 0 and again[1]["n"] == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("command"), "minigpt5_jax.evaluate")


def test_the_command_line(run, tmp_path):
    """Flags become a request; what is wrong is one line and status 1."""
    given = ["--predictions", tmp_path, "--references", "none.jsonl", "--switch", "rouge=rouge"]
    done = run(*given, "--metrics", "fid,fidd", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: unknown metric fidd; known: clip_i")
    (tmp_path / "meta.jsonl").write_text('{"tag": "counting", "prompt": "two cows"}')
    given = ["--benchmark=geneval", "--references", tmp_path / "meta.jsonl", "--output", tmp_path / "p.jsonl"]
    done = run("benchmark", "prompts", *given)
    assert json.loads(done.stdout)["items"] == 4 and done.returncode == 0


def test_a_study_with_people_from_the_command_line(run, tmp_path):
    given = human_study.materials(tmp_path, 4)
    study = tmp_path / "study"
    systems = [f"--system={name}={folder}" for name, folder in given["systems"].items()]
    make = ["human", "make", "--references", given["references"], *systems]
    done = run(*make, "--output", study, "--judgements=1")
    assert done.returncode == 0 and json.loads(done.stdout)["raters"] == 1, done.stderr
    key = json.loads((study / "key.json").read_text())
    assert key["seed"] != 0, "a default would be known to raters"
    [token] = key["raters"]
    answers = human_study.answer_file(tmp_path / "in", key, token, human_study.honest)
    assert json.loads(run("human", "merge", "--study", study, "--answers", answers).stdout)["missing"] == 0
    done = run("human", "report", "--study", study)
    assert json.loads(done.stdout) == {
        "win_rate": {"continuity": 1.0, "quality": 1.0, "coherence": 1.0},
        "n_items": 4,
        "n_raters": 1,
    }
    done = run("human", "meke")
    assert done.returncode == 1 and "usage: python -m minigpt5_jax.evaluate [human {make|merge" in done.stderr


@pytest.mark.parametrize(
    "task, count, ids, sources",
    [
        ("stories", 6, ["_1", "_3", "_5", "_7", "_9", "_1"], ["gen", 0]),
        ("last_step", 2, ["_1", "_1"], ["gen", 4]),
        ("narration", 5, ["_1", "_3", "_5", "_7", "_1"], ["understanding", 2]),
    ],
)
def test_stories_are_asked_as_the_papers_do(checkpoint, tmp_path, task, count, ids, sources):
    data = {"format": "shapes_stories", "max_length": "400", "shapes_validation": "2"}
    run = references.with_data(open_run(checkpoint), data, tmp_path)
    asked = references.questions(run, references.task_of(run.config, task), "image+text", count, 0)
    assert [name[name.rindex("_") :] for name in asked.prompts] == ids
    first = next(iter(asked.prompts.values()))
    assert len(first.images) == sources[1]
    path = references.write_references(asked.records, tmp_path)
    found = read_references(path)
    assert [r.id for r in found] == list(asked.prompts)
    wanted = [r.text for r in found] if task == "narration" else [r.image for r in found]
    assert all(wanted) and (task == "narration" or all(r.caption for r in found))


def test_contexts_of_the_last_step_and_dialogues(checkpoint, tmp_path):
    opened = open_run(checkpoint)
    run = references.with_data(opened, {"format": "shapes_stories", "shapes_validation": "2"}, tmp_path)
    images = {}
    for context in ("none", "text", "image", "image+text"):
        [prompt] = references.questions(run, "last_step", context, 1, 0).prompts.values()
        images[context] = len(prompt.images), len(prompt.source)
    assert [images[c][0] for c in images] == [0, 0, 4, 4] and images["text"][1] > images["none"][1]
    run = references.with_data(opened, {"format": "shapes_dialogs", "shapes_validation": "2"}, tmp_path)
    asked = references.questions(run, references.task_of(run.config, None), "image+text", 4, 0)
    names = list(asked.prompts)
    assert names[0].endswith("_1") and names[1] == names[0][:-1] + "2", "every turn but the first"
    with pytest.raises(ConfigError, match="--context=all is none of none, text"):
        references.questions(run, "last_step", "all", 1, 0)


def test_data_that_do_not_fit_are_refused(checkpoint, tmp_path):
    run = open_run(checkpoint)
    with pytest.raises(
        ConfigError, match="task=narration is not for data.format=shapes, whose task is pairs"
    ):
        references.task_of(run.config, "narration")
    with pytest.raises(ConfigError, match="unknown key data.fromat; known:"):
        references.with_data(run, {"fromat": "vist"}, tmp_path)
    with pytest.raises(ConfigError, match="data.max_length='long' must be of type int"):
        references.with_data(run, {"max_length": "long"}, tmp_path)
    jsonl = references.with_data(run, {"format": "jsonl", "train": "a.jsonl", "validation": ""}, tmp_path)
    with pytest.raises(ConfigError, match=r"no validation data \(data.validation\); give --predictions"):
        references.questions(jsonl, "dialogs", "image+text", 1, 0)


def test_prompts_are_told_apart_by_text_and_images(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    seen = {predict._prompt_hash(Prompt(text, (image,), 0)) for text in ("a", "b")}
    image.write_bytes(b"other image")
    seen |= {predict._prompt_hash(Prompt("a", images, 0)) for images in ((image,), (b"one", b"one"), (b"x",))}
    assert len(seen) == 5
    assert predict._prompt_hash(Prompt("a", (str(image),), 0)) in seen, "not by the image's name"


def test_samples_of_one_name_are_refused():
    example = Example("", "", (), None, None, "dialog", "walk_1", "a.jsonl:1")
    pair = references.Asked("walk_1", example, [], [], pair=True)
    turn = references.Asked("walk", example, [{"role": "user", "content": "hi"}], [])
    found = references._Collector(None, 0)
    assert found.take(pair)
    with pytest.raises(DataError, match="two samples .* are called walk_1 .*another id"):
        found.take(turn)
    with pytest.raises(DataError, match="are called walk_1"):
        found.take(dataclasses.replace(turn, group="walk_1"))
