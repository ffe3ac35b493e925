"""Dialogues put to sessions that know the truth, always draw or never do; which answers are right."""

from __future__ import annotations

import pytest

from minigpt5_jax.evaluation.shapes import counts as judge_counts
from minigpt5_jax.evaluation.shapes import dialogs as judge_dialogs
from minigpt5_jax.inference.session import Generation, Session, mixed_seed
from minigpt5_jax.shapes.dataset import draw_dialogs
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import make_scene

COUNT = 25
SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    "provide it to you. Please generate conversations with appropriate images."
)
BLANK = render([make_scene(0, [])])[0]


class Oracle(Session):
    """Answers the turn a prompt's seed stands for with ``answer(turn) -> parts``."""

    def __init__(self, turns, answer):
        self.turns, self.answer, self.prompts = turns, answer, []

    def generate(self, prompts, *, images=True):
        self.prompts += prompts
        return [self.one(prompt) for prompt in prompts]

    def one(self, prompt):
        parts = self.answer(self.turns[prompt.seed])
        text = " ".join(part for part in parts if isinstance(part, str))
        return Generation(parts, text, (), prompt.source, prompt.seed)


@pytest.fixture(scope="module")
def dialogs():
    return draw_dialogs("held_out", COUNT, 0)


@pytest.fixture
def judge(seeing_run, dialogs, monkeypatch):
    """``judge(answer)``: the numbers, with a session that answers so, and the session."""

    def judge(answer):
        turns = {
            mixed_seed(0, row, number): turns[number]
            for row, turns in enumerate(dialogs)
            for number in range(1, len(turns), 2)
        }
        session = Oracle(turns, answer)
        monkeypatch.setattr(judge_counts, "open_session", lambda *args, **settings: session)
        return judge_dialogs.judge_dialogs(seeing_run, count=COUNT), session

    return judge


def truth(turn):
    return (turn.text,) if turn.scene is None else (turn.text, render([turn.scene])[0])


def assistant(dialogs):
    return [turn for turns in dialogs for turn in turns[1::2]]


def test_the_truth_is_all_right(judge, dialogs):
    found, _ = judge(truth)
    turns = assistant(dialogs)
    wanted = [turn for turn in turns if turn.scene is not None]
    placing, images, answers = found["placing"], found["images"], found["answers"]
    assert found["turns"] == len(turns) == placing["accuracy"]["count"] and found["cut"] == 0
    assert placing["precision"]["count"] == placing["recall"]["count"] == len(wanted)
    assert all(placing[name]["share"] == 1.0 for name in ("accuracy", "precision", "recall"))
    assert placing["by_kind"].keys() == {turn.kind for turn in turns} >= {"show", "edit", "look", "ask"}
    assert images["all"]["all_right"] == {"share": 1.0, "count": len(wanted), "standard_error": 0.0}
    assert images["show"]["together"]["share"] == images["edit"]["together"]["share"] == 1.0
    asked = [turn.answer for turn in turns if turn.answer]
    assert answers["all"] == {"share": 1.0, "count": len(asked), "standard_error": 0.0}
    assert answers.keys() - {"all"} == {what for what, _ in asked}


def test_the_model_reads_the_turns_that_the_reader_shows(judge, dialogs):
    _, session = judge(truth)
    first, second, third, *_ = dialogs[0]
    shown = [f"{turn.text} <Img><ImageHere></Img>" if turn.scene else turn.text for turn in dialogs[0]]
    assert session.prompts[0].source == f"{SYSTEM} ###Human: {shown[0]} ###Assistant:"
    history = f"###Human: {shown[0]} ###Assistant: {shown[1]} ###Human: {shown[2]}"
    assert session.prompts[1].source == f"{SYSTEM} {history} ###Assistant:"
    assert len(session.prompts[1].images) == sum(t.scene is not None for t in (first, second, third))
    assert len({prompt.seed for prompt in session.prompts}) == len(session.prompts)


def test_a_model_that_always_draws(judge, dialogs):
    found, _ = judge(lambda turn: ("here it is.", BLANK))
    turns = assistant(dialogs)
    part = sum(turn.scene is not None for turn in turns) / len(turns)
    placing = found["placing"]
    assert placing["precision"]["share"] == placing["accuracy"]["share"] == pytest.approx(part)
    assert placing["precision"]["count"] == len(turns) and placing["recall"]["share"] == 1.0
    assert placing["by_kind"]["ask"]["share"] == 0.0 and placing["by_kind"]["show"]["share"] == 1.0
    assert found["images"]["all"]["all_right"]["share"] == 0.0
    assert found["images"]["all"]["place"]["share"] == 0.0
    assert found["answers"]["all"]["share"] == 0.0


def test_a_model_that_never_draws(judge, dialogs):
    found, _ = judge(lambda turn: (turn.text,))
    placing = found["placing"]
    assert placing["precision"] == {"share": None, "count": 0, "standard_error": None}
    assert placing["recall"]["share"] == 0.0
    assert 0 < placing["accuracy"]["share"] < 1 and placing["accuracy"]["standard_error"] > 0
    assert found["images"]["all"]["all_right"]["count"] == 0
    assert found["answers"]["all"]["share"] == 1.0


@pytest.mark.parametrize(
    "text, asked, value, right",
    [
        ("it is red.", "colour", "red", True),
        ("the red one is blue.", "colour", "blue", False),
        ("it is blue.", "colour", "red", False),
        ("it is tiny.", "size", "small", True),
        ("The plus is BIG.", "size", "large", True),
        ("the disc is in the lower right.", "place", "bottom right", True),
        ("the disc is in the right.", "place", "bottom right", False),
        ("it is a disc.", "shape", "circle", True),
        ("it is spotted.", "texture", "dotted", True),
        ("the background is gray.", "background", "gray", True),
        ("two.", "count", "two", True),
        ("twofold.", "count", "two", False),
        ("", "count", "one", False),
    ],
)
def test_an_answer_states_the_right_value_and_no_other(text, asked, value, right):
    assert judge_dialogs.states(text, asked, value) is right
