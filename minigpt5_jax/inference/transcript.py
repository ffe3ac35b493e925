"""Conversations from JSONL records and back: what story and chat generation read and write.

The form is that of users' training data (:mod:`minigpt5_jax.data.samples.records`), so what a model wrote can
be read, continued, evaluated or trained on as any other data.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.data.errors import SampleError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.samples.records import Record, RecordImage
from minigpt5_jax.inference.conversation import Conversation, ImagePart, Message
from minigpt5_jax.inference.page import Entry, Part
from minigpt5_jax.inference.prompts import file_records
from minigpt5_jax.inference.session import mixed_seed

FILE = "conversations.jsonl"


def read_records(path: str | Path, allow_outside_images: bool = False) -> list[tuple[str, Record]]:
    """(name, record) of every line; a record without an id is named by file and line.

    Args:
      path: the file.  allow_outside_images: whether image paths may lead out of its folder.

    Raises:
      DataError: no such file, no line, a line that breaks the schema or is a pair, an id used twice.
    """
    found: dict[str, Record] = {}
    for where, record in file_records(path, allow_outside_images):
        if record.pair:
            raise SampleError(where, "is a pair of caption and image; stories and dialogues have turns")
        name = record.id if record.id is not None else f"{Path(path).stem}_{where.rpartition(':')[2]}"
        if name in found:
            raise SampleError(where, f"id {name!r} was used already")
        found[name] = record
    return list(found.items())


def turns_of(record: Record, image_root: Path) -> list[Message]:
    """A record's turns, their images known to be readable; SampleError where one is not."""

    def part(value: str | RecordImage) -> str | ImagePart:
        if isinstance(value, str):
            return value
        path = image_root / value.path
        load_image(path)
        return ImagePart(path)

    return [Message(turn.role, tuple(map(part, turn.parts))) for turn in record.turns]


def seed_of(name: str, seed: int, sample: int = 0) -> int:
    """Seed of a conversation: by its name, so that it goes the same way alone and among others."""
    return mixed_seed(seed, sample, zlib.crc32(name.encode()))


def entry_of(conversation: Conversation, given: int) -> Entry:
    """A conversation as a page shows it: the first ``given`` turns as the prompt, then all that followed."""

    def shown(turns: Sequence[Message], named: bool) -> Iterator[Part]:
        for turn in turns:
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    yield np.asarray(load_image(part.image))
                else:
                    yield f"You: {part}" if named and turn.role == "user" else part

    messages = conversation.messages
    silent = sum(not answer.parts for answer in conversation.answers)
    dropped = max((answer.dropped for answer in conversation.answers), default=0)
    notes = [conversation.id]
    notes += [f"{silent} of {len(conversation.answers)} answers were empty"] * bool(silent)
    notes += [f"up to {dropped} positions of the past did not fit"] * bool(dropped)
    output = list(shown(messages[given:], named=True)) or ["(nothing)"]
    return Entry(
        list(shown(messages[:given], named=False)), output, seed=conversation.seed, notes=" · ".join(notes)
    )


def record_of(conversation: Conversation, given: int, number: int) -> dict[str, Any]:
    """A conversation in the schema, its images where ``write_page`` puts those of entry ``number``."""
    turns = []
    for section, messages in (
        ("prompt", conversation.messages[:given]),
        ("output", conversation.messages[given:]),
    ):
        images = 0
        for turn in messages:
            content: list[dict[str, str]] = []
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    images += 1
                    content.append({"type": "image", "path": f"images/{number:03d}-{section}-{images}.png"})
                else:
                    content.append({"type": "text", "text": part})
            if content:
                turns.append({"role": turn.role, "content": content})
    system = {"system": conversation.system} if conversation.system else {}
    return {"id": conversation.id, **system, "turns": turns}


def write_records(folder: str | Path, records: Sequence[dict[str, Any]]) -> Path:
    """``conversations.jsonl`` in a page's folder."""
    path = Path(folder) / FILE
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path
