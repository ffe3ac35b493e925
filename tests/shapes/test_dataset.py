"""Scenes, stories and dialogues on disk are CC3M, VIST and MMDialog files like any other."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource, MMDialogSource, VistSource
from minigpt5_jax.shapes import dataset
from minigpt5_jax.shapes.dataset import (
    SPLITS,
    draw_dialogs,
    draw_pairs,
    read_scenes,
    read_truth,
    scenes_of_images,
    write_dialogs,
    write_pairs,
    write_stories,
)
from minigpt5_jax.shapes.oracle import right
from minigpt5_jax.shapes.wording import WORDS


@pytest.fixture(scope="module", params=[(split, most) for split in SPLITS for most in (1, 3)], ids=str)
def written(tmp_path_factory, request):
    (split, most), folder = request.param, tmp_path_factory.mktemp("pairs")
    return split, folder, write_pairs(folder, split, 40, seed=3, max_objects=most)


def test_the_cc3m_reader_reads_them(written):
    split, folder, table = written
    source = Cc3mSource(table, rules=PairRules(training=False))
    scenes = read_scenes(folder, split)
    assert len(source) == len(scenes) == 40
    images = np.stack([np.asarray(Image.open(source[i].target_image)) for i in range(40)])
    assert right(images, scenes).all()


def test_splits_hold_only_their_own_scenes(written):
    split, folder, _ = written
    assert {scene.held_out for scene in read_scenes(folder, split)} == {split == "held_out"}


WRITERS = {"pairs": write_pairs, "stories": write_stories, "dialogs": write_dialogs}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_call_leaves_the_files_alone(write, tmp_path):
    table = write(tmp_path, "train", 5, seed=3)
    before = {path: path.stat().st_mtime_ns for path in (table, *tmp_path.rglob("*.[pj][np]g"))}
    assert len(before) > 5
    assert write(tmp_path, "train", 5, seed=3) == table
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stopped_call_goes_on_with_the_same_files(write, tmp_path):
    table = write(tmp_path / "a", "train", 5, seed=3)
    whole = files_of(tmp_path / "a")
    images = sorted(tmp_path.rglob("*.[pj][np]g"))
    table.unlink()
    images[1].unlink()
    kept = images[0].stat().st_mtime_ns
    write(tmp_path / "a", "train", 5, seed=3)
    assert files_of(tmp_path / "a") == whole
    assert images[0].stat().st_mtime_ns == kept


def test_more_of_the_same_keeps_what_is_there(write, tmp_path):
    write(tmp_path, "held_out", 4, seed=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.[pj][np]g")}
    write(tmp_path, "held_out", 6, seed=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.[pj][np]g")}
    assert before.items() < after.items()


def test_images_of_another_seed_are_not_taken_for_ours(tmp_path):
    for seed in (1, 2):
        write_stories(tmp_path, "train", 3, seed=seed)
    fresh = write_stories(tmp_path / "fresh", "train", 3, seed=2)
    ours = scenes_of_images(tmp_path, "train", "stories")
    images = np.stack([np.asarray(Image.open(path)) for path in ours])
    assert right(images, list(ours.values())).all()
    assert (tmp_path / fresh.name).read_bytes() == fresh.read_bytes()


def test_images_that_other_code_drew_are_drawn_again(write, tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(dataset, "_code", lambda: "former")
        write(tmp_path, "train", 3, seed=1)
        for path in (images := sorted(tmp_path.rglob("*.[pj][np]g"))):
            path.write_bytes(b"as it was drawn then")
    write(tmp_path, "train", 3, seed=1)
    write(tmp_path / "fresh", "train", 3, seed=1)
    fresh = sorted((tmp_path / "fresh").rglob("*.[pj][np]g"))
    assert [path.read_bytes() for path in images] == [path.read_bytes() for path in fresh]


def look_at(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("split", SPLITS)
def test_the_vist_reader_reads_stories(split, tmp_path):
    source = VistSource(write_stories(tmp_path, split, 3, seed=2))
    truth, scenes = read_truth(tmp_path, split, "stories"), scenes_of_images(tmp_path, split, "stories")
    assert len(source) == 3 * 13 and "unusable" not in source.describe()
    for example in (source[i] for i in range(len(source))):
        story, step = example.item_id.split("-")[0].split("_")
        told = truth[int(story)]["steps"][int(step)]
        assert told["text"] in example.source + example.target
        images = [*example.images, *([example.target_image] if example.target_image else [])]
        assert right(np.stack([look_at(p) for p in images]), [scenes[str(p)] for p in images]).all()
        if example.target_image:
            assert scenes[str(example.target_image)].to_json() == told["scene"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_mmdialog_reader_reads_dialogues(split, tmp_path):
    path = write_dialogs(tmp_path, split, 10, seed=2)
    source = MMDialogSource(path, count_tokens=lambda text: len(text.replace(",", " ,").split()) + 2)
    truth, scenes = read_truth(tmp_path, split, "dialogs"), scenes_of_images(tmp_path, split, "dialogs")
    assert len(source) == sum(len(dialog["turns"]) - 1 for dialog in truth)
    assert not source.counts
    for example in (source[i] for i in range(len(source))):
        dialog, turn = example.item_id.split("-")[0].split("_")
        told = truth[int(dialog)]["turns"][int(turn)]
        assert (example.target_image is not None) == told["wants_image"]
        images = [*example.images, *([example.target_image] if example.target_image else [])]
        if images:
            assert right(np.stack([look_at(p) for p in images]), [scenes[str(p)] for p in images]).all()


def test_wishes_leave_attributes_open_and_get_an_image_that_has_the_others():
    plain = draw_dialogs("train", 30, seed=1)
    assert plain == draw_dialogs("train", 30, seed=1, wishes=0.0)
    short = 0
    for asked, answered, *_ in draw_dialogs("train", 30, seed=1, wishes=1.0):
        [item] = answered.scene.objects
        words = re.search(r"\ba (.*?)(?: in the (.*?))?[.?]$", asked.text)
        place, said = words[2], words[1].split()
        known = {name: WORDS.get(value, (value,)) for name, value in item.names.items()}
        assert place is None or place in known["place"]
        assert said[-1] in known["shape"] and "background" not in asked.text
        for word in said[:-1]:
            assert any(word in known[name] for name in ("size", "texture", "colour"))
        short += len(said) < 4
    assert short > 15


def test_another_seed_gives_another_table(write, tmp_path):
    one, other = (write(tmp_path / str(seed), "train", 5, seed=seed) for seed in (3, 4))
    assert one.read_text() != other.read_text()


def test_every_scene_comes_once_before_any_comes_twice():
    numbers, _, captions = draw_pairs("held_out", 640, seed=0)
    assert sorted(numbers[:320]) == sorted(numbers[320:]) == list(range(320))
    assert len(captions) == 640


def test_one_image_serves_all_captions_of_its_scene(tmp_path):
    write_pairs(tmp_path, "held_out", 700, seed=0)
    assert len(list((tmp_path / "held_out").glob("*.png"))) == 320


@pytest.mark.parametrize("split, count, message", [("test", 1, "unknown split"), ("train", 0, "count=0")])
def test_what_cannot_be_drawn_is_refused(write, tmp_path, split, count, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, split, count, seed=0)


def test_scenes_of_foreign_tables_are_missed_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="shapes_train_scenes"):
        read_scenes(tmp_path, "train")
