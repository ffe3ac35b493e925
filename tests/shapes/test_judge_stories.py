"""Stories put to sessions that know the truth, guess, or spoil one thing; the prompts of every context."""

from __future__ import annotations

import dataclasses
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.samples.stories import Step, Story, StoryRules
from minigpt5_jax.data.text.prompts import STORY_PROMPTS
from minigpt5_jax.evaluation.shapes import counts as judge_counts
from minigpt5_jax.evaluation.shapes import stories as judge_stories
from minigpt5_jax.evaluation.shapes.revealed import Revealed, image_only_shares
from minigpt5_jax.inference.session import Generation, Session, mixed_seed
from minigpt5_jax.shapes.dataset import draw_stories
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import Object, Scene, draw_scene, make_scene
from minigpt5_jax.wiring.model import ModelSpec

SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    "provide it to you. Please understanding images and generate story."
)
IMG0 = 9000
TALE = Story("7", tuple(Step(text, f"{text}.png", n) for n, text in enumerate("abcde")), "here")


class Oracle(Session):
    """Answers prompt ``number`` with ``answer(number, prompt) -> parts``."""

    def __init__(self, numbers, answer):
        self.numbers, self.answer = numbers, answer
        self.tokenizer = types.SimpleNamespace(first_voken_id=IMG0)
        self.sampled, self.prompts = 0, []

    def generate(self, prompts, *, images=True):
        self.prompts.append(prompts)
        return [self.one(prompt, images) for prompt in prompts]

    def one(self, prompt, images):
        parts = self.answer(self.numbers[prompt.seed], prompt)
        ids = tuple(3 if isinstance(part, str) else IMG0 for part in parts)
        text = " ".join(part for part in parts if isinstance(part, str))
        self.sampled += images * sum(not isinstance(part, str) for part in parts)
        return Generation(parts if images else (text,), text, ids, prompt.source, prompt.seed)


@pytest.fixture
def judge(seeing_run, monkeypatch):
    """``judge(answer, count, **more)``: the numbers, with sessions that answer so."""

    def judge(answer, count, seed=0, **more):
        numbers = {mixed_seed(seed, number): number for number in range(count)}
        session = Oracle(numbers, answer)
        monkeypatch.setattr(judge_counts, "open_session", lambda *args, **settings: session)
        result = judge_stories.judge_stories(seeing_run, count=count, seed=seed, **more)
        return result | {"session": session}

    return judge


def scenes(count):
    return [story.steps[-1].scene for story in draw_stories("held_out", count, 0)]


def drawn(scene: Scene) -> np.ndarray:
    return render([scene])[0]


@pytest.mark.parametrize(
    "context, history, images",
    [
        ("none", "", 0),
        ("text", "abcd\n", 0),
        ("image", "<Img><ImageHere></Img>" * 4 + "\n", 4),
        ("image+text", "".join(f"{text}<Img><ImageHere></Img>" for text in "abcd") + "\n", 4),
    ],
)
def test_what_is_read_before_the_last_image(context, history, images):
    prompt = judge_stories.context_prompt(TALE, context, seed=5)
    request = "Generate an image with the scene description: e"
    assert prompt.source == f"{SYSTEM}###Human:{history} {request} ###Assistant:"
    assert prompt.images == ("a.png", "b.png", "c.png", "d.png")[:images] and prompt.seed == 5


def test_the_full_context_is_the_sample_of_training():
    sample = StoryRules().worded(TALE, 4, "gen", wording=0)
    prompt = judge_stories.context_prompt(TALE, "image+text")
    assert (sample.source, sample.images) == (prompt.source, prompt.images)


