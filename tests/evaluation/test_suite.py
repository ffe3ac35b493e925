"""The evaluation from files to files, with networks that cost nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import prepare_image
from minigpt5_jax.evaluation.metrics.networks import ClipTexts, SetFeatures
from minigpt5_jax.evaluation.metrics.relevance import Slot, mm_relevance_m5, mm_relevance_official
from minigpt5_jax.evaluation.metrics.statistics import Moments, frechet_distance_of_few
from minigpt5_jax.evaluation.metrics.text import bleu, cleaned, rouge
from minigpt5_jax.evaluation.suite import features as features_file
from minigpt5_jax.evaluation.suite import protocols, scores
from minigpt5_jax.evaluation.suite.evaluate import Request, check, evaluate, summary
from minigpt5_jax.evaluation.suite.features import Cache, Features, Skipped
from minigpt5_jax.evaluation.suite.paper import KEYS, OTHERS, OURS, beside
from minigpt5_jax.evaluation.suite.progress import Progress, duration
from minigpt5_jax.evaluation.suite.protocols import metrics_of, switches_of
from minigpt5_jax.evaluation.suite.resampling import compare, interval
from minigpt5_jax.evaluation.suite.results import against
from minigpt5_jax.evaluation.suite.samples import read_predictions, read_references
from minigpt5_jax.training.owner import Owner
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.weights.errors import WeightFileError

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "minigpt5_jax/evaluation/suite/results.schema.json").read_text())


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def of_image(image, width=6):
    small = np.asarray(image.resize((4, 4)), np.float32).ravel() / 255
    return small @ np.random.default_rng(0).normal(size=(48, width))


def of_text(text, width=6):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=width) + 1


class FakeInception:
    calls = 0

    def __init__(self, path, resize):
        pass

    def __call__(self, images):
        FakeInception.calls += len(images)
        rows = np.stack([of_image(Image.fromarray(image), 3056) for image in images]).astype(np.float32)
        return SetFeatures(rows[:, :2048], rows[:, 2048:])


class FakeClip:
    def __init__(self, path, *, clean_up, hidden_act):
        self.clean_up = clean_up

    def tokens(self, texts):
        return None, None, np.array([len(text.split()) > 75 for text in texts])

    def texts(self, texts):
        return ClipTexts(unit(np.stack([of_text(text) for text in texts])), self.tokens(texts)[2])

    def images(self, images):
        return unit(np.stack([of_image(image) for image in images]))


class FakeSentences:
    def __init__(self, path):
        pass

    def __call__(self, texts):
        return unit(np.stack([of_text(text) for text in texts]))


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """Files that stand for weights, and networks that do not read them."""
    monkeypatch.setattr(features_file, "InceptionNetwork", FakeInception)
    monkeypatch.setattr(features_file, "ClipNetwork", FakeClip)
    monkeypatch.setattr(features_file, "SentenceNetwork", FakeSentences)
    found = {}
    for name in ("inception", "clip_l14", "clip_b32", "clip_l14_336", "sbert"):
        found[name] = str(tmp_path / f"{name}.weights")
        Path(found[name]).write_text(name)
    sha = hashlib.sha256(b"inception").hexdigest()
    monkeypatch.setattr(features_file, "INCEPTION_SHA", sha[:8])
    return found


def picture(path, seed, size=(20, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(name, text="", image=None):
    content = [{"type": "text", "text": text}] if text else []
    content += [{"type": "image", "path": image}] if image else []
    return {"id": name, "turns": [{"role": "assistant", "content": content or ""}]}


@pytest.fixture
def pairs(tmp_path):
    """Four pairs, a prediction for each: one without an image, one grey, one transparent."""
    records, answers = [], []
    for i, mode in enumerate(("RGB", "L", "RGBA", None)):
        picture(tmp_path / f"data/real/{i}.png", i, size=(30, 20))
        records.append({"id": f"p{i}", "caption": f"a fox number {i}", "image": f"real/{i}.png"})
        if mode:
            picture(tmp_path / f"out/images/{i}.png", 10 + i, mode=mode)
        answers.append(answer(f"p{i}", image=f"images/{i}.png" if mode else None))
    write(tmp_path / "out/conversations.jsonl", answers)
    return {
        "references": str(write(tmp_path / "data/references.jsonl", records)),
        "predictions": str(tmp_path / "out"),
        "output": str(tmp_path / "result"),
    }


def entries(found):
    return {entry["name"]: entry for entry in found["metrics"]}


def lines(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


# ------------------------------------------------------------------------------------ protocols


def test_every_metric_has_a_form_and_a_place_in_the_help():
    from minigpt5_jax import evaluate as command

    assert set(protocols.EVERY) == scores.COMPUTE.keys() | set(protocols.ORACLE)
    words = set(command.__doc__.replace(",", " ").replace(";", " ").replace(".", " ").split())
    assert {*protocols.EVERY, *protocols.TASKS} <= words
    assert all(f"``{name}``" in command.__doc__ for name in protocols.PROTOCOLS)


def test_switches_are_those_of_the_protocol_or_named():
    paper, today = switches_of("paper", "stories"), switches_of("standard", "stories")
    assert (paper.inception_resize, paper.bleu_unit, paper.mmrel) == ("tf1", "char", "m5")
    assert (today.inception_resize, today.bleu_unit, today.mmrel) == ("clean", "word", "official")
    assert switches_of("paper", "pairs").fid_target == "stored" and paper.fid_target == "white_square"
    assert switches_of("paper", "pairs", {"kid_subset": "50"}).kid_subset == "50"
    with pytest.raises(ConfigError, match="unknown switch 'colour'; known: inception_weights"):
        switches_of("paper", "pairs", {"colour": "red"})
    with pytest.raises(ConfigError, match="bleu_unit=letters is none of char, word"):
        switches_of("paper", "pairs", {"bleu_unit": "letters"})
    with pytest.raises(ConfigError, match="kid_subset=many must be a whole number"):
        switches_of("paper", "pairs", {"kid_subset": "many"})
    with pytest.raises(ConfigError, match="unknown metric fidd; known: clip_i"):
        metrics_of("paper", "pairs", ["fidd"], False)
    assert metrics_of("standard", "pairs", [], True)[-1] == "oracle_place"


def test_the_papers_rows_are_found_and_documented():
    text = (ROOT / "docs/evaluation.md").read_text()
    for row in (*OURS, *OTHERS):
        values = " ".join(f"{value:g}" for value in row.values.values())
        assert any(
            row.model in line and all(f"{value:g}" in line for value in row.values.values())
            for line in text.splitlines()
            if line.startswith(f"| {row.table} |")
        ), f"Table {row.table}, {row.model}: {values}"
    assert {row.table for row in OURS} == {1, 2, 4, 5, 6, 7, 9}
    assert all(f"--paper_row {key}" in text for key in KEYS if key != "minigpt5")
    assert [row.values for row in beside("minigpt5", "last_step", "text")] == [{"clip_i": 0.64}]
    assert [row.table for row in beside("minigpt5", "last_step", "image+text")] == [6, 9]
    with pytest.raises(ConfigError, match="--paper_row=gill is none of prefix, minigpt5"):
        beside("gill", "pairs", "")


# --------------------------------------------------------------------------------- predictions


def test_other_samples_are_named(pairs, tmp_path):
    write(tmp_path / "out/conversations.jsonl", [answer("p0"), answer("p1"), answer("p2"), answer("x9")])
    with pytest.raises(DataError, match="1 samples of the references have no prediction: p3; 1 .*: x9; give"):
        evaluate(Request(**pairs))
    write(tmp_path / "out/conversations.jsonl", [answer("p0")] * 2)
    with pytest.raises(DataError, match="conversations.jsonl:2: id 'p0' was used already"):
        evaluate(Request(**pairs))
    (tmp_path / "out/conversations.jsonl").unlink()
    with pytest.raises(DataError, match="--predictions is a folder with conversations.jsonl"):
        evaluate(Request(**pairs))


def test_what_does_not_go_together_is_said_first(pairs, tmp_path):
    for changed, message in (
        ({"checkpoint": "runs/a"}, "not both"),
        ({"references": None}, "give a run"),
        ({"count": 3}, "give it with --checkpoint"),
        ({"weights": {"incepton": "f"}}, "unknown weights incepton; known: inception"),
        ({"task": "narration"}, "4 of 4 references have no text, p0 for one; choose another --task"),
        ({"real_images": "a", "real_stats": "b"}, "not both"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(Request(**pairs | changed))
    with pytest.raises(
        FileNotFoundError, match="--weights sbert=nowhere: nothing is there; give the folder of"
    ):
        evaluate(Request(**pairs, weights={"sbert": "nowhere"}))


def test_files_that_cannot_be_used_are_refused_before_anything_is_generated(pairs, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    moments = {}
    for name, width, n in (("narrow", 3, 5), ("one", 2048, 1)):
        moments[name] = str(tmp_path / f"{name}.pt")
        torch.save([torch.zeros(width), torch.zeros(width, width), torch.tensor(n)], moments[name])
    Path(weights["inception"]).write_text("random weights")
    for changed, error, message in (
        ({"against": str(tmp_path)}, ConfigError, "holds no results of an evaluation"),
        ({"real_images": str(tmp_path / "empty")}, FileNotFoundError, "holds no images; give a folder"),
        ({"real_images": "nowhere"}, FileNotFoundError, "nowhere holds no images"),
        ({"real_stats": moments["narrow"]}, WeightFileError, "of width 3, and those of FID have 2048"),
        ({"real_stats": moments["one"]}, WeightFileError, "one.pt: FID needs at least 2 images"),
        ({"real_stats": "nowhere.pt"}, FileNotFoundError, "nowhere.pt"),
        ({"weights": {"inception": weights["inception"]}}, ConfigError, "is not the network of FID"),
        ({"weights": {"wordnet": str(tmp_path / "empty")}}, FileNotFoundError, "is no WordNet"),
    ):
        with pytest.raises(error, match=message):
            check(Request(str(tmp_path / "new"), checkpoint="runs/a", **changed))
    with pytest.raises(Skipped, match="width 3 and of width 2048"):
        scores.distance(np.eye(3), Moments(2, np.zeros(2048), np.zeros((1, 1))))


def test_one_evaluation_at_a_time_has_a_folder(pairs):
    owner = Owner(pairs["output"])
    with pytest.raises(CheckpointError, match="is in use by"):
        evaluate(Request(**pairs))
    owner.release()
    evaluate(Request(**pairs))
    assert not (Path(pairs["output"]) / "owner.lock").exists()


def test_images_outside_of_the_folder_are_read_when_allowed(pairs, tmp_path):
    path = Path(pairs["references"])
    (path.parent / "inner").mkdir()
    path = path.rename(path.parent / "inner/references.jsonl")
    path.write_text(path.read_text().replace("real/", "../real/"))
    given = pairs | {"references": str(path)}
    with pytest.raises(DataError, match="leads out of the image folder .*allow it: --allow_outside_images"):
        evaluate(Request(**given))
    assert evaluate(Request(**given, allow_outside_images=True))["data"]["n_wants_image"] == 4
    answers = [answer(f"p{i}", image="../images/0.png") for i in range(4)]
    given["predictions"] = str(write(tmp_path / "out/inner/conversations.jsonl", answers).parent)
    assert evaluate(Request(**given, allow_outside_images=True))["data"]["n_with_image"] == 4


def test_the_network_of_fid_is_known_in_its_folder(weights, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Path(weights["inception"]).rename(folder / "pt_inception-2015-12-05-6726825d.pth")
    switches = switches_of("paper", "pairs")
    assert Features({"inception": str(folder)}, tmp_path, switches, print).published_inception
    words = tmp_path / "wordnet"
    words.mkdir()
    hashes = []
    for content in ("one", "other"):
        (words / "data.noun").write_text(content)
        hashes.append(features_file.weights_hash(words))
    assert hashes[0] != hashes[1]


def test_generated_text_may_be_anything(tmp_path):
    write(tmp_path / "conversations.jsonl", [answer("a", "<s> ok [IMG0] ###"), answer("b", "")])
    found = read_predictions(tmp_path)
    assert found["a"].text == "<s> ok [IMG0] ###" and found["b"].text == "" and found["b"].image is None
    picture(tmp_path / "1.png", 0)
    drawn = answer("a", "ok", "1.png")
    drawn["turns"].append({"role": "assistant", "content": "and then"})
    write(tmp_path / "conversations.jsonl", [drawn])
    assert cleaned(read_predictions(tmp_path)["a"].text) == "ok", "the original cuts at its image, too"


def test_references_are_the_assistants_turns(tmp_path):
    picture(tmp_path / "1.png", 0)
    user = {"role": "user", "content": "We left."}
    drawn = {"role": "assistant", "content": [{"type": "image", "path": "1.png"}]}
    said = {"role": "assistant", "content": "ok"}
    found = read_references(write(tmp_path / "r.jsonl", [{"id": "s", "turns": [user, drawn, user, said]}]))
    assert [(r.id, r.group, r.step, r.caption, r.text) for r in found] == [
        ("s_1", "s", 0, "We left.", ""),
        ("s_3", "s", 1, "We left.", "ok"),
    ]
    assert found[0].image == tmp_path / "1.png" and found[1].image is None
    pair = {"id": "s_3", "caption": "a fox", "image": "1.png"}
    write(tmp_path / "r.jsonl", [{"id": "s", "turns": [user, drawn, user, said]}, pair])
    with pytest.raises(DataError, match="r.jsonl:2: two samples are called s_3; give this record another id"):
        read_references(tmp_path / "r.jsonl")


# -------------------------------------------------------------------------------------- images


def test_a_missing_image_under_each_rule(pairs, weights, tmp_path):
    request = Request(**pairs, weights=weights, protocol="paper")
    skipping = entries(evaluate(request))
    values = [line["clip_i"] for line in lines(request.output, "per_sample.jsonl")]
    assert values[3] is None and skipping["clip_i"]["n"] == 3
    assert skipping["clip_i"]["value"] == pytest.approx(np.mean(values[:3]))
    zero = entries(evaluate(Request(**pairs, weights=weights, switches={"missing_image": "zero"})))
    assert zero["clip_i"]["n"] == 4 and lines(request.output, "per_sample.jsonl")[3]["clip_i"] == 0
    with pytest.raises(
        DataError, match=r"1 of 4 samples have no image:\n  p3: no image was written\n.*--switch"
    ):
        evaluate(Request(**pairs, switches={"missing_image": "error"}))
    (tmp_path / "out/images/0.png").write_bytes(b"no image")
    (tmp_path / "out/images/1.png").unlink()
    found = evaluate(request)
    assert [row["id"] for row in found["data"]["without_image"]] == ["p0", "p1", "p3"]
    assert "no known image format" in found["data"]["without_image"][0]["why"]
    assert "No such file" in found["data"]["without_image"][1]["why"]
    assert entries(found)["fid"]["why"] == "needs 2 images on each side at least, here are 1 and 4"


def test_grey_and_transparent_images_are_read_as_shown(pairs, weights, tmp_path):
    first = entries(evaluate(Request(**pairs, weights=weights)))["clip_i"]["value"]
    grey = Image.open(tmp_path / "out/images/1.png")
    assert grey.mode == "L"
    grey.convert("RGB").save(tmp_path / "out/images/1.png")
    assert entries(evaluate(Request(**pairs, weights=weights)))["clip_i"]["value"] == pytest.approx(first)


def test_scores_of_sets_are_those_of_their_features(pairs, weights):
    request = Request(**pairs, weights=weights, protocol="paper")
    found = entries(evaluate(request))
    made = [
        np.asarray(Image.open(Path(request.predictions) / f"images/{i}.png").convert("RGB")) for i in (0, 1)
    ]
    rgba = Image.open(Path(request.predictions) / "images/2.png").convert("RGB")
    real = [Image.open(Path(request.references).parent / f"real/{i}.png") for i in range(4)]
    resized = lambda image: image.resize((int(256 * 1.5) if image.width > 20 else 256, 256), 2)  # noqa: E731
    rows = [
        np.stack([of_image(resized(image), 3056)[:2048] for image in some]).astype(np.float32)
        for some in ([*map(Image.fromarray, made), rgba], real)
    ]
    assert found["fid"]["value"] == pytest.approx(frechet_distance_of_few(*rows), rel=1e-5)
    assert (found["fid"]["n"], found["fid"]["n_real"], found["fid"]["ci"]) == (3, 4, None)
    assert "compare only 3 with 4" in found["fid"]["notes"][0]
    assert found["inception_score"]["spread"]["n"] == 3
    folder = str(Path(request.references).parent / "real")
    (Path(folder) / "notes.txt").write_text("no image")
    again = evaluate(Request(**pairs, weights=weights, protocol="paper", real_images=folder))
    assert entries(again)["fid"]["value"] == pytest.approx(found["fid"]["value"])
    assert again["protocol"]["switches"]["real_images"] == folder


def test_kid_and_captions_that_are_cut(pairs, weights):
    path = Path(pairs["references"])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["caption"] = " ".join(["fox"] * 80)
    write(path, records)
    found = entries(evaluate(Request(**pairs, weights=weights)))
    assert "choose a smaller size (--switch kid_subset=NUMBER)" in found["kid"]["why"]
    assert found["clip_t"]["notes"] == ["1 of 3 texts had over 77 tokens and were cut"]
    found = entries(
        evaluate(Request(**pairs, weights=weights, switches={"kid_subset": "3"}, metrics=["kid"]))
    )
    assert found["kid"]["status"] == "ok" and found["kid"]["spread"]["n"] == 100


def test_another_network_is_never_called_fid(pairs, weights):
    Path(weights["inception"]).write_text("random weights")
    with pytest.raises(ConfigError, match="is not the network of FID: its sha256 begins with"):
        evaluate(Request(**pairs, weights=weights))
    switches = {"inception_weights": "other"}
    found = evaluate(Request(**pairs, weights=weights, switches=switches, protocol="paper"))
    names = entries(found).keys()
    assert "fid_other_network" in names and "inception_score_other_network" in names and "fid" not in names
    assert found["paper"] == [], "with another switch these are not the paper's scores"


def test_features_are_kept_by_weights_and_content(pairs, weights, tmp_path):
    request = Request(**pairs, weights=weights, protocol="paper", metrics=["fid"])
    first = entries(evaluate(request))["fid"]["value"]
    FakeInception.calls = 0
    assert entries(evaluate(request))["fid"]["value"] == first and not FakeInception.calls
    picture(tmp_path / "out/images/0.png", 77)
    assert entries(evaluate(request))["fid"]["value"] != first and FakeInception.calls == 1
    Path(weights["inception"]).write_text("others")
    other = Request(**pairs, weights=weights, metrics=["fid"], switches={"inception_weights": "other"})
    evaluate(other)
    assert FakeInception.calls == 1 + 7, "features of other weights are not used"


def test_features_of_other_weights_or_damaged_are_refused(tmp_path):
    quiet = Progress("features", lambda line: None, lambda: 0.0)
    rows = Cache(tmp_path, "net", "a" * 64, "how").rows(["k"], lambda places: np.ones((1, 2)), quiet)
    assert rows.tolist() == [[1, 1]]
    kept = tmp_path / f"net-{'a' * 12}-how.npz"
    kept.rename(tmp_path / f"net-{'b' * 12}-how.npz")
    with pytest.raises(
        DataError, match=r"features of other weights \(aaaaaaaaaaaa... instead of bbb.*delete it"
    ):
        Cache(tmp_path, "net", "b" * 64, "how")
    kept.write_bytes(b"PK")
    with pytest.raises(DataError, match="is damaged .*; delete it"):
        Cache(tmp_path, "net", "a" * 64, "how")
    kept.unlink()
    assert not Cache(tmp_path, "net", "a" * 64, "how")._rows


def test_stories_have_fid_of_their_own(tmp_path, weights):
    records, answers = [], []
    for story in range(3):
        turns = []
        for step in range(1 if story == 2 else 3):
            name = f"{story}-{step}.png"
            picture(tmp_path / "data" / name, 10 * story + step)
            picture(tmp_path / "out" / name, 100 + 10 * story + step)
            answers.append(answer(f"s{story}_{2 * step + 1}", image=name))
            image = [{"type": "image", "path": name}]
            turns += [{"role": "user", "content": "We left."}, {"role": "assistant", "content": image}]
        records.append({"id": f"s{story}", "turns": turns})
    write(tmp_path / "out/conversations.jsonl", answers)
    request = Request(
        references=str(write(tmp_path / "data/r.jsonl", records)),
        predictions=str(tmp_path / "out"),
        output=str(tmp_path / "result"),
        protocol="paper",
        task="stories",
        weights=weights,
    )
    found = evaluate(request)
    metric = entries(found)["fid_per_story"]
    groups = lines(request.output, "per_group.jsonl")
    assert metric["n"] == 2 and "fid_per_story" not in groups[2]
    assert metric["value"] == pytest.approx(np.mean([group["fid_per_story"][0] for group in groups[:2]]))
    assert (
        metric["ci"]["unit"] == "stories" and metric["ci"]["low"] <= metric["value"] <= metric["ci"]["high"]
    )
    cells = {(c["table"], c["metric"], c["value"]) for c in found["paper"]}
    assert cells == {(1, "clip_i", 0.66), (1, "fid_per_story", 366.62)}
    assert evaluate(dataclasses.replace(request, protocol="standard"))["paper"] == []
    found = evaluate(dataclasses.replace(request, task="last_step", metrics=["clip_i"]))
    ids = [line["id"] for line in lines(request.output, "per_sample.jsonl")]
    assert ids == ["s0_5", "s1_5", "s2_1"] and {c["table"] for c in found["paper"]} == {6}
    write(tmp_path / "out/conversations.jsonl", [*answers, answer("s0_7")])
    with pytest.raises(DataError, match="1 predictions are of no reference: s0_7"):
        evaluate(dataclasses.replace(request, task="last_step"))


# --------------------------------------------------------------------------------------- texts

WANTED = [["ok, nice.", "see you there", "..."], ["hello you", "look at it"]]
GOT = [["<s> ok nice", "", "fine"], ["###", "look at that [IMG0] ###"]]


@pytest.fixture
def dialogs(tmp_path):
    """Two dialogues; images are wanted in their last turns, made in the first and the last one."""
    tmp_path = tmp_path / "dialogs"
    records, answers = [], []
    for number, (wanted, got) in enumerate(zip(WANTED, GOT)):
        turns = [{"role": "user", "content": "hi"}]
        for turn, (want, text) in enumerate(zip(wanted, got), 1):
            content = [{"type": "text", "text": want}]
            if turn == len(wanted):
                picture(tmp_path / f"data/{number}.png", number, size=(30, 20))
                content.append({"type": "image", "path": f"{number}.png"})
            turns.append({"role": "assistant", "content": content})
            made = (number, turn) in ((0, 1), (1, 2))
            if made:
                picture(tmp_path / f"out/{number}{turn}.png", 50 + number)
            answers.append(answer(f"d{number}_{turn}", text, f"{number}{turn}.png" if made else None))
        records.append({"id": f"d{number}", "turns": turns})
    write(tmp_path / "out/conversations.jsonl", answers)
    return {
        "references": str(write(tmp_path / "data/r.jsonl", records)),
        "predictions": str(tmp_path / "out"),
        "output": str(tmp_path / "result"),
    }


def test_texts_of_dialogues_as_the_paper_scores_them(dialogs):
    found = evaluate(Request(**dialogs, protocol="paper"))
    assert found["protocol"]["task"] == "dialogs"
    got = entries(found)
    first = [bleu("<s> ok nice", "ok, nice.", 1, "char"), 0.0]
    last = [0.0, bleu("look at that", "look at it", 1, "char")]
    assert got["bleu_1"]["value"] == pytest.approx(np.mean([np.mean(first), np.mean(last)]))
    assert got["bleu_1"]["n"] == 2, "dialogues"
    rows = lines(dialogs["output"], "per_sample.jsonl")
    assert rows[2]["bleu_1"] is None, "a reference of only dots is no text"
    assert rows[4]["rouge_l"] == pytest.approx(rouge("look at that", "look at it"))
    skipped = summary(found)["skipped"]
    assert (
        set(skipped) == {"inception_score", "s_bert", "mm_relevance"}
        and "clip_b32=PATH" in skipped["mm_relevance"]
    )
    assert got["rouge_l"]["ci"]["unit"] == "dialogues"


def test_images_where_they_are_called_for(dialogs):
    found = entries(evaluate(Request(**dialogs)))
    values = {name: found[f"image_{name}"]["value"] for name in ("precision", "recall", "f1", "exact")}
    assert values == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "exact": 0.6}
    assert found["bleu_1"]["n"] == 4, "samples"
    assert found["meteor_no_synonyms"]["metric"] == "meteor" and found["meteor_no_synonyms"]["value"] > 0


def test_mm_relevance_in_both_forms(dialogs, weights):
    cos = lambda one, other: float(unit(one[None])[0] @ unit(other[None])[0])  # noqa: E731
    image = lambda path: of_image(Image.open(path))  # noqa: E731
    out, data = Path(dialogs["predictions"]), Path(dialogs["references"]).parent
    target = prepare_image(data / "1.png", 512, square=True, flip=False)  # as the original reads it
    seen = cos(image(out / "12.png"), of_image(Image.fromarray(target)))
    request = Request(**dialogs, weights=weights, protocol="paper", metrics=["mm_relevance"])
    said = cos(of_text("<s> ok nice"), of_text("ok, nice."))
    one = [Slot(True, True, said), Slot(False, True), Slot(True, False), Slot(False, True), Slot(True, False)]
    two = [Slot(True, False), Slot(True, True, cos(of_text("look at that"), of_text("look at it")))]
    want = np.mean([mm_relevance_m5(one), mm_relevance_m5([*two, Slot(True, True, seen)])])
    found = entries(evaluate(request))["mm_relevance"]
    assert found["value"] == pytest.approx(want, abs=1e-5) and found["variant"].endswith("white_square")
    official = Request(**dialogs, weights=weights, metrics=["mm_relevance"])
    evaluate(official)
    values = [line["mm_relevance"] for line in lines(official.output, "per_sample.jsonl")]
    texts = unit(np.stack([of_text("look at that"), of_text("look at it")]))
    got = np.stack([texts[0], unit(image(out / "12.png")[None])[0]])
    true = np.stack([texts[1], unit(image(data / "1.png")[None])[0]])
    assert values[4] == pytest.approx(mm_relevance_official(got, true), abs=1e-5)
    assert values[1] == values[3] == 0 and values[2] is not None


# ------------------------------------------------------------------------------------- results


def test_results_follow_their_schema(pairs, weights, dialogs):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    request = Request(**pairs, weights=weights, protocol="paper")
    evaluate(request)
    written = json.loads((Path(request.output) / "results.json").read_text())
    jsonschema.validate(written, SCHEMA)
    skipping = evaluate(Request(**dialogs))
    jsonschema.validate(skipping, SCHEMA)
    broken = json.loads(json.dumps(written))
    broken["metrics"][0]["value"] = "0.5"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="'why' is a required property"):
        del skipping["metrics"][-1]["why"]
        jsonschema.validate(skipping, SCHEMA)
    assert summary(written).keys() == {"metrics", "skipped", "n"} and summary(written)["n"] == 4


def test_the_report_shows_scores_and_samples(pairs, weights):
    request = Request(**pairs, weights=weights, protocol="paper")
    evaluate(request)
    page = (Path(request.output) / "report.html").read_text()
    assert "Best by clip_i" in page and "<svg" in page and "MiniGPT-5" in page and "31.47" in page
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 6 and all((Path(request.output) / source).is_file() for source in sources)


def test_two_runs_are_compared_over_their_common_groups(pairs, weights, tmp_path):
    common = {"weights": weights, "protocol": "paper", "switches": {"clip_target": "stored"}}
    request = Request(**pairs, **common)
    before = entries(evaluate(request))
    for i in range(3):
        picture(tmp_path / f"out/images/{i}.png", i, size=(30, 20))  # the true ones
    other = Request(**pairs | {"output": str(tmp_path / "b")}, **common, against=request.output)
    after = evaluate(other)
    found = {row["metric"]: row for row in after["comparisons"]}
    row = found["clip_i"]
    assert entries(after)["clip_i"]["value"] == pytest.approx(1)
    assert row["difference"] == pytest.approx(entries(after)["clip_i"]["value"] - before["clip_i"]["value"])
    assert row["ci"]["low"] > 0 and row["p"] < 0.01 and row["n_groups"] == 3
    assert found["fid"]["test"] == "none, one value a set" and found["fid"]["ci"] is None
    jsonschema.validate(after, SCHEMA)
    squares = Request(**pairs | {"output": str(tmp_path / "c")}, weights=weights, against=request.output)
    squares = evaluate(dataclasses.replace(squares, protocol="paper"))
    assert "not comparable" in {r["metric"]: r for r in squares["comparisons"]}["clip_i"]["test"]
    path = Path(request.output) / "results.json"
    written = json.loads(path.read_text())
    written["data"]["ids_sha256"] = "other"
    path.write_text(json.dumps(written))
    found = {row["metric"]: row for row in evaluate(other)["comparisons"]}
    assert found["fid"]["test"] == "not comparable: other samples" and found["fid"]["difference"] is None
    assert found["clip_i"]["test"] == "paired bootstrap", "over the common groups"


def test_intervals_draw_groups():
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, 200)
    found = interval([(value, 1.0) for value in values], "stories")
    error = values.std() / np.sqrt(200)
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    turns = [(5 * value, 5.0) for value in values]  # five equal turns of a story tell no more than one
    assert interval(turns, "stories")["low"] == pytest.approx(found["low"])
    assert interval([(1.0, 1.0)], "stories") is None
    ours = {str(i): (value + 0.01, 1.0) for i, value in enumerate(values)}
    theirs = {str(i): (value, 1.0) for i, value in enumerate(values)}
    difference = compare(ours, theirs, "pairs")
    assert difference.value == pytest.approx(0.01) and difference.ci["low"] == pytest.approx(0.01)
    assert compare(ours, {}, "pairs") is None
    assert compare(ours, ours, "pairs").p == 1


def test_progress_tells_the_time_left():
    told, times = [], iter([0.0, 10.0, 3700.0])
    progress = Progress("features", told.append, lambda: next(times))
    progress.start(4)
    progress.done(1)
    progress.done(1)
    assert told == ["features: 1 of 4, 0:30 left", "features: 2 of 4, 1:01:40 left"]
    assert duration(59.6) == "1:00"


@pytest.mark.parametrize(
    "results, groups, named", [("{", "", "results.json"), ("{}", "{\n", "group.jsonl:1")]
)
def test_a_damaged_evaluation_to_compare_with_is_named(results, groups, named, tmp_path):
    (tmp_path / "results.json").write_text(
        results.replace("{}", '{"metrics": [], "data": {"ids_sha256": ""}}')
    )
    (tmp_path / "per_group.jsonl").write_text(groups)
    with pytest.raises(DataError, match=f"{named} is cut off or no JSON; evaluate it again"):
        against(tmp_path, "pairs", [], [], [])
