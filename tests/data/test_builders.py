"""Writing prepared data sets: what is stored, what happens when a run is interrupted or given bad data."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.prepare.builders.run import prepare
from minigpt5_jax.data.prepare.builders.shards import Job
from minigpt5_jax.data.prepare.builders.units import Raw, encode_image
from minigpt5_jax.data.sources import PreparedSource
from minigpt5_jax.data.sources.kinds import make_rules

ROOT = Path(__file__).parents[2]
TEST = functools.partial(make_rules, training=False)


def draw(path: Path, seed: int, size=(12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)


def cc3m(folder: Path, rows: int = 7) -> Path:
    """A table with its images."""
    lines = ["caption\timage_path"]
    for row in range(rows):
        draw(folder / f"val/{row:09d}.jpg", row)
        lines.append(f"Picture number {row} .\tval/{row:09d}.jpg")
    table = folder / "cc3m_train.tsv"
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def make(table: Path, output: Path, **settings) -> Path:
    return prepare(Job.plan(Raw("cc3m", str(table)), output, **settings), show_progress=False)


def files(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_records_keep_words_and_bytes(tmp_path):
    table = cc3m(tmp_path / "raw")
    folder = make(table, tmp_path / "out", num_shards=3, split="validation")
    assert folder == tmp_path / "out/cc3m/validation/1.0.0"
    shards = sorted(path.name for path in folder.glob("*.array_record*"))
    assert shards == [f"cc3m-validation.array_record-{i:05d}-of-00003" for i in range(3)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cc3m"]
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]  # nothing else is left
    source = PreparedSource(folder, "validation")
    assert source.fields(4) == {
        "row": 4,
        "caption": "Picture number 4 .",  # as written
        "image_path": "val/000000004.jpg",
        "where": "cc3m_train.tsv:6",
    }
    assert source.images(4) == [(tmp_path / "raw/val/000000004.jpg").read_bytes()]


def test_other_tools_read_the_records_through_tfds(tmp_path):
    import tensorflow_datasets as tfds

    table = cc3m(tmp_path / "raw", rows=3)
    builder = tfds.builder_from_directory(make(table, tmp_path / "out", num_shards=2))
    records = builder.as_data_source("train")
    assert len(records) == builder.info.splits["train"].num_examples == 3
    assert records[1]["caption"] == b"Picture number 1 ."
    want = np.asarray(Image.open(tmp_path / "raw/val/000000001.jpg"))
    np.testing.assert_array_equal(records[1]["image"][0], want)


def test_unusable_units_are_left_out_counted_and_named(tmp_path):
    table = cc3m(tmp_path / "raw")
    (tmp_path / "raw/val/000000002.jpg").unlink()
    broken = tmp_path / "raw/val/000000005.jpg"
    broken.write_bytes(broken.read_bytes()[:150])
    text = table.read_text().replace("Picture number 6 .", " . ")
    table.write_text(text)
    folder = make(table, tmp_path / "out", error_budget=3)
    source = PreparedSource(folder)
    assert source.kept_units().tolist() == [0, 1, 3, 4]
    assert [source.fields(i)["row"] for i in range(4)] == [0, 1, 3, 4]
    skipped = {unit: (where, reason) for unit, where, reason in source.metadata["tally"]["skipped"]}
    assert skipped[2][0] == f"{table}:4, {tmp_path}/raw/val/000000002.jpg"
    assert "No such file" in skipped[2][1] and "broken" in skipped[5][1]
    assert skipped[6] == (f"{table}:8", "empty caption")


def test_a_null_character_in_a_path_is_an_image_that_cannot_be_read(tmp_path):
    table = cc3m(tmp_path / "raw")
    table.write_text(table.read_text().replace("val/000000002.jpg", "val/2\0.jpg"))
    folder = make(table, tmp_path / "out", error_budget=1, num_shards=None)  # sizes are looked at as well
    ((unit, _, reason),) = PreparedSource(folder).metadata["tally"]["skipped"]
    assert unit == 2 and "cannot be read" in reason and "null" in reason


def test_above_the_budget_nothing_is_finished(tmp_path):
    table = cc3m(tmp_path / "raw")
    (tmp_path / "raw/val/000000005.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 7 units.*allows 0(.|\n)*cc3m_train\.tsv:7, .*000000005\.jpg"):
        make(table, tmp_path / "out", num_shards=4)
    assert not (tmp_path / "out/cc3m/train/1.0.0").exists()
    with pytest.raises(DataError, match="was interrupted"):
        PreparedSource(tmp_path / "out")
    draw(tmp_path / "raw/val/000000005.jpg", 5)  # mended: the same command goes on
    folder = make(table, tmp_path / "out", num_shards=4)
    assert len(PreparedSource(folder, rules=TEST)) == 7


def test_a_part_is_made_again_when_what_it_left_out_can_be_read(tmp_path):
    table = cc3m(tmp_path / "raw")
    (tmp_path / "raw/val/000000000.jpg").unlink()
    (tmp_path / "raw/val/000000006.jpg").unlink()
    with pytest.raises(DataError, match="2 of 7"):
        make(table, tmp_path / "out", num_shards=4, error_budget=1)
    draw(tmp_path / "raw/val/000000000.jpg", 0)
    draw(tmp_path / "raw/val/000000006.jpg", 6)
    folder = make(table, tmp_path / "out", num_shards=4, error_budget=1)
    assert PreparedSource(folder).metadata["tally"]["skipped"] == []


SLOW = """
import sys, time
from pathlib import Path
from minigpt5_jax.data.prepare.builders import shards
from minigpt5_jax.data.prepare.builders.run import prepare

