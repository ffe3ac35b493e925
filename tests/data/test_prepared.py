"""Prepared data sets give the samples of the raw files, without TensorFlow and in worker processes."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.prepare.builders.run import prepare
from minigpt5_jax.data.prepare.builders.shards import Job
from minigpt5_jax.data.prepare.builders.units import Raw
from minigpt5_jax.data.prepare.report import summary
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.records import RecordRules
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import (
    Cc3mSource,
    Cc3mTarSource,
    JsonlSource,
    MMDialogSource,
    PreparedSource,
    Source,
    VistSource,
)
from minigpt5_jax.data.sources.kinds import make_rules

ROOT = Path(__file__).parents[2]
CC3M = {"instruction_every": 3, "seed": 5}


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(noise).save(path)


def write_cc3m(folder: Path, rows: int = 8) -> Path:
    lines = ["caption\timage_path"]
    for row in range(rows):
        draw(folder / f"val/{row}.jpg", row)
        lines.append(f"Picture №{row} !\tval/{row}.jpg")
    path = folder / "cc3m_val.tsv"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    return path


def write_vist(folder: Path) -> Path:
    """Stories of five, one and six steps; images are shared between stories."""
    stories, mapping = {}, {}
    for name, steps in {"40470": 5, "7": 1, "8": 6}.items():
        stories[name] = [
            {"caption": f"they saw {name} {k} .", "image_id": str(900 + k), "sequence_index": k}
            for k in range(steps)
        ]
    for k in range(6):
        mapping[str(900 + k)] = f"val_images/{k}.jpg"
        draw(folder / f"val_images/{k}.jpg", k)
    path = folder / "val_cleaned.json"
    path.write_text(json.dumps(stories), encoding="utf-8")
    (folder / "val_image_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return path


def turn(text: str, *media: int) -> dict:
    return {"turn": [{"__TEXT__": text}, *({"__MEDIA__": str(name)} for name in media)]}


def write_mmdialog(folder: Path) -> Path:
    """Dialogues with one image, with two in a turn, with a missing and with a broken one, and an empty
    turn; image 33 is missing."""
    for name in (-11, 22, 44, 55):
        draw(folder / f"{name}.jpg", abs(name))
    (folder / "55.jpg").write_bytes((folder / "55.jpg").read_bytes()[:200])
    talks = [
        [turn("hello :wave:", -11), turn("a nice cat"), turn("thanks"), turn("here is one more", 22)],
        [turn("look", 22, 44), turn("two of them"), turn("one two three four five six")],
        [turn("first", 44), turn("second", 22), turn("third", 33), turn("fourth", -11)],
        [turn("a"), turn("b"), turn("")],
        [turn("alone")],
    ]
    lines = [{"conversation_id": i, "conversation": talk, "more": 1} for i, talk in enumerate(talks)]
    path = folder / "train_conversations.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def prepared(raw: Raw, output: Path, **settings) -> Path:
    return prepare(Job.plan(raw, output, **settings), show_progress=False)


def as_bytes(example: Example) -> Example:
    """With images as bytes, and without the folder of the place."""
    read = lambda image: Path(image).read_bytes() if isinstance(image, str) else image  # noqa: E731
    target = None if example.target_image is None else read(example.target_image)
    return dataclasses.replace(
        example, images=tuple(map(read, example.images)), target_image=target, where=Path(example.where).name
    )


def open_prepared(folder: Path, count_tokens=None, **settings) -> PreparedSource:
    return PreparedSource(folder, rules=functools.partial(make_rules, **settings), count_tokens=count_tokens)


def same_samples(stored: Source, raw: Source, epochs: int = 2) -> None:
    assert isinstance(stored, PreparedSource) and isinstance(stored, Source)
    assert len(stored) == len(raw) > 0
    for index in range(len(raw)):
        for epoch in range(epochs):
            assert as_bytes(stored.example(index, epoch)) == as_bytes(raw.example(index, epoch))
        assert stored.texts(index) == raw.texts(index)


@pytest.mark.parametrize(
    "settings",
    [
        CC3M,
        {"training": False},
        {**CC3M, "resample_prompts": False, "prompt_set": "release", "num_vokens": 4},
    ],
)
def test_pairs(tmp_path, settings):
    table = write_cc3m(tmp_path / "raw")
    folder = prepared(Raw("cc3m", str(table)), tmp_path / "out", num_shards=3)
    same_samples(open_prepared(folder, **settings), Cc3mSource(table, rules=PairRules(**settings)))


def test_pairs_of_which_some_are_left_out_keep_their_numbers(tmp_path):
    table = write_cc3m(tmp_path / "raw")
    folder = tmp_path / "raw/val"
    (folder / "3.jpg").unlink()  # a row with an instruction sample
    (folder / "7.jpg").write_bytes(b"")
    out = prepared(Raw("cc3m", str(table)), tmp_path / "out", num_shards=4, error_budget=2)
    stored, raw = open_prepared(out, **CC3M), Cc3mSource(table, rules=PairRules(**CC3M))
    by_name = {raw[index].item_id: index for index in range(len(raw))}
    names = [stored[index].item_id for index in range(len(stored))]
    gone = {"cc3m_3", "cc3m_3_instruction", "cc3m_7"}
    assert names == [name for name in by_name if name not in gone]
    for index, name in enumerate(names):
        assert as_bytes(stored.example(index, 1)) == as_bytes(raw.example(by_name[name], 1))


def test_pairs_from_tar_shards(tmp_path):
    import tarfile

    table = write_cc3m(tmp_path / "raw", rows=4)
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"tars/0000{shard}.tar", "w") as tar:
            for row in (2 * shard, 2 * shard + 1):
                (tmp_path / "caption").write_text(f"Picture №{row} !", encoding="utf-8")
                tar.add(tmp_path / f"raw/val/{row}.jpg", f"{row:09d}.jpg")
                tar.add(tmp_path / "caption", f"{row:09d}.txt")
    folder = prepared(Raw("cc3m", str(tmp_path / "tars")), tmp_path / "out")
    stored = open_prepared(folder, **CC3M)
    same_samples(stored, Cc3mTarSource(tmp_path / "tars", rules=PairRules(**CC3M)))
    table_source = Cc3mSource(table, rules=PairRules(**CC3M))
    assert [stored.texts(i) for i in range(5)] == [table_source.texts(i) for i in range(5)]


@pytest.mark.parametrize(
    "settings, count",
    [
        ({"seed": 3}, 13 + 1 + 16),
        ({"training": False}, 5 + 1 + 6),
        ({"tasks": ("understanding",), "prompt_set": "release", "num_vokens": 2}, 4 + 0 + 5),
        ({"tasks": ("gen",), "context_dropout": 1.0}, 5 + 1 + 6),
    ],
)
def test_stories(tmp_path, settings, count):
    stories = write_vist(tmp_path / "raw")
    folder = prepared(Raw("vist", str(stories)), tmp_path / "out", num_shards=2)
    stored = open_prepared(folder, **settings)
    assert len(stored) == count
    same_samples(stored, VistSource(stories, rules=StoryRules(**settings)))


def test_a_story_with_a_missing_image_is_left_out(tmp_path):
    stories = write_vist(tmp_path / "raw")
    (tmp_path / "raw/val_images/5.jpg").unlink()  # of the story of six
    folder = prepared(Raw("vist", str(stories)), tmp_path / "out", error_budget=1)
    stored = PreparedSource(folder)
    assert len(stored) == 13 + 1
    ((unit, where, reason),) = stored.metadata["tally"]["skipped"]
    assert unit == 2 and where.endswith("story 8, " + str(tmp_path / "raw/val_images/5.jpg"))
    assert "No such file" in reason


def test_stories_with_the_mapping_elsewhere(tmp_path):
    stories = write_vist(tmp_path / "raw")
    mapping = (tmp_path / "raw/val_image_mapping.json").rename(tmp_path / "paths.json")
    raw = Raw("vist", str(stories), str(tmp_path / "raw"), str(mapping))
    assert len(open_prepared(prepared(raw, tmp_path / "out"), training=False)) == 12
    with pytest.raises(DataError, match="cc3m has no mapping"):
        Raw("cc3m", str(stories), None, str(mapping)).open()


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    "settings",
    [
        {"training": False},
        {"training": False, "loader": "release", "num_vokens": 3},
        {"max_tokens": 5},
        {"loader": "release", "max_words": 3, "bad_media_ids": (22,)},
    ],
)
def test_dialogues(tmp_path, settings):
    talks = write_mmdialog(tmp_path / "raw")
    folder = prepared(Raw("mmdialog", str(talks)), tmp_path / "out", num_shards=2)
    stored = open_prepared(folder, count_tokens=words, **settings)
    raw = MMDialogSource(talks, rules=DialogRules(**settings), count_tokens=words)
    same_samples(stored, raw)
    for kind, count in raw.counts.items():
        assert f"{count:,} {kind}" in stored.describe()
    ((unit, where, reason),) = stored.metadata["tally"]["cut"]  # image 33; the dialogue ends there
    assert unit == 2 and where.endswith(f"jsonl:3, {tmp_path / 'raw/33.jpg'}") and "No such file" in reason


def test_a_dialogue_ends_before_a_broken_image(tmp_path):
    path = tmp_path / "raw/talk.jsonl"
    write_mmdialog(tmp_path / "raw")
    talk = [turn("a"), turn("b", 22), turn("c", 55), turn("d", 44)]
    path.write_text(json.dumps({"conversation_id": 9, "conversation": talk}))
    stored = open_prepared(prepared(Raw("mmdialog", str(path)), tmp_path / "out"), training=False)
    assert [stored[index].item_id for index in range(len(stored))] == ["9_1-mm"]
    assert stored[0].target_image == (tmp_path / "raw/22.jpg").read_bytes()
    ((_, where, reason),) = stored.metadata["tally"]["cut"]
    assert where.endswith("55.jpg") and "broken" in reason
    assert [turn["picture"] for turn in stored.fields(0)["turns"]] == [-1, 0, -1, 1]


def test_dialogues_need_a_tokenizer_in_training(tmp_path):
    talks = write_mmdialog(tmp_path / "raw")
    folder = prepared(Raw("mmdialog", str(talks)), tmp_path / "out")
    with pytest.raises(DataError, match="give count_tokens="):
        PreparedSource(folder)


def test_lines_of_ones_own(tmp_path):
    for name in "abc":
        draw(tmp_path / f"raw/photos/{name}.jpg", ord(name))
    image = lambda name, **more: {"type": "image", "path": f"photos/{name}.jpg", **more}  # noqa: E731
    story = [
        {"role": "user", "content": [image("a"), {"type": "text", "text": "And then?"}, image("b")]},
        {"role": "assistant", "content": [{"type": "text", "text": "A lake."}, image("a", caption="lake")]},
        {"role": "user", "content": "Nice \U0001f600."},
        {"role": "assistant", "content": "Yes."},
    ]
    lines = [
        {"caption": "A fox!", "image": "photos/c.jpg"},
        {"turns": story},
        {"id": "x", "turns": story[2:]},
    ]
    path = tmp_path / "raw/own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    folder = prepared(Raw("jsonl", str(path)), tmp_path / "out", num_shards=2)
    same_samples(open_prepared(folder, num_vokens=4), JsonlSource(path, rules=RecordRules(num_vokens=4)))
    path.write_text(path.read_text() + '\n{"id": "x", "caption": "b", "image": "a"}')
    with pytest.raises(SampleError, match="id 'x' was used in line 3"):
        JsonlSource(path, rules=RecordRules(num_vokens=4)).record(3)


def test_the_folder_of_the_raw_files_leaves_no_trace(tmp_path):
    for name in "ab":
        write_vist(tmp_path / name)
        prepared(Raw("vist", str(tmp_path / name / "val_cleaned.json")), tmp_path / f"out_{name}")
    first, second = (PreparedSource(tmp_path / f"out_{name}") for name in "ab")
    assert first.fingerprint() == second.fingerprint() and first[3] == second[3]
    assert first[0].where == "val_cleaned.json: story 40470"


def test_image_fingerprint_is_that_of_the_images(tmp_path):
    folder = prepared(Raw("vist", str(write_vist(tmp_path / "raw"))), tmp_path / "out")
    prints = [
        open_prepared(folder, **settings).image_fingerprint()
        for settings in ({}, {"seed": 1, "prompt_set": "release"}, {"training": False}, {"tasks": ("gen",)})
    ]
    assert prints[0] == prints[1] != prints[2] == prints[3]


def test_a_preparation_of_an_earlier_version_is_reported(tmp_path):
    folder = prepared(Raw("vist", str(write_vist(tmp_path / "raw"))), tmp_path / "out")
    now, file = PreparedSource(folder).metadata, folder / "metadata.json"
    file.write_text(file.read_text().replace('"images"', '"pictures"'))
    then = PreparedSource(folder)
    assert then.metadata == now and summary(then, None, 32)["images"] == now["tally"]["images"] > 0


def test_fingerprint_follows_content_and_settings(tmp_path):
    table = write_cc3m(tmp_path / "raw")
    first = PreparedSource(prepared(Raw("cc3m", str(table)), tmp_path / "a", num_shards=1))
    again = PreparedSource(prepared(Raw("cc3m", str(table)), tmp_path / "b", num_shards=4))
    assert first.fingerprint() == again.fingerprint()  # how many files there are changes no sample
    others = [
        open_prepared(tmp_path / "a", **kw) for kw in ({"training": False}, {"seed": 1}, {"num_vokens": 4})
    ]
    table.write_text(table.read_text().replace("№3", "3"))
    others.append(PreparedSource(prepared(Raw("cc3m", str(table)), tmp_path / "c")))
    assert len({source.fingerprint() for source in (first, *others)}) == 5


WRITE = """
import sys
from minigpt5_jax.data.prepare.builders.run import prepare
from minigpt5_jax.data.prepare.builders.shards import Job
from minigpt5_jax.data.prepare.builders.units import Raw
for dataset, path in zip(sys.argv[2::2], sys.argv[3::2]):
    prepare(Job.plan(Raw(dataset, path), f"{sys.argv[1]}/{dataset}"), show_progress=False)
