"""MMDialog's lines: samples, filters, and what is said about conversations that are wrong."""

from __future__ import annotations

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
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.sources import MMDialogSource, Source
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer


def turn(text, *media):
    return {"turn": [{"__TEXT__": text}, *({"__MEDIA__": i} for i in media)]}


def conversation(name, *turns):
    return {"conversation_id": name, "conversation": [turn(t) if isinstance(t, str) else t for t in turns]}


def write(folder, items, images=()):
    path = folder / "train.jsonl"
    path.write_text("\n".join(i if isinstance(i, str) else json.dumps(i) for i in items), encoding="utf-8")
    for n, name in enumerate(images):
        Image.fromarray(np.full((9, 9, 3), 20 * n, np.uint8)).save(folder / f"{name}.jpg")
    return path


def words(text):
    return len(text.split())


def read(path, *args, **kwargs):
    return MMDialogSource(path, *args, rules=DialogRules(**kwargs), count_tokens=words)


GOOD = conversation(3, turn("hi", "-17"), "yes :smile:", turn("look", "4"), "nice")


def test_samples_of_both_loaders(tmp_path):
    path = write(tmp_path, [{**GOOD, "negative_candidate_texts": ["x"]}], ["-17", "4"])
    source = pickle.loads(pickle.dumps(read(path)))
    assert isinstance(source, Source) and len(source) == 3 and source.rows == 1
    assert [source[i].item_id for i in range(3)] == ["3_1-mm", "3_2-mm", "3_3-mm"]
    second = source[1]
    assert second.source.endswith(". ###Human: hi <Img><ImageHere></Img> ###Assistant: yes :smile: ###Human:")
    assert second.target == "look [IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"
    assert second.images == (str(tmp_path / "-17.jpg"),) and second.target_image == str(tmp_path / "4.jpg")
    assert second.where == f"{path}:1" and source.texts(1) == [(second.source, second.target)]
    assert source.describe() == f"MMDialog training (head): 3 samples of 1 dialogues in {path}"
    release = read(path, loader="release", num_vokens=1)
    assert [release[i].item_id for i in range(3)] == ["mmdialog3_1", "mmdialog3_2", "mmdialog3_3"]
    assert release[1].source.endswith(
        ".###Human: hi <Img><ImageHere></Img>\n###Assistant: yes :smile:\n###Human:"
    )
    assert release[1].target == "look [IMG0] ###"
    for bad in (-1, 3):
        with pytest.raises(IndexError):
            source[bad]


def test_images_elsewhere(tmp_path):
    (tmp_path / "there").mkdir()
    path = write(tmp_path, [GOOD])
    write(tmp_path / "there", [], ["-17", "4"])
    assert read(path, tmp_path / "there")[1].target_image == str(tmp_path / "there" / "4.jpg")
    with pytest.raises(DataError, match="image folder not found"):
        read(path, tmp_path / "nowhere")


def test_counting_tokens_is_asked_for_where_it_is_needed(tmp_path):
    path = write(tmp_path, [GOOD], ["-17", "4"])
    with pytest.raises(DataError, match="give count_tokens="):
        MMDialogSource(path)
    for rules in (DialogRules(training=False), DialogRules(loader="release")):
        assert len(MMDialogSource(path, rules=rules)) == 3
    with pytest.raises(DataError, match="unknown loader 'old'; known: head, release"):
        MMDialogSource(path, rules=DialogRules(loader="old"))