read = shards.encode_image
def slow(image, letterbox):
    time.sleep(0.15)
    return read(image, letterbox)
shards.encode_image = slow
prepare(shards.Job.plan(shards.Raw("cc3m", sys.argv[1]), sys.argv[2], num_shards=4), show_progress=False)
"""


def test_a_killed_run_continues_and_ends_as_an_uninterrupted_one(tmp_path):
    table = cc3m(tmp_path / "raw", rows=24)
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(table), str(tmp_path / "a")], cwd=ROOT)
    parts = tmp_path / "a/cc3m/train/parts"
    deadline = time.monotonic() + 60
    while not (parts / "00000.array_record").is_file():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (parts / "00003.array_record").is_file()
    first = (parts / "00000.array_record").stat()
    with pytest.raises(DataError, match="was interrupted; give the same command again"):
        PreparedSource(tmp_path / "a")
    continued = make(table, tmp_path / "a", num_shards=4)
    kept = (continued / "cc3m-train.array_record-00000-of-00004").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # not written again
    assert files(continued) == files(make(table, tmp_path / "b", num_shards=4))
    assert [path.name for path in continued.parent.iterdir()] == ["1.0.0"]


def test_two_runs_at_once_do_not_write_the_same_split(tmp_path):
    table = cc3m(tmp_path / "raw", rows=24)
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(table), str(tmp_path / "a")], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a/cc3m/train/parts/00000.array_record").is_file():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    try:
        with pytest.raises(DataError, match="is being prepared by another process"):
            make(table, tmp_path / "a", num_shards=4)
        make(table, tmp_path / "a", num_shards=2, split="test")  # another split may be
    finally:
        child.kill()
        child.wait()


def test_parts_of_other_data_are_not_continued(tmp_path):
    table = cc3m(tmp_path / "raw")
    (tmp_path / "raw/val/000000006.jpg").unlink()
    with pytest.raises(DataError):
        make(table, tmp_path / "out", num_shards=7)
    table.write_text("\n".join(table.read_text().splitlines()[:7]))  # the last row is gone
    folder = make(table, tmp_path / "out", num_shards=3)
    assert len(PreparedSource(folder, rules=TEST)) == 6


def test_a_finished_data_set_is_left_alone(tmp_path):
    table = cc3m(tmp_path / "raw")
    folder = make(table, tmp_path / "out")
    before = files(folder)
    (tmp_path / "raw/val/000000006.jpg").unlink()  # would be noticed if it were read again
    assert make(table, tmp_path / "out") == folder and files(folder) == before
    with pytest.raises(DataError, match=r"other data or settings \(letterbox None instead of 256\)"):
        make(table, tmp_path / "out", letterbox=256)
    draw(tmp_path / "raw/val/000000006.jpg", 6)
    make(table, tmp_path / "out", split="test")  # beside it
    assert len(PreparedSource(tmp_path / "out", "test", rules=TEST)) == 7


@pytest.mark.parametrize("place", ["out/notes.txt", "out/vist/train/1.0.0/x", "out/cc3m/val/1.jpg"])
def test_an_output_folder_with_something_else_is_refused(tmp_path, place):
    table = cc3m(tmp_path / "raw", rows=1)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(DataError, match=r"holds (notes\.txt|vist|val), which is not part of.*empty"):
        make(table, tmp_path / "out")
    assert (tmp_path / place).read_text() == "mine"


def test_settings_that_are_wrong(tmp_path):
    table = cc3m(tmp_path / "raw", rows=2)
    for settings, message in (
        ({"num_shards": 3}, r"num_shards must be 1 \.\.\. 2"),
        ({"error_budget": -1}, "a share below 1"),
        ({"error_budget": 1.5}, "or a count"),
    ):
        with pytest.raises(DataError, match=message):
            Job.plan(Raw("cc3m", str(table)), tmp_path / "out", **settings)
    with pytest.raises(DataError, match="unknown data set 'coco'"):
        Job.plan(Raw("coco", str(table)), tmp_path / "out")
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file"):
        make(table, tmp_path / "out")


def test_letterbox_keeps_the_whole_image_on_white(tmp_path):
    draw(tmp_path / "a.png", 0, size=(40, 10))
    Image.new("RGB", (40, 10), (10, 20, 30)).save(tmp_path / "a.png")
    stored = encode_image(str(tmp_path / "a.png"), letterbox=16)
    image = Image.open(io.BytesIO(stored.data))
    assert (stored.width, stored.height) == image.size == (16, 16) and image.format == "JPEG"
    pixels = np.asarray(image.convert("RGB")).astype(int)
    np.testing.assert_allclose(pixels[7:9, 2:14].reshape(-1, 3).mean(0), (10, 20, 30), atol=6)
    assert pixels[:4].min() > 245 and pixels[-4:].min() > 245  # 4 of 16 rows are the image
    square = tmp_path / "b.jpg"
    draw(square, 1, size=(16, 16))
    assert encode_image(str(square), letterbox=16).data == square.read_bytes()  # not encoded again
    with pytest.raises(SampleError, match=r"none\.jpg: image cannot be read"):
        encode_image(str(tmp_path / "none.jpg"))


def test_metadata_says_what_was_done(tmp_path):
    table = cc3m(tmp_path / "raw", rows=3)
    folder = make(table, tmp_path / "out")
    made = json.loads((folder / "metadata.json").read_text())["minigpt5"]
    sizes = [(tmp_path / f"raw/val/{i:09d}.jpg").stat().st_size for i in range(3)]
    assert (made["dataset"], made["split"], made["count"]) == ("cc3m", "train", 3)
    assert made["tally"]["bytes"] == sum(sizes) and made["tally"]["sizes"] == {"12x9": 3}


def test_more_than_ten_shards_of_unequal_length(tmp_path):
    """TFDS sorts lengths as text when Beam writes; ours are in the order of the shards either way."""
    table = cc3m(tmp_path / "raw", rows=23)
    folder = make(table, tmp_path / "out", num_shards=14)
    (split,) = json.loads((folder / "dataset_info.json").read_text())["splits"]
    assert [int(n) for n in split["shardLengths"]] == [23 * (i + 1) // 14 - 23 * i // 14 for i in range(14)]


def test_a_shard_may_be_written_again(tmp_path):
    """Beam repeats a shard whose worker failed after it was written."""
    from minigpt5_jax.data.prepare.builders.tfds_builders import PartsWriter, tfds

    job = Job.plan(Raw("cc3m", str(cc3m(tmp_path / "raw", rows=3))), tmp_path / "out")
    job.parts.mkdir(parents=True)
    target = tmp_path / "cc3m-train.array_record-00000-of-00001"
    for _ in range(2):
        records = ((key, b"") for key, _ in job.shard(0)())
        PartsWriter(tfds.core.FileFormat.ARRAY_RECORD, job.parts).write(target, records)
        assert target.samefile(job.parts / "00000.array_record")


@pytest.mark.slow
def test_beam_on_two_processes_writes_the_same_files(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[prepare]'")
    table = cc3m(tmp_path / "raw", rows=23)
    (tmp_path / "raw/val/000000004.jpg").unlink()
    here = make(table, tmp_path / "here", num_shards=14, error_budget=1)
    job = Job.plan(Raw("cc3m", str(table)), tmp_path / "beam", num_shards=14, error_budget=1)
    options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    there = prepare(job, beam_runner="DirectRunner", beam_options=options, show_progress=False)
    assert files(there) == files(here)
    assert [path.name for path in there.parent.iterdir()] == ["1.0.0"]
    with pytest.raises(DataError, match=r"1 of 23 units are unusable(.|\n)*000000004\.jpg"):
        job = Job.plan(Raw("cc3m", str(table)), tmp_path / "none", num_shards=3, error_budget=0)
        prepare(job, beam_runner="DirectRunner", beam_options=options, show_progress=False)
    assert not (tmp_path / "none/cc3m/train/1.0.0").exists()


def test_beam_that_is_not_installed_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    job = Job.plan(Raw("cc3m", str(cc3m(tmp_path / "raw", rows=1))), tmp_path / "out")
    with pytest.raises(DataError, match=r"needs Apache Beam: pip install 'minigpt5_jax\[prepare\]'"):
        prepare(job, beam_runner="DirectRunner", show_progress=False)
