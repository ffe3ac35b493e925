"""Stories and dialogues: what is read before each answer, and files that can be read again."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.samples.records import parse_record
from minigpt5_jax.data.text.prompts import DIALOG_SYSTEM, STORY_SYSTEM
from minigpt5_jax.data.text.templates import IMAGE
from minigpt5_jax.inference.conversation import (
    Conversation,
    ImagePart,
    Message,
    chat,
    continue_story,
    encode_png,
)
from minigpt5_jax.inference.page import write_page
from minigpt5_jax.inference.session import Generation, Session
from minigpt5_jax.inference.transcript import (
    entry_of,
    read_records,
    record_of,
    seed_of,
    turns_of,
    write_records,
)


class Echo(Session):
    """Answers with its seed in words and pixels; says nothing to a prompt that has ``silence`` in it."""

    def __init__(self):
        self.prompts = []

    def generate(self, prompts):
        self.prompts.append(list(prompts))
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt):
        word = f"w{prompt.seed % 9973}"
        drawn = np.full((8, 8, 3), zlib.crc32(prompt.source.encode()) % 256, np.uint8)
        parts = () if "silence" in prompt.source else (word, drawn)
        return Generation(parts, word, (1, 2), prompt.source, prompt.seed)


@pytest.fixture
def session():
    return Echo()


def image(value):
    return encode_png(np.full((8, 8, 3), value, np.uint8))


def story(name="a", seed=1):
    return Conversation(name, seed, [Message("user", ("we left", ImagePart(image(1)), "we swam"))])


def test_a_story_reads_all_that_was_told_and_drawn(session):
    one = story()
    continue_story(session, [one], scenes=2)
    first, second = (batch[0] for batch in session.prompts)
    request = " Tell me the next scene with image. ###Assistant:"
    assert first.source == f"{STORY_SYSTEM}###Human:we left{IMAGE}we swam\n{request}"
    word = one.answers[0].parts[0]
    assert second.source == f"{STORY_SYSTEM}###Human:we left{IMAGE}we swam{word}{IMAGE}\n{request}"
    assert first.images == (image(1),) and len(second.images) == 2
    np.testing.assert_array_equal(np.asarray(load_image(second.images[1])), one.answers[0].parts[1])
    assert first.seed != second.seed and [turn.role for turn in one.messages] == ["user"] + ["assistant"] * 2


def test_a_story_is_told_alike_alone_and_among_others(session):
    alone, among = story("b", 7), [story("a", 3), story("b", 7), story("c", 4)]
    continue_story(session, [alone], scenes=3)
    continue_story(session, among, scenes=3)
    for one, other in zip(alone.answers, among[1].answers):
        assert one.source == other.source and one.seed == other.seed and one.text == other.text
    assert among[0].answers[0].seed != among[1].answers[0].seed
    assert [len(batch) for batch in session.prompts] == [1, 1, 1, 3, 3, 3]


def test_a_dialogue_answers_every_user_turn_that_has_no_answer(session):
    script = [
        [
            Message("user", ("hello",)),
            Message("assistant", ("hi",)),
            Message("user", ("draw", ImagePart(image(2)))),
        ],
        [Message("user", ("one",)), Message("user", ("two",))],
    ]
    dialogs = [Conversation(name, 1, [], system=DIALOG_SYSTEM) for name in "xy"]
    chat(session, dialogs, script)
    assert [len(dialog.answers) for dialog in dialogs] == [1, 2]
    assert session.prompts[0][0].source == (
        f"{DIALOG_SYSTEM} ###Human: hello ###Assistant: hi ###Human: draw {IMAGE} ###Assistant:"
    )
    word = dialogs[1].answers[0].parts[0]
    assert session.prompts[1][0].source == (
        f"{DIALOG_SYSTEM} ###Human: one ###Assistant: {word} {IMAGE} ###Human: two ###Assistant:"
    )
    assert [turn.role for turn in dialogs[1].messages] == ["user", "assistant", "user", "assistant"]


def test_a_window_limits_what_a_dialogue_reads(session):
    dialog = Conversation("x", 1, [], system="S.")
    chat(session, [dialog], [[Message("user", (word,)) for word in ("one", "two", "three")]], window=3)
    assert session.prompts[2][0].source.startswith("S. ###Human: two ###Assistant: w")
    assert len(session.prompts[2][0].images) == 1


def test_an_empty_answer_is_no_turn(session):
    quiet = Conversation("q", 1, [Message("user", ("silence",))])
    continue_story(session, [quiet], scenes=2)
    assert len(quiet.messages) == 1 and len(quiet.answers) == 2
    entry = entry_of(quiet, given=1)
    assert entry.output == ["(nothing)"] and "2 of 2 answers were empty" in entry.notes
    assert quiet.answers[0].seed != quiet.answers[1].seed


def test_what_was_told_is_written_in_the_schema_and_read_again(session, tmp_path):
    told = [story("a"), Conversation("b", 2, [Message("user", ("go",))], system="S.")]
    continue_story(session, told, scenes=2)
    told[1].messages.append(Message("assistant", (ImagePart(image(9)), "and text after it")))
    write_page(tmp_path, "Stories", [entry_of(one, given=1) for one in told])
    path = write_records(tmp_path, [record_of(one, 1, number) for number, one in enumerate(told, 1)])
    again = read_records(path)
    assert [name for name, _ in again] == ["a", "b"] and again[1][1].system == "S."
    assert [turn.role for turn in again[0][1].turns] == ["user", "assistant", "assistant"]
    assert len(again[1][1].turns) == 4 and len(again[1][1].turns[-1].parts) == 2, (
        "it goes on behind its image"
    )
    for (_, record), one in zip(again, told):
        before = [part for turn in one.messages for part in turn.parts]
        after = [part for turn in turns_of(record, tmp_path) for part in turn.parts]
        assert len(before) == len(after)
        for was, now in zip(before, after):
            if isinstance(was, str):
                assert was == now
            else:
                same = [np.asarray(load_image(part.image)) for part in (was, now)]
                np.testing.assert_array_equal(*same)
    assert parse_record(path.read_text().splitlines()[0], "f:1").answers() == [1, 2]


def test_seeds_are_by_name(session):
    assert seed_of("a", 0) == seed_of("a", 0)
    assert len({seed_of("a", 0), seed_of("b", 0), seed_of("a", 1), seed_of("a", 0, 1)}) == 4


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "data file is empty"),
        ([{"caption": "a dog", "image": "a.png"}], "is a pair"),
        ([{"id": "a", "turns": [{"role": "user", "content": "x"}]}] * 2, "id 'a' was used already"),
        ([{"turns": []}], "at least one turn"),
    ],
)
def test_files_that_are_no_conversations(tmp_path, lines, message):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=message):
        read_records(path)
    with pytest.raises(DataError, match="data file not found"):
        read_records(tmp_path / "none.jsonl")


def test_a_missing_image_is_named(tmp_path):
    record = parse_record(
        json.dumps({"turns": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}]}), "f:1"
    )
    with pytest.raises(DataError, match=r"no\.png: image cannot be read"):
        turns_of(record, tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "no.png")
    assert isinstance(turns_of(record, tmp_path)[0].parts[0], ImagePart)
