"""Scenes on disk are CC3M files like any other."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.sources import Cc3mSource
from minigpt5_jax.shapes.dataset import draw_pairs, read_scenes, write_pairs
from minigpt5_jax.shapes.oracle import right


@pytest.fixture(scope="module", params=["train", "held_out"])
def written(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("pairs")
    return request.param, folder, write_pairs(folder, request.param, 40, seed=3)


def test_the_cc3m_reader_reads_them(written):
    split, folder, table = written
    source = Cc3mSource(table, training=False)
    scenes = read_scenes(folder, split)
    assert len(source) == len(scenes) == 40
    pictures = np.stack([np.asarray(Image.open(source[i].target_image)) for i in range(40)])
    assert right(pictures, scenes).all()


def test_splits_hold_only_their_own_scenes(written):
    split, folder, _ = written
    assert {scene.held_out for scene in read_scenes(folder, split)} == {split == "held_out"}


def test_the_same_call_leaves_the_files_alone(written):
    split, folder, table = written
    before = table.stat().st_mtime_ns
    assert write_pairs(folder, split, 40, seed=3) == table
    assert table.stat().st_mtime_ns == before


def test_another_seed_gives_another_table(written, tmp_path):
    split, _, table = written
    assert write_pairs(tmp_path, split, 40, seed=4).read_text() != table.read_text()


def test_every_scene_comes_once_before_any_comes_twice():
    numbers, _, captions = draw_pairs("held_out", 640, seed=0)
    assert sorted(numbers[:320]) == sorted(numbers[320:]) == list(range(320))
    assert len(captions) == 640


def test_one_picture_serves_all_captions_of_its_scene(tmp_path):
    write_pairs(tmp_path, "held_out", 700, seed=0)
    assert len(list((tmp_path / "held_out").glob("*.png"))) == 320


@pytest.mark.parametrize("split, count, message", [("test", 1, "unknown split"), ("train", 0, "count=0")])
def test_what_cannot_be_drawn_is_refused(tmp_path, split, count, message):
    with pytest.raises(ValueError, match=message):
        write_pairs(tmp_path, split, count, seed=0)


def test_scenes_of_foreign_tables_are_missed_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="shapes_train_scenes"):
        read_scenes(tmp_path, "train")
