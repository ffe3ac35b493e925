"""VIST's two files: samples, and what is said about stories that are wrong."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.lengths import measure
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.prepare.check import check
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import Source, VistSource
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer


def steps(story, count=5, start=0):
    return [
        {"caption": f"step {n} of {story} .", "image_id": f"{story}{n}", "sequence_index": n}
        for n in range(start, start + count)
    ]


def write(folder, stories, mapping=None, name="val_cleaned.json"):
    """The two files; every image that a story names is in the mapping, unless one is given."""
    if mapping is None:
        ids = [s["image_id"] for story in stories.values() for s in story]
        mapping = {i: f"val_images/{n:09d}.jpg" for n, i in enumerate(ids)}
    (folder / name).write_text(json.dumps(stories, indent=1))
    (folder / name.replace("cleaned", "image_mapping")).write_text(json.dumps(mapping))
    return folder / name


def ids(source):
    return [source[i].item_id for i in range(len(source))]


def test_samples(tmp_path):
    path = write(tmp_path, {"7": steps(7), "12": steps(12, 2)})
    training, test = VistSource(path), VistSource(path, rules=StoryRules(training=False))
    test = pickle.loads(pickle.dumps(test))
    assert isinstance(training, Source) and (len(training), len(test)) == (13 + 4, 5 + 2)
    assert ids(test) == ["7_0-gen", "7_1-gen", "7_2-gen", "7_3-gen", "7_4-gen", "12_0-gen", "12_1-gen"]
    assert ids(training)[11:] == [
        "7_4-multimodal",
        "7_4-understanding",
        "12_0-gen",
        "12_1-gen",
        "12_1-multimodal",
        "12_1-understanding",
    ]
    last = training[16]
    images = [str(tmp_path / f"val_images/{n:09d}.jpg") for n in (5, 6)]
    assert last.images == tuple(images) and last.target_image is None
    assert last.target == "step 1 of 12 . ###" and last.where == f"{path}: story 12"
    assert test[6].images == (images[0],) and test[6].target_image == images[1]
    assert "17 samples of 2 stories" in training.describe() and "1 with more or fewer" in training.describe()
    assert training.story(1).id == "12" and training.rows == 2
    for bad in (-1, 17):
        with pytest.raises(IndexError):
            training[bad]


def test_tasks_and_wordings(tmp_path):
    path = write(tmp_path, {"7": steps(7)})
    asked = VistSource(path, rules=StoryRules(training=False, tasks=("gen", "understanding")))
    assert len(asked) == 9 and "VIST (gen, understanding)" in asked.describe()
    source = VistSource(path, rules=StoryRules(prompt_set="release"))
    texts = source.texts(1)
    assert [("Generate a image" in words, answer[:6]) for words, answer in texts] == [
        (True, "[IMG0]"),
        (False, "[IMG0]"),
    ]
    assert {source.example(1, epoch).source for epoch in range(20)} == {words for words, _ in texts}
    for bad in ({"prompt_set": "new"}, {"tasks": ("draw",)}):
        with pytest.raises(DataError, match="new|draw"):
            VistSource(path, rules=StoryRules(**bad))


def test_files_by_name(tmp_path):
    path = write(tmp_path, {"7": steps(7)}, name="my_cleaned_stories.json")
    other = tmp_path / "stories.json"
    path.rename(other)
    with pytest.raises(DataError, match=r"stories\.json has no 'cleaned' in its name.*give mapping="):
        VistSource(other)
    mapping = tmp_path / "my_image_mapping_stories.json"
    (tmp_path / "there").mkdir()
    got = VistSource(other, mapping, tmp_path / "there", rules=StoryRules(training=False))[0]
    assert got.target_image == str(tmp_path / "there/val_images/000000000.jpg")
    with pytest.raises(DataError, match="image folder not found"):
        VistSource(other, mapping, tmp_path / "nowhere")
    mapping.unlink()
    with pytest.raises(DataError, match=r"file of image paths not found: .*image_mapping"):
        VistSource(other, mapping)
    with pytest.raises(DataError, match="file of stories not found"):
        VistSource(tmp_path / "none_cleaned.json")


def test_fingerprint(tmp_path):
    stories = {"7": steps(7), "8": steps(8)}
    path = write(tmp_path, stories)
    settings = [{}, {"training": False}, {"prompt_set": "release"}, {"seed": 1}, {"num_vokens": 4}]
    settings.append({"context_dropout": 0.2})
    assert StoryRules().settings() == dataclasses.astuple(StoryRules())[:-1], "runs of before go on"
    prints = [VistSource(path, rules=StoryRules(**one)).fingerprint() for one in settings]
    assert len(set(prints)) == len(settings) and VistSource(path).fingerprint() == prints[0]
    images = [VistSource(path, rules=StoryRules(**one)).image_fingerprint() for one in settings]
    assert images[0] == images[2] == images[3] == images[4] != images[1], "a test has the first task alone"
    write(tmp_path, {"7": steps(7)}, mapping=json.loads((tmp_path / "val_image_mapping.json").read_text()))
    assert VistSource(path).image_fingerprint() not in images
    shrunk = VistSource(path).fingerprint()
    assert shrunk not in prints
    (tmp_path / "val_image_mapping.json").write_text('{"70": "a", "71": "b"}')
    assert VistSource(path).fingerprint() not in {shrunk, *prints}


def test_a_byte_order_mark_is_read_by_all(tmp_path):
    path = write(tmp_path, {"7": steps(7)})
    for file in tmp_path.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(VistSource(path)) == check(path).doubtful == 13


def test_vist_as_published(tmp_path):
    def annotation(story, photo, order):
        names = {"story_id": story, "photo_flickr_id": photo, "worker_arranged_photo_order": order}
        return [{"original_text": "A day.", "text": f"day {order} .", "album_id": "1", **names}]

    path, images = tmp_path / "train.story-in-sequence.json", tmp_path / "train"
    images.mkdir()
    for name in ("11.jpg", "12.png"):
        Image.new("RGB", (8, 8)).save(images / name)
    told = [annotation("30", "12", 1), annotation("30", "11", 0), annotation("31", "13", 0)]
    path.write_text(json.dumps({"info": {}, "images": [{"id": "11"}], "annotations": told}))
    source = VistSource(path, image_root=images, rules=StoryRules(training=False))
    assert ids(source) == ["30_0-gen", "30_1-gen", "31_0-gen"] and "day 1 ." in source[1].source
    assert (source[1].images, source[1].target_image) == ((f"{images}/11.jpg",), f"{images}/12.png")
    found = check(path, image_root=images)
    assert (found.entries, found.samples, found.doubtful) == (2, 4, 1)
    assert ["13.jpg: image cannot be read" in problem.reason for problem in found.problems] == [True]
    path.write_text(json.dumps({"annotations": [[{"text": "a"}]]}))
    with pytest.raises(DataError, match=r"annotations\[0\]: lacks story_id"):
        VistSource(path, image_root=images)


# ------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, r"val_cleaned\.json is no valid JSON .*recursion"),
        ('{"7": [{"caption": "a", "ima', r"val_cleaned\.json is no valid JSON .*is the file cut off"),
        (b'{"7": "\xff"}', r"val_cleaned\.json:1 is not UTF-8 .byte 0xff"),
        ("", "no valid JSON"),
        ("{}", "no stories in"),
        ("[1]", "expected one object of stories, found list"),
        ('{"7": [], "8": [], "7": []}', "key '7' occurs twice"),
        ('{"7": [{"caption": "a", "caption": "b"}]}', "key 'caption' occurs twice"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(tmp_path, content, message):
    path = write(tmp_path, {})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"(?s){message}"):
        VistSource(path)


def test_a_mapping_that_is_wrong_as_a_whole(tmp_path):
    path = write(tmp_path, {"7": steps(7)})
    mapping = tmp_path / "val_image_mapping.json"
    whole = mapping.read_text()
    for text, message in ((whole[:40], "no valid JSON"), ('{"a": "x", "a": "x"}', "key 'a' occurs twice")):
        mapping.write_text(text)
        with pytest.raises(DataError, match=f"val_image_mapping.*{message}"):
            VistSource(path)


def changed(n, **values):
    return [{**step, **values} if step["sequence_index"] == n else step for step in steps(7)]


def without(key):
    return [{k: v for k, v in step.items() if k != key} for step in steps(7)]


BROKEN = [
    ([], "no steps"),
    ({"0": steps(7)[0]}, "expected a list, found dict"),
    ("text", "expected a list, found str"),
    ([steps(7)[0], 5], "step 1: expected an object, found int"),
    (without("image_id"), "step 0: lacks image_id"),
    (changed(3, image_id="nobody"), "step 3.image_id: image nobody is not in the mapping"),
    (changed(3, image_id=71), "step 3.image_id: expected text, found int"),
    (changed(2, caption=None), "step 2.caption: expected text, found NoneType"),
    (changed(2, caption=" "), "step 2.caption: text is empty"),
    (changed(2, caption="see [IMG0]"), r"step 2.caption: text contains \[IMG0\]"),
    (changed(2, caption="an <ImageHere> ."), "step 2.caption: text contains <ImageHere>"),
    (changed(2, caption="half a pair \ud83d"), "step 2.caption: text is no Unicode at character 12"),
    (changed(4, caption="a ###Human: b"), "step 4.caption: text contains ###"),
    (changed(4, sequence_index="4"), "step 4.sequence_index: expected a whole number, found str"),
    (changed(4, sequence_index=True), "step 4.sequence_index: expected a whole number, found bool"),
    (changed(4, sequence_index=3), r"sequence_index: must rise from step to step, found \[0, 1, 2, 3, 3\]"),
    (steps(7)[::-1], r"sequence_index: must rise from step to step, found \[4, 3, 2, 1, 0\]"),
]


@pytest.mark.parametrize("story, reason", BROKEN)
def test_a_story_that_is_wrong_is_one_sample_that_cannot_be_fetched(tmp_path, story, reason):
    good = steps("g", 2)
    paths = {step["image_id"]: "a.jpg" for step in good + steps(7)}
    path = write(tmp_path, {"1": good, "7": story, "9": good}, paths)
    source = VistSource(path)
    assert len(source) == 4 + 1 + 4 and "3 stories" in source.describe() and "1 unusable" in source.describe()
    assert source[3].item_id == "1_1-understanding" and source[5].item_id == "9_0-gen"
    for call in (source.example, source.texts, pickle.loads(pickle.dumps(source)).example):
        with pytest.raises(SampleError, match=reason) as caught:
            call(4)
        assert caught.value.where == f"{path}: story 7"


def test_a_name_that_is_no_text(tmp_path):
    with pytest.raises(SampleError, match=r"story 7\\ud83d: id: text is no Unicode at character 1"):
        VistSource(write(tmp_path, {"7\ud83d": steps(7)}))[0]


def test_a_path_that_is_no_path(tmp_path):
    paths = {step["image_id"]: "a.jpg" for step in steps(7)} | {"72": 5}
    with pytest.raises(SampleError, match="step 2, path of image 72: expected text, found int"):
        VistSource(write(tmp_path, {"7": steps(7)}, paths))[0]


@pytest.mark.parametrize("count, samples", [(1, 1), (5, 13), (6, 16)])
def test_stories_of_any_length(tmp_path, count, samples):
    source = VistSource(write(tmp_path, {"7": steps(7, count)}))
    assert len(source) == samples and ("with more or fewer than 5" in source.describe()) == (count != 5)


def test_keys_that_are_not_read_do_not_matter(tmp_path):
    source = VistSource(write(tmp_path, {"7": [{**step, "album": "x"} for step in steps(7)]}))
    assert len(source) == 13


def test_samples_that_need_a_lost_image_are_left_out_and_named(tmp_path, oracle_dir):
    """From the files to batches: of the 13 samples, those that look at the lost image are counted."""
    path = write(tmp_path, {"7": steps(7)})
    (tmp_path / "val_images").mkdir()
    for n in (0, 1, 2, 4):
        Image.fromarray(np.full((9, 9, 3), n, np.uint8)).save(tmp_path / f"val_images/{n:09d}.jpg")
    source = VistSource(path)
    llama = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    config = EncodeConfig(llama, ClipTokenizer(oracle_dir / "tokenizer_clip"))
    length = int(measure(source, llama, image_tokens=2).lengths.max())
    spec = BatchSpec(
        rows=13,
        length=length,
        items=13,
        images=13 * 5,
        targets=40,
        image_size=8,
        target_size=8,
        image_tokens=2,
    )
    loader = make_loader(
        source, config, spec, global_batch=13, shuffle=False, num_epochs=1, error_budget=6, prefetch=0
    )
    batch = next(loader)
    assert [skip.index for skip in loader.skipped] == [7, 8, 9, 10, 11, 12]  # all of steps 3 and 4
    reasons = [str(skip) for skip in loader.skipped]
    assert all(f"{path}: story 7" in reason and "000000003.jpg" in reason for reason in reasons)
    assert (batch.tokens[:, 0] == llama.bos_id).sum() == 7 and loader.truncated == 0