def test_the_truth_is_all_right_and_is_told_in_its_own_words(judge):
    pytest.importorskip("rouge_score")
    stories = draw_stories("held_out", 12, 0)

    def answer(number, prompt):
        step = stories[number].steps[-1]
        if prompt.source.count("image with the scene"):
            return (drawn(step.scene),)
        return (step.text, drawn(step.scene)) if "by this image" not in prompt.source else (step.text,)

    found = judge(answer, 12)
    assert list(found["contexts"]) == ["none", "text", "image", "image+text"]
    hidden = [step.revealed for step in (story.steps[-1] for story in stories)]
    for row in found["contexts"].values():
        assert row["emitted"]["share"] == 1.0 and row["cut"] == 0
        assert row["all_attributes"].pop("too_many")["mean"] == 0.0
        assert all(part["share"] == 1.0 for part in row["all_attributes"].values())
        revealed = row["image_only"]
        assert revealed["stories"] == sum(map(bool, hidden)) and revealed["placed"]["share"] == 1.0
        assert revealed["together"]["count"] == sum(map(len, hidden))
        assert revealed["texture"]["count"] == sum("texture" in names for names in hidden)
        assert revealed["together"]["share"] == 1.0 and revealed["together"]["near_chance"] is False
    assert found["multimodal"]["rouge_l"]["mean"] == found["understanding"]["rouge_l"]["mean"] == 1.0
    assert found["multimodal"]["emitted"]["share"] == 1.0
    assert 0 < found["multimodal"]["of_another"]["mean"] < 0.6
    assert found["session"].sampled == 4 * 12, "images are sampled only where they are looked at"
    requests = {prompt.source.split("\n ")[-1] for prompt in found["session"].prompts[-2]}
    assert requests == {f"{text} ###Assistant:" for text in STORY_PROMPTS["head"]["multimodal"]}


def test_guesses_are_near_chance(judge):
    random = np.random.default_rng(3)
    guesses = [drawn(draw_scene(random, False, 1 + number % 3)) for number in range(150)]
    found = judge(lambda number, _: (guesses[number],), 150, contexts=["text"], narrations=())
    revealed = found["contexts"]["text"]["image_only"]
    assert 60 < revealed["stories"] < 90 and 0.85 < revealed["found"]["share"] <= 1
    assert revealed["placed"]["share"] < 0.75
    assert revealed["together"]["near_chance"]
    assert all(abs(revealed[name]["from_chance"]) < 3 for name in ("shape", "colour", "texture"))
    assert 1 / 6 < revealed["together"]["chance"] < 1 / 2
    assert revealed["colour"]["chance"] == pytest.approx(1 / 6)
    assert revealed["shape"]["chance_by_texts"] > revealed["shape"]["chance"] == pytest.approx(1 / 5)
    assert found["contexts"]["text"]["all_attributes"]["all_right"]["share"] < 0.05


def test_one_attribute_corrupted_is_one_attribute_wrong(judge):
    def other(item: Object) -> Object:
        return dataclasses.replace(item, texture=(item.texture + 1) % 3)

    wrong = [make_scene(scene.background, map(other, scene.objects)) for scene in scenes(10)]
    found = judge(lambda number, _: (drawn(wrong[number]),), 10, contexts=["image"], narrations=())
    row = found["contexts"]["image"]
    assert row["all_attributes"]["all_right"]["share"] == 0.0
    for name in ("shape", "colour", "size", "place", "background"):
        assert row["all_attributes"][name]["share"] == 1.0
    assert row["all_attributes"]["texture"]["share"] == 0.0
    assert row["image_only"]["texture"]["share"] == 0.0 and row["image_only"]["shape"]["share"] == 1.0


def test_contexts_are_put_in_the_order_that_was_found(judge):
    right, nothing = scenes(6), make_scene(0, [])

    def answer(number, prompt):
        return (drawn(right[number] if prompt.images else nothing),)

    found = judge(answer, 6, contexts=["image", "none"], narrations=())
    assert found["order"] == ["none", "image"]
    assert found["table_6"] == {"none": 0.61, "text": 0.64, "image": 0.69, "image+text": 0.70}


def test_a_single_story_has_no_other_to_be_told_beside(judge):
    found = judge(lambda number, _: ("it moves .",), 1, contexts=(), narrations=["understanding"])
    assert found["understanding"]["of_another"] == {"mean": None, "count": 0, "standard_error": None}
    assert found["understanding"]["rouge_l"]["count"] == 1


def test_prompts_follow_from_the_seed_alone(judge):
    settings = {"contexts": ["none", "image"], "narrations": ()}
    told = [
        judge(lambda number, _: (), 3, seed=seed, batch_size=size, **settings)["session"].prompts
        for seed, size in ((4, 1), (4, 8), (5, 8))
    ]
    said = [[[(p.source, p.seed) for p in prompts] for prompts in one] for one in told]
    assert said[0] == said[1] != said[2]
    seeds = [[seed for _, seed in prompts] for prompts in said[0]]
    assert seeds[0] == seeds[2], "the same noise in every context"
    assert len(set(seeds[0])) == 3