ITEMS = [
    conversation(1, "a", "b", "w " * 51, "d"),  # ends at turn 2: one sample
    conversation(2, "a", turn("b", "gone"), "c"),  # ends at turn 1: none
    conversation(3, "a", turn("b", "1", "2"), ""),  # two media, then an empty turn: one
    conversation(4, "only"),  # none
    conversation(5, "a", "b", turn("c", "-3872362534310063124")),  # one
    conversation(6, "a", "b.jpg"),  # none
    conversation(7, "a", "b"),  # one
    conversation(8),  # none
]
IMAGES = ["1", "2", "-3872362534310063124"]


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    path = write(tmp_path, ITEMS, IMAGES)
    source = read(path)
    assert [source[i].item_id for i in range(len(source))] == ["1_1-mm", "3_1-mm", "5_1-mm", "7_1-mm"]
    assert source.counts == {
        "over 50 tokens": 1,
        "missing image": 1,
        "further images of a turn": 1,
        "empty text": 1,
        "fewer than two turns": 2,
        "bad image": 1,
        "file name as text": 1,
    }
    (missing,) = source.remarks["missing image"]
    assert str(missing) == f"{path}:2: turn 1: image gone is missing; the dialogue ends before it"
    assert source.describe().endswith(
        f"4 samples of 8 dialogues in {path}; left out: 1 bad image, 1 empty text, 2 fewer than two turns, "
        "1 file name as text, 1 further images of a turn, 1 missing image, 1 over 50 tokens"
    )
    assert str(missing) in caplog.text and "fewer than two turns, 2 times" in caplog.text

    test = MMDialogSource(path, rules=DialogRules(training=False))
    assert "over 50 tokens" not in test.counts and len(test) == len(source) + 2
    release = MMDialogSource(path, rules=DialogRules(loader="release"))
    assert release.counts == {
        "over 20 words": 1,
        "missing image": 1,
        "further images of a turn": 1,
        "fewer than two turns": 2,
    }
    assert read(path, bad_media_ids=[1]).counts["bad image"] == 1


def test_only_the_first_few_are_kept_by_name(tmp_path):
    path = write(tmp_path, [GOOD, *(conversation(10 + n, "a") for n in range(9))], ["-17", "4"])
    source = read(path)
    assert source.counts == {"fewer than two turns": 9}
    assert len(source.remarks["fewer than two turns"]) == MMDialogSource.SHOWN


def test_fingerprint(tmp_path):
    path = write(tmp_path, ITEMS, IMAGES)
    settings = [{}, {"training": False}, {"loader": "release"}, {"num_vokens": 4}, {"bad_media_ids": ()}]
    prints = [read(path, **one).fingerprint() for one in settings]
    assert len(set(prints)) == len(settings) and read(path).fingerprint() == prints[0]
    (tmp_path / "1.jpg").unlink()
    lost = read(path).fingerprint()
    write(tmp_path, ITEMS[:-1])
    assert len({*prints, lost, read(path).fingerprint()}) == len(settings) + 2


# ------------------------------------------------------------------------------------- wrong lines


def raw(*turns):
    return {"conversation_id": 9, "conversation": list(turns)}


BROKEN = [
    (json.dumps(GOOD)[:50], "no valid JSON .*is the line cut off"),
    ("[" * 100_000, "no valid JSON .nested too deeply"),
    ("[1]", "expected an object, found list"),
    ({"conversation": []}, "lacks conversation_id"),
    ({"conversation_id": "9", "conversation": []}, "conversation_id: expected a whole number, found str"),
    ({"conversation_id": True, "conversation": []}, "conversation_id: expected a whole number, found bool"),
    ({"conversation_id": 9, "conversation": {}}, "conversation: expected a list, found dict"),
    (raw("a"), "turn 0: expected an object, found str"),
    (raw(turn("a"), {"turns": []}), "turn 1: lacks turn"),
    (raw({"turn": "a"}), "turn 0: expected a list, found str"),
    (raw(turn("a"), {"turn": []}), "turn 1: has no parts"),
    (raw({"turn": ["a"]}), "turn 0, part 0: expected an object, found str"),
    (raw({"turn": [{"__VIDEO__": "a"}]}), "turn 0, part 0: has unknown keys __VIDEO__"),
    (raw({"turn": [{}]}), "turn 0, part 0: expected one of __TEXT__ and __MEDIA__, found none"),
    (raw({"turn": [{"__TEXT__": "a", "__MEDIA__": "b"}]}), "found __TEXT__ and __MEDIA__"),
    (raw({"turn": [{"__TEXT__": "a"}, {"__TEXT__": "b"}]}), "turn 0: has 2 texts"),
    (raw(turn(5)), "turn 0, part 0: expected text, found int"),
    (raw(turn("a", 1.5)), "turn 0, part 1: expected text, found float"),
    (raw(turn("a", " ")), "turn 0, part 1: path of an image is empty"),
    (raw(turn("a", "../b")), "turn 0, part 1: image id '../b' is no file name"),
    (raw(turn("half a pair \ud83d")), "turn 0, part 0: text is no Unicode at character 12"),
    (raw(turn("a [IMG0]")), r"turn 0, part 0: text contains \[IMG0\]"),
    (raw(turn("a"), turn("an <ImageHere>")), "turn 1, part 0: text contains <ImageHere>"),
    (raw(turn("a"), turn("b ###Human: c")), "turn 1, part 0: text contains ###"),
    (GOOD, "conversation_id was used in line 1 already"),
]