print(sorted({"tensorflow", "torch", "apache_beam"} & set(sys.modules)))
"""


def test_writing_imports_no_tensorflow_either(tmp_path):
    files = {"cc3m": write_cc3m, "vist": write_vist, "mmdialog": write_mmdialog}
    arguments = [str(x) for name, write in files.items() for x in (name, write(tmp_path / f"raw_{name}"))]
    command = [sys.executable, "-c", WRITE, str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


CODE = """
import sys
from minigpt5_jax.data.sources import PreparedSource
source = PreparedSource(sys.argv[1])
print(len(source), source[0].item_id, len(source[0].target_image), len(source.texts(1)))
print(sorted({"tensorflow", "torch", "apache_beam", "jax"} & set(sys.modules)))
"""


def test_reading_imports_no_tensorflow(tmp_path):
    folder = prepared(Raw("cc3m", str(write_cc3m(tmp_path / "raw"))), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "raw/val/0.jpg").stat().st_size
    assert done.stdout.splitlines()[0] == f"9 cc3m_0 {size} 7"
    assert "tensorflow" not in done.stdout.splitlines()[1]


def read_all(source: PreparedSource) -> list[Example]:
    return [source[index] for index in range(len(source))]


def test_workers_open_the_files_themselves(tmp_path):
    folder = prepared(Raw("vist", str(write_vist(tmp_path / "raw"))), tmp_path / "out", num_shards=3)
    source = PreparedSource(folder)
    want = read_all(source)  # its files are open now
    assert len(pickle.dumps(source)) < 20_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (source,)) == want


def test_a_record_is_read_once_for_its_samples(tmp_path, monkeypatch):
    folder = prepared(Raw("vist", str(write_vist(tmp_path / "raw"))), tmp_path / "out")
    source, reads = PreparedSource(folder), []
    real = source._read
    monkeypatch.setattr(source, "_read", lambda record: reads.append(record) or real(record))
    for index in range(len(source)):
        source.texts(index)
    assert reads == []
    read_all(source)
    assert reads == [0, 1, 2]


def test_folders_that_hold_no_prepared_data(tmp_path):
    with pytest.raises(DataError, match="not found"):
        PreparedSource(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no prepared split train; python -m minigpt5_jax\.prepare"):
        PreparedSource(tmp_path, "train")
    table = write_cc3m(tmp_path / "raw", rows=2)
    for split in ("train", "test"):
        folder = prepared(Raw("cc3m", str(table)), tmp_path / "out", split=split)
    with pytest.raises(DataError, match=r"no prepared split validation \(but test, train\)"):
        PreparedSource(tmp_path / "out", "validation")
    with pytest.raises(DataError, match="several data sets"):
        PreparedSource(tmp_path / "out")
    assert PreparedSource(folder).split == "test" == PreparedSource(tmp_path / "out/cc3m", "test").split


def test_files_that_were_lost_or_broken_later(tmp_path):
    folder = prepared(Raw("cc3m", str(write_cc3m(tmp_path / "raw"))), tmp_path / "out", num_shards=2)
    shard = folder / "cc3m-train.array_record-00001-of-00002"
    whole = shard.read_bytes()
    half = len(whole) // 2
    for broken in (whole[:40], whole[:half], b"\0" * len(whole)):
        shard.write_bytes(broken)
        source = open_prepared(folder, training=False)
        assert source[0].item_id == "cc3m_0"
        with pytest.raises(SampleError, match=r"record 4: cannot be read"):
            source[4]
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks cc3m-train\.array_record-00001-of-00002; copy it again"):
        PreparedSource(folder)
    shard.write_bytes(whole)
    units = folder / "units.jsonl"
    lines = units.read_text(encoding="utf-8").splitlines(keepends=True)
    units.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match="another number of records than units"):
        PreparedSource(folder)
    (folder / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"metadata\.json is broken"):
        PreparedSource(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="holds no prepared split"):
        PreparedSource(tmp_path / "out")