def test_a_model_that_never_draws(judge):
    found = judge(lambda number, _: ("words",), 12, contexts=["none"], narrations=())
    row = found["contexts"]["none"]
    assert row["emitted"]["share"] == 0.0 and row["all_attributes"]["together"]["share"] == 0.0
    assert row["image_only"]["found"]["share"] == 0.0


STAR = Object(shape=3, colour=1, size=0, texture=2, place=0)
DISC = Object(shape=0, colour=4, size=1, texture=0, place=3)
WANT = make_scene(1, [STAR, DISC])


def revealed(*objects, background=1, names=("shape", "colour", "background"), texts=()):
    got = make_scene(background, objects)
    return Revealed(got, WANT, place=0, names=names, texts=texts)


def test_the_subject_is_looked_for_where_no_companion_belongs():
    assert revealed(STAR, DISC).subject == STAR
    astray = dataclasses.replace(STAR, place=2)
    assert revealed(astray, dataclasses.replace(DISC, place=1)).subject.place == 1, "the first free place"
    assert revealed(dataclasses.replace(STAR, place=3)).subject is None, "the companion's place"
    assert revealed().subject is None and revealed().drawn("background") == 1


def test_shapes_that_companions_have_are_no_guesses():
    texts = ("it moves to the top left .", "a small red plain disc comes to the top left .")
    step = revealed(STAR, texts=texts)
    assert step.left_open("shape") == 4 and step.left_open("colour") == 6
    told = dataclasses.replace(step, names=("shape",))
    wrong = dataclasses.replace(told, got=make_scene(1, [dataclasses.replace(STAR, shape=0)]))
    found = image_only_shares([told] + [wrong] * 3)["shape"]  # a share of 1/4 of four shapes left
    assert found["chance"] == 0.2 and found["chance_by_texts"] == found["share"] == 0.25
    assert found["from_chance"] == 0 and found["near_chance"]
    found = image_only_shares([told] * 3 + [wrong])["shape"]
    assert found["from_chance"] == pytest.approx(0.5 / (0.75 * 0.25 / 4) ** 0.5) and not found["near_chance"]


def test_chance_by_margins_minds_how_often_values_are():
    blue = dataclasses.replace(STAR, colour=2)
    steps = [revealed(STAR), revealed(STAR), revealed(blue), revealed()]
    found = image_only_shares(steps)
    # all four are green in truth; two of four images have a green subject
    assert found["colour"]["chance_by_margins"] == 0.5 and found["colour"]["share"] == 0.5
    assert found["shape"]["share"] == 0.75 and found["background"]["share"] == 1.0
    assert found["size"]["count"] == 0 and found["size"]["chance"] is None
    assert found["together"]["count"] == 12
    assert found["together"]["chance"] == pytest.approx((1 / 5 + 1 / 6 + 1 / 4) / 3)
    assert found["background"]["standard_error"] == 0, "and guessing one of four has an error of"
    assert found["background"]["from_chance"] == pytest.approx(0.75 / (0.25 * 0.75 / 4) ** 0.5)


def test_what_cannot_be_judged_is_refused(seeing_run, monkeypatch):
    with pytest.raises(ConfigError, match="unknown picture; known: none, text, image, image"):
        judge_stories.judge_stories(seeing_run, count=2, contexts=["none", "picture"])
    wide = dataclasses.replace(seeing_run, spec=Mock(spec=ModelSpec, generator=Mock(image_size=128)))
    with pytest.raises(ConfigError, match="64 pixels, this run draws 128"):
        judge_stories.judge_stories(wide, count=2)
    blind = dataclasses.replace(
        seeing_run, spec=Mock(spec=ModelSpec, backbone=Mock(image_tokens=0), generator=Mock(image_size=64))
    )
    with pytest.raises(ConfigError, match="no vision tower"):
        judge_stories.judge_stories(blind, count=2)
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(judge_counts, "open_session", None)
    with pytest.raises(ConfigError, match="rouge-score"):
        judge_stories.judge_stories(seeing_run, count=2)
