"""The generate command: prompts from words and files, refusals before weights are read, a page at the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import tiny
from minigpt5_jax import generate
from minigpt5_jax.config import ConfigError, get_config, use_shapes_backbones
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.templates import IMAGE
from minigpt5_jax.inference.prompts import text_prompt
from minigpt5_jax.inference.session import Generation
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.wiring import generation, restore

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_stage1.py"


@pytest.fixture(autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def command(mode=None, **values):
    """Runs the command with these flags."""
    with flagsaver.flagsaver(**values):
        return generate.generate(mode)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a shapes run that saved itself before its first step; its model cannot see."""
    return tiny.save_run(tiny.shapes_stage1(), tmp_path_factory.mktemp("run"))


def test_a_page_from_a_checkpoint(checkpoint, tmp_path, capsys):
    page = command(
        checkpoint=str(checkpoint),
        prompt=["A small red circle.", "a blue square"],
        num_samples=2,
        seed=5,
        output=str(tmp_path / "page"),
        inference=["force_image=first", "max_new_tokens=3", "num_inference_steps=1"],
    )
    assert page == tmp_path / "page" / "index.html"
    text = page.read_text()
    assert text.count("a small red circle") == 2 and "seed 5" in text and "seed 6" in text
    images = sorted((tmp_path / "page" / "images").glob("*.png"))
    assert len(images) == 4, "each prompt twice"
    shown = [np.asarray(Image.open(path)) for path in images]
    assert all(image.shape == (64, 64, 3) for image in shown)
    assert (shown[0] != shown[1]).any(), "samples have their own seeds"
    assert "inference.force_image" in text and "first" in text
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"opening {checkpoint}" and said[1].startswith("reading the weights of step 7")
    assert "4 prompts" in said[2] and said[3:] == ["texts: 4 of 4", "images: 4 of 4"]
    assert "<p>A small red circle.</p>" in text and "the model read: a small red circle" in text


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"prompt": []}, DataError, "nothing to answer"),
        ({"prompt": ["..!"]}, DataError, "empty after cleaning"),
        ({"prompt": [" "], "template": "dialog"}, DataError, "is empty"),
        ({"image": ["/no/such.png"]}, DataError, "/no/such.png"),
        ({"prompt": ["a", "b"], "image": ["x.png"]}, DataError, "one --prompt, not 2"),
        ({"jsonl": "/no/such.jsonl"}, DataError, "data file not found"),
        ({"checkpoint": None}, ConfigError, "--checkpoint"),
        ({"checkpoint": "/no/such/run"}, CheckpointError, "/no/such/run"),
        ({"step": 3}, CheckpointError, "no step 3"),
        ({"inference": ["top_q=1"]}, ConfigError, "inference.top_q"),
        ({"inference": ["top_k=many"]}, ConfigError, "must be of type int"),
        ({"inference": ["top_p=2.0"]}, ConfigError, "more than 1.0"),
        ({"inference": ["top_p"]}, ConfigError, "NAME=VALUE"),
        ({"output": str(CONFIG.parent)}, FileExistsError, "holds other things"),
        ({"output": str(CONFIG)}, FileExistsError, "choose another"),
    ],
)
def test_refused_before_weights_are_read(values, error, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "load_frozen", lambda *_, **__: pytest.fail("weights were read"))
    given = {"checkpoint": str(checkpoint), "prompt": ["a dog"], "output": str(tmp_path / "page"), **values}
    with pytest.raises(error, match=message):
        command(**given)
    assert not (tmp_path / "page").exists()


