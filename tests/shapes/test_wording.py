"""Captions and what they are understood as."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.data.text.templates import clean_caption
from minigpt5_jax.shapes.wording import caption, caption_words, describe, ends_of_objects, understand
from minigpt5_jax.shapes.world import Object, Scene, draw_scene


@pytest.mark.parametrize("count", [1, 2, 3])
def test_captions_tell_everything_in_many_wordings(count):
    random, wordings = np.random.default_rng(count), set()
    words = {*caption_words(), ","}
    scene = draw_scene(random, count=count)
    for _ in range(100):
        text = caption(scene, random)
        wordings.add(text)
        assert text == clean_caption(text)
        assert set(text.replace(",", " ,").split()) <= words
        assert understand(text).scene() == scene
        assert sorted((item.place, item) for _, item in ends_of_objects(text)) == [
            (item.place, item) for item in scene.objects
        ]
    assert len(wordings) > 10


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_description_tells_everything_in_one_wording(count):
    scene = draw_scene(np.random.default_rng(count), count=count)
    text = describe(scene)
    assert text == clean_caption(text) and text == describe(scene)
    assert set(text.split()) <= set(caption_words()) and understand(text).scene() == scene


def test_a_description_goes_from_place_to_place():
    two = Scene(0, (Object(0, 0, 0, 0, 1), Object(1, 1, 1, 1, 2)))
    assert describe(two) == (
        "a white picture with in the top right a small solid red circle "
        "and in the bottom left a large striped green square"
    )


def test_captions_of_empty_and_full_scenes_are_refused():
    with pytest.raises(ValueError, match="one to three objects, the scene has 0"):
        caption(Scene(0, ()), np.random.default_rng(0))


def test_an_object_ends_with_its_clause():
    text = "a tiny red solid star at the top left, in the lower right a plain blue box that is big and a dog"
    first, second = ends_of_objects(text)
    assert text[: first[0]].endswith("top left") and first[1] == Object(3, 0, 0, 0, 0)
    assert text[: second[0]].endswith("big") and second[1] == Object(1, 2, 1, 0, 3)


def test_what_is_not_said_is_not_understood():
    said = understand("A red circle, and something striped.")
    assert said.background is None and said.objects == ({"colour": 0, "shape": 0},)
    assert said.scene() is None
    assert understand("hello, world").objects == ()
