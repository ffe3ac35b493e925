"""World, renderer and oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.oracle import corrupted
from minigpt5_jax.shapes import world
from minigpt5_jax.shapes.oracle import read, right, score
from minigpt5_jax.shapes.render import cell_index, cells, number_of_objects, object_of, render
from minigpt5_jax.shapes.world import Object, Scene, all_scenes, draw_scene, kinds, make_scene


def test_held_out_kinds_are_new_but_all_their_pairs_are_seen():
    assert len(kinds(True)) == 10
    assert not set(kinds(True)) & set(kinds(False))
    seen = set(kinds(False))
    for triple in kinds(True):
        for i, j in itertools.combinations(range(3), 2):
            assert any((other[i], other[j]) == (triple[i], triple[j]) for other in seen)


def test_splits_are_complete_and_apart():
    train, held_out = list(all_scenes(False)), list(all_scenes(True))
    assert (len(train), len(held_out), len(set(train + held_out))) == (2560, 320, 2880)
    assert not any(scene.held_out for scene in train)
    assert all(scene.held_out for scene in held_out)


def test_drawn_scenes_keep_to_their_split():
    random = np.random.default_rng(0)
    for held_out, count in itertools.product((False, True), (1, 2, 3)):
        for _ in range(20):
            scene = draw_scene(random, held_out, count)
            assert len(scene.objects) == count
            assert scene.held_out == held_out


def test_two_objects_in_one_place_are_refused():
    item = Object(0, 0, 0, 0, 2)
    with pytest.raises(ValueError, match="distinct places"):
        Scene(0, (item, item))


def test_scenes_survive_json():
    random = np.random.default_rng(1)
    for count in (1, 2, 3):
        scene = draw_scene(random, count=count)
        assert Scene.from_json(scene.to_json()) == scene


def test_objects_and_cells_correspond():
    for index in range(1, number_of_objects() + 1):
        assert cell_index(object_of(index, 3)) == index
    assert object_of(0, 1) is None and cell_index(None) == 0


def test_no_two_objects_look_alike():
    flat = cells().reshape(len(cells()), len(world.BACKGROUNDS), -1).astype(np.float32)
    for background in range(len(world.BACKGROUNDS)):
        assert len(np.unique(flat[:, background], axis=0)) == number_of_objects() + 1


def test_the_oracle_reads_every_scene_back():
    scenes = list(all_scenes(True)) + list(all_scenes(False))[::7]
    assert right(render(scenes), scenes).all()


def test_the_oracle_reads_several_objects():
    random = np.random.default_rng(3)
    scenes = [draw_scene(random, bool(i % 2), count=count) for count in (2, 3) for i in range(150)]
    assert read(render(scenes)) == scenes


def test_the_oracle_reads_objects_that_touch():
    """Large squares in all places meet at the borders of their places."""
    items = [Object(1, colour, 1, texture, colour) for colour in range(4) for texture in (1,)]
    for background in range(4):
        scene = make_scene(background, items)
        assert read(render([scene])) == [scene]


def test_the_oracle_is_reliable_under_noise_and_blur():
    random = np.random.default_rng(0)
    scenes = [draw_scene(random, bool(i % 2), 1 + i % 3) for i in range(90)]
    shares = {name: right(images, scenes).mean() for name, images in corrupted(render(scenes), random)}
    assert shares["clean"] == shares["white noise, sd 0.8 of -1..1"] == 1.0
    assert shares["box blur of 3 pixels"] > 0.95
    assert shares["half resolution"] > 0.95


def test_scores_tell_the_attributes_apart():
    scene = Scene(0, (Object(0, 0, 0, 0, 0),))
    other = Scene(0, (Object(0, 1, 0, 0, 0),))
    result = score(render([scene, other]), [scene, scene])
    assert result["all"] == result["colour"] == 0.5
    assert result["shape"] == result["background"] == result["place"] == 1.0


def test_scores_need_as_many_images_as_scenes():
    with pytest.raises(ValueError, match="1 images and 0 scenes"):
        score(render([draw_scene(np.random.default_rng(0))]), [])