def test_a_page_shows_a_prompt_with_its_images_in_place(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(path)
    prompt = text_prompt("before <ImageHere> behind", [str(path)], dialog=True)
    answer = Generation((), "", (2,), prompt.source, 1, dropped=4)
    entry = generation.entry(prompt, answer, IMAGE)
    assert [type(part) for part in entry.prompt] == [str, np.ndarray, str]
    assert entry.prompt[1].shape == (2, 3, 3) and entry.prompt[2].startswith("behind")
    assert entry.output == ["(nothing)"] and "4 positions" in entry.notes
    before = text_prompt("what came next?", [str(path)], dialog=True)
    entry = generation.entry(before, Generation((), "", (2,), before.source, 1), IMAGE)
    assert isinstance(entry.prompt[0], np.ndarray) and entry.prompt[1:] == ["what came next?"]
    record = dataclasses.replace(before, typed="")  # of a file: as the model reads it
    entry = generation.entry(record, Generation((), "", (2,), record.source, 1), IMAGE)
    assert [type(part) for part in entry.prompt] == [str, np.ndarray, str]


def test_a_page_shows_what_was_typed_and_explains_a_missing_image():
    prompt = text_prompt("A red Fox (in the snow)!", [], dialog=False)
    answer = Generation(("a fox",), "a fox", (5, 2), prompt.source, 1)
    entry = generation.entry(prompt, answer, IMAGE, draws=True)
    assert entry.prompt == ["A red Fox (in the snow)!"]
    assert "the model read: a red fox in the snow" in entry.notes
    assert "no image was written; --inference force_image=first" in entry.notes
    assert "no image" not in generation.entry(prompt, answer, IMAGE).notes, "one that may not draw"
    drawn = dataclasses.replace(answer, parts=(np.zeros((2, 2, 3), np.uint8),))
    assert "no image" not in generation.entry(prompt, drawn, IMAGE, draws=True).notes


def test_tiny_towers_on_other_data_are_mentioned():
    config = get_config()
    assert not generation.toy_towers(config)
    use_shapes_backbones(config)
    assert "know coloured shapes" in generation.toy_towers(config)
    config.data.format = "shapes"
    assert not generation.toy_towers(config)


# ------------------------------------------------------------------------------ stories and dialogues


def records(path, *turns, name="talk"):
    line = {"id": name, "system": "S.", "turns": [{"role": r, "content": c} for r, c in turns]}
    path.write_text(json.dumps(line) + "\n")
    return str(path)


def test_a_dialogue_is_answered_turn_by_turn_and_can_be_read_again(checkpoint, tmp_path):
    script = records(tmp_path / "s.jsonl", ("user", "a red circle"), ("user", "a blue square"))
    settings = ["max_images=0", "max_new_tokens=3", "num_inference_steps=1"]
    page = command(
        "chat", checkpoint=str(checkpoint), jsonl=script, output=str(tmp_path / "page"), inference=settings
    )
    assert "You: a blue square" in page.read_text()
    told = json.loads((tmp_path / "page" / "conversations.jsonl").read_text())
    assert told["id"] == "talk" and told["system"] == "S."
    said = [turn["content"][0]["text"] for turn in told["turns"] if turn["role"] == "user"]
    assert said == ["a red circle", "a blue square"]
    assert {turn["role"] for turn in told["turns"]} <= {"user", "assistant"}


@pytest.mark.parametrize(
    "mode, values, error, message",
    [
        ("story", {}, ConfigError, "no vision tower.*what it draws itself.*max_images=0"),
        ("tale", {}, ConfigError, "unknown word 'tale'; known: story, chat"),
        ("chat", {"prompt": ["hello"]}, DataError, "goes on from one thing: give --jsonl"),
        ("chat", {"jsonl": None}, DataError, "or --prompt TEXT for each turn of the user"),
        ("chat", {"jsonl": None, "prompt": [" "]}, DataError, "is empty"),
        ("story", {"jsonl": None, "image": ["/no/such.png"]}, DataError, "/no/such.png"),
        ("chat", {"jsonl": "/no/such.jsonl"}, DataError, "data file not found"),
    ],
)
def test_conversations_that_cannot_be_had(mode, values, error, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "load_frozen", lambda *_, **__: pytest.fail("weights were read"))
    given = {"jsonl": records(tmp_path / "s.jsonl", ("user", "hello")), "checkpoint": str(checkpoint)}
    with pytest.raises(error, match=message):
        command(mode, output=str(tmp_path / "page"), **(given | values))
    assert not (tmp_path / "page").exists()


def test_a_script_without_a_user_is_refused(checkpoint, tmp_path):
    script = records(tmp_path / "s.jsonl", ("assistant", "hello"))
    with pytest.raises(DataError, match="record 'talk' has no user turn"):
        command("chat", checkpoint=str(checkpoint), jsonl=script, output=str(tmp_path / "page"))
