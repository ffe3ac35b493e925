"""Stories and dialogues: what happens, what is told, and what only images show."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.shapes.dialogs import draw_dialog
from minigpt5_jax.shapes.stories import EVENTS, OBJECTS_AT_MOST, STEPS, draw_story
from minigpt5_jax.shapes.wording import WORDS, understand
from minigpt5_jax.shapes.world import BACKGROUNDS, NAMES, Object


@pytest.fixture(scope="module")
def stories():
    return [draw_story(np.random.default_rng((5, i)), held_out=False) for i in range(300)]


def subject(step) -> Object:
    return step.shapes[0].item


def test_something_happens_at_every_step(stories):
    events = set()
    for story in stories:
        assert len(story.steps) == STEPS
        for before, after in zip(story.steps, story.steps[1:], strict=False):
            assert before.scene != after.scene and before.background == after.background
            assert 1 <= len(after.shapes) <= OBJECTS_AT_MOST
            difference = len(after.shapes) - len(before.shapes)
            assert difference == {"join": 1, "leave": -1}.get(after.event, 0)
            events.add(after.event)
    assert events == EVENTS.keys()


def test_half_of_the_stories_never_describe_their_subject(stories):
    silent = [story for story in stories if story.image_only]
    assert 0.4 < len(silent) / len(stories) < 0.6
    for story in silent:
        opening = story.steps[0].text.split(" . ")[0]  # a companion's description may follow
        assert not any(found.keys() - {"place"} for found in understand(opening).objects)
        assert not set(BACKGROUNDS) & set(" ".join(step.text for step in story.steps).split())


def test_told_attributes_are_in_the_texts_and_others_are_not(stories):
    for story in stories:
        heard: list[str] = []
        for step in story.steps:
            heard.append(step.text)
            said = " ".join(heard)
            for name in step.shapes[0].told:
                value = NAMES[name][getattr(subject(step), name)]
                assert any(word in said for word in WORDS.get(value, (value,)))
            if all(len(other.shapes) == 1 for other in story.steps):  # no companion was described
                for name in ("shape", "colour", "texture"):
                    value = NAMES[name][getattr(subject(step), name)]
                    told = any(word in said.split() for word in WORDS.get(value, (value,)))
                    assert told == (name in step.shapes[0].told)


def test_only_images_reveal_what_earlier_images_show_and_no_text_tells(stories):
    seen = set()
    for story in stories:
        assert story.steps[0].revealed == ()
        for before, step in zip(story.steps, story.steps[1:], strict=False):
            seen |= set(step.revealed)
            assert not set(step.revealed) & step.shapes[0].told
            for name in set(step.revealed) - {"background"}:
                assert getattr(subject(before), name) == getattr(subject(step), name)
            assert bool(step.revealed) == story.image_only
    assert seen == {"shape", "colour", "size", "texture", "background"}


def test_splits_of_stories_and_dialogues_are_apart(stories):
    assert not any(step.scene.held_out for story in stories for step in story.steps)
    for i in range(60):
        assert draw_story(np.random.default_rng((6, i)), held_out=True).steps[0].scene.held_out
        asked = draw_dialog(np.random.default_rng((6, i)), held_out=True)
        assert next(turn.scene for turn in asked if turn.scene).held_out
        seen = draw_dialog(np.random.default_rng((7, i)), held_out=False)
        assert not any(turn.scene.held_out for turn in seen if turn.scene)


def test_dialogues_ask_only_about_images_in_sight():
    """The reader of MMDialog shows an answer the three turns before it (fidelity 5.4)."""
    kinds = set()
    for i in range(300):
        turns = draw_dialog(np.random.default_rng((8, i)))
        assert len(turns) % 2 == 0 and all(turn.text for turn in turns)
        for at in range(1, len(turns), 2):
            kind = turns[at].kind
            kinds.add(kind)
            assert (turns[at].scene is not None) == (kind in ("show", "edit"))
            if kind in ("ask", "edit"):
                assert any(turn.scene for turn in turns[max(0, at - 3) : at])
    assert kinds == {"show", "edit", "ask", "look", "thank"}


def test_answers_are_true():
    for i in range(200):
        scene = before = None
        for turn in draw_dialog(np.random.default_rng((9, i))):
            scene = turn.scene or scene
            if turn.answer is not None:
                asked, value = turn.answer
                assert value in turn.text
                if asked == "background":
                    assert value == BACKGROUNDS[scene.background]
                elif asked == "count":
                    assert value == ("none", "one", "two", "three")[len(scene.objects)]
                else:
                    assert value in {NAMES[asked][getattr(item, asked)] for item in scene.objects}
            if turn.kind == "look" and turn.scene is None:
                assert understand(turn.text).scene() == scene
            if turn.kind == "show" and turn.scene is not None:
                assert understand(before.text).scene() == scene
            before = turn
