"""Counting what is drawn of captions: with sessions that draw what they are told to."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.evaluation.shapes import pairs as judging
from minigpt5_jax.inference.session import Generation, Session
from minigpt5_jax.shapes.backbones.evaluate import held_out_captions
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import ATTRIBUTES
from minigpt5_jax.wiring.session import LoadedModel


class Painter(Session):
    """Draws the scenes of the captions it knows, and nothing of the others."""

    def __init__(self, scenes, captions):
        self.known = dict(zip(captions, render(scenes), strict=True))
        self.seeds = []

    def generate(self, prompts):
        self.seeds += [prompt.seed for prompt in prompts]
        images = [self.known.get(prompt.source) for prompt in prompts]
        return [Generation(() if p is None else (p,), "", (), "", 0) for p in images]


@pytest.mark.parametrize("objects", (1, 2, 3))
def test_what_is_drawn_rightly_counts_and_what_is_not_drawn_is_wrong(monkeypatch, seeing_run, objects):
    scenes, captions = held_out_captions(12, 5, objects)
    painter = Painter(scenes[:9], captions[:9])
    monkeypatch.setattr(LoadedModel, "session", lambda run, batch_size: painter)
    found = judging.judge_pairs(seeing_run, count=12, objects=(objects,), seed=5, native=False)
    expected = {name: 9 / 12 for name in ("all", "background", *ATTRIBUTES, "drawn")}
    assert found == {str(objects): {"count": 12, "vokens": pytest.approx(expected)}}
    assert painter.seeds == [5 + i for i in range(12)]


def test_each_number_of_objects_is_counted_apart(monkeypatch, seeing_run):
    (one, one_captions), (three, three_captions) = (held_out_captions(6, 5, n) for n in (1, 3))
    painter = Painter(one + three[:2], one_captions + three_captions[:2])
    monkeypatch.setattr(LoadedModel, "session", lambda run, batch_size: painter)
    found = judging.judge_pairs(seeing_run, count=6, objects=(1, 3), seed=5, native=False)
    assert {n: row["vokens"]["all"] for n, row in found.items()} == pytest.approx({"1": 1.0, "3": 2 / 6})


def test_another_scenes_image_is_wrong(monkeypatch, seeing_run):
    scenes, captions = held_out_captions(12, 0, 2)
    painter = Painter(scenes[1:] + scenes[:1], captions)
    monkeypatch.setattr(LoadedModel, "session", lambda run, batch_size: painter)
    found = judging.judge_pairs(seeing_run, count=12, objects=(2,), native=False)["2"]["vokens"]
    assert found["drawn"] == 1.0 and found["all"] == 0.0 and found["background"] < 1.0


def test_nothing_drawn():
    assert judging.shares([None, None], held_out_captions(2, 0, 1)[0]) == {"all": 0.0, "drawn": 0.0}


def test_native_images_do_not_depend_on_their_batch(seeing_run):
    """Batches are filled up and cut; an image does not depend on them."""
    captions = ["a red circle", "two blue squares", "nothing"]
    whole, parts = (judging.native_images(seeing_run, captions, batch_size=size) for size in (3, 2))
    assert len(parts) == 3
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)
    assert all((whole[0] != image).any() for image in whole[1:])