@pytest.mark.parametrize("item, reason", BROKEN)
def test_a_line_that_is_wrong_is_one_sample_that_cannot_be_fetched(tmp_path, item, reason):
    path = write(tmp_path, [GOOD, "", item, conversation(4, "a", "b")], ["-17", "4"])
    source = read(path)
    assert len(source) == 3 + 1 + 1 and source[4].item_id == "4_1-mm"
    assert source.describe().endswith("left out: 1 unusable lines")
    for call in (source.example, source.texts, pickle.loads(pickle.dumps(source)).example):
        with pytest.raises(SampleError, match=reason) as caught:
            call(3)
        assert caught.value.where == f"{path}:3"


def test_numbers_name_images_too(tmp_path):
    path = write(tmp_path, [conversation(1, "a", turn("b", -5))], ["-5"])
    assert read(path)[0].target_image == str(tmp_path / "-5.jpg")


def test_a_turn_of_an_image_alone(tmp_path):
    path = write(tmp_path, [conversation(1, "a", {"turn": [{"__MEDIA__": "5"}]})], ["5"])
    with pytest.raises(DataError, match="no samples in .*: 1 empty text"):
        read(path)
    assert read(path, loader="release")[0].target == "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###"


def test_files_that_are_wrong(tmp_path):
    with pytest.raises(DataError, match=r"not found: .*none\.jsonl"):
        read(tmp_path / "none.jsonl")
    path = write(tmp_path, [conversation(1, "a"), "{"])
    assert len(read(path)) == 1  # the broken line, which is met and counted
    write(tmp_path, [conversation(1, "a"), conversation(2, "", "b")])
    with pytest.raises(DataError, match="no samples in .*: 1 empty text, 1 fewer than two turns"):
        read(path)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read(path)


def test_from_lines_to_batches(tmp_path, oracle_dir):
    """All loaders give batches; a file that is no image is counted and named."""
    path = write(tmp_path, [GOOD, "{", conversation(5, turn("a", "bad"), "b")], ["-17", "4"])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    llama = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    config = EncodeConfig(llama, ClipTokenizer(oracle_dir / "tokenizer_clip"))
    for loader in ("head", "release"):
        count = lambda text: len(llama.encode(text))  # noqa: E731
        source = MMDialogSource(path, rules=DialogRules(loader), count_tokens=count)
        sizes = measure(source, llama, image_tokens=2)
        assert len(source) == 5 and sizes.images.tolist() == [1, 1, 2, 0, 1]
        spec = BatchSpec(
            rows=5,
            length=int(sizes.lengths.max()),
            items=5,
            images=10,
            targets=40,
            image_size=8,
            target_size=8,
            image_tokens=2,
        )
        batches = make_loader(
            source, config, spec, global_batch=5, shuffle=False, num_epochs=1, error_budget=2, prefetch=0
        )
        batch = next(batches)
        assert (batch.tokens[:, 0] == llama.bos_id).tolist() == [True, True, True, False, False]
        assert batch.item_mask.tolist() == [False, True, False, False, False]
        first, second = map(str, batches.skipped)
        assert f"{path}:2: no valid JSON" in first and f"{path}:3: " in second and "bad.jpg" in second
        assert batches.truncated == 0
