"""The JSON schema of the user's own data, shared by training, generation and evaluation.

One object per line.  A pair of caption and image is::

    {"caption": "a red fox in the snow", "image": "photos/fox.jpg"}

and anything longer (a story, a dialogue) is a list of turns::

    {"id": "walk-7", "system": "Answer with an image.", "turns": [
      {"role": "user", "content": [{"type": "text", "text": "We left at dawn."},
                                   {"type": "image", "path": "photos/1.jpg"},
                                   {"type": "text", "text": "What came next?"}]},
      {"role": "assistant", "content": [{"type": "text", "text": "We reached the lake."},
                                        {"type": "image", "path": "photos/2.jpg"}]}]}

``content`` may be a plain string.  ``id`` is optional and unique in its file.  ``system`` is optional;
without it the dialogues' prompt is used, and ``""`` is none.  Turns have any number of images, anywhere.  An
assistant turn is learnt in stretches, each up to its next image: a sample draws one image, and has what the
turn says before it in its source, images there as the vokens that the model has written.  An image of an
assistant turn may carry a ``caption``, which lets it take part in the caption loss.  Image paths are relative
to the file's folder.  A record that ends in a user turn is a prompt to generate from.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.fields import Fields
from minigpt5_jax.data.text import prompts, templates

SPEAKERS = {"user": "Human", "assistant": "Assistant"}


@dataclasses.dataclass(frozen=True)
class RecordImage:
    """An image in a turn: its path as written, and the caption it may carry."""

    path: str
    caption: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says: texts and images in order."""

    role: str
    parts: tuple[str | RecordImage, ...]

    def images(self) -> list[RecordImage]:
        return [part for part in self.parts if isinstance(part, RecordImage)]

    def text(self) -> str:
        """Its texts, images left out."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    def written(self) -> str:
        """Its texts and ``<Img><ImageHere></Img>`` for each image, single spaces between."""
        return " ".join(part if isinstance(part, str) else templates.IMAGE for part in self.parts)

    def stretches(self) -> list[Turn]:
        """It in pieces: up to and with each image, and what follows the last."""
        ends = [number for number, part in enumerate(self.parts, 1) if isinstance(part, RecordImage)]
        borders = sorted({0, *ends, len(self.parts)})
        return [Turn(self.role, self.parts[a:b]) for a, b in itertools.pairwise(borders)]


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a file.  ``pair`` marks the short form, whose source is the bare caption."""

    id: str | None
    system: str
    turns: tuple[Turn, ...]
    pair: bool = False

    def answers(self) -> list[int]:
        """Numbers of the assistant's turns."""
        return [number for number, turn in enumerate(self.turns) if turn.role == "assistant"]

    def samples(self) -> list[tuple[int, int]]:
        """(turn, stretch) of everything that is learnt."""
        return [(turn, n) for turn in self.answers() for n in range(len(self.turns[turn].stretches()))]


def parse_record(line: str, where: str, *, generated: bool = False) -> Record:
    """Reads and checks one line.

    Args:
      generated: a model wrote it, so texts may be empty, and may spell tokens of ours (``###``).

    Raises:
      SampleError: naming ``where`` and what breaks the schema.
    """
    checker = (_GeneratedChecker if generated else _Checker)(where)
    return checker.record(checker.json(line, unique=True))


class _Checker(Fields):
    """Checks values against the schema."""

    def record(self, value: Any) -> Record:
        if isinstance(value, dict) and "turns" not in value:
            value = self.object(value, "", ("caption", "image"), ("id",))
            caption = self.words(templates.clean_caption(self.string(value["caption"], "caption")), "caption")
            image = RecordImage(self.path(value["image"], "image"), caption)
            turns = (Turn("user", (caption,)), Turn("assistant", (image,)))
            return Record(self.id(value), "", turns, pair=True)
        value = self.object(value, "", ("turns",), ("id", "system"))
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            raise self.fail("turns", "expected a list with at least one turn")
        system = self.plain(value.get("system", prompts.DIALOG_SYSTEM), "system")
        return Record(self.id(value), system, tuple(self.turn(t, f"turns[{i}]") for i, t in enumerate(turns)))

    def id(self, value: dict) -> str | None:
        return self.string(value["id"], "id") if "id" in value else None

    def turn(self, value: Any, place: str) -> Turn:
        value = self.object(value, place, ("role", "content"))
        role, content = value["role"], value["content"]
        if not isinstance(role, str) or role not in SPEAKERS:
            raise self.fail(f"{place}.role", f"expected user or assistant, found {role!r}")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, list) or not content:
            raise self.fail(f"{place}.content", "expected text or a list of at least one part")
        return Turn(role, tuple(self.part(p, f"{place}.content[{i}]") for i, p in enumerate(content)))

    def part(self, value: Any, place: str) -> str | RecordImage:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "text":
            return self.words(self.object(value, place, ("type", "text"))["text"], f"{place}.text")
        if kind == "image":
            value = self.object(value, place, ("type", "path"), ("caption",))
            caption = self.words(value["caption"], f"{place}.caption") if "caption" in value else None
            return RecordImage(self.path(value["path"], f"{place}.path"), caption)
        raise self.fail(place, "expected an object with type text or image")


class _GeneratedChecker(_Checker):
    """The same of what a model wrote, whose texts may be anything."""

    def plain(self, value: Any, place: str) -> str:
        return self.string(value, place)

    def words(self, value: Any, place: str) -> str:
        return self.string(value, place).strip()


def prompt_of(record: Record, turns: int, image_root: Path) -> tuple[str, tuple[str, ...]]:
    """Source text and input images of what follows the first ``turns`` turns of a record."""
    history = record.turns[:turns]
    images = tuple(str(image_root / image.path) for turn in history for image in turn.images())
    if record.pair:
        return history[0].written(), images
    said = [(SPEAKERS[turn.role], turn.written()) for turn in history]
    return prompts.dialog_source(record.system, said), images


@dataclasses.dataclass(frozen=True)
class RecordRules:
    """How records become samples, the same in training and in testing.

    Attributes:
      training: what the samples are for.
      num_vokens: vokens of one image.
    """

    training: bool = True
    num_vokens: int = 8

    def settings(self) -> tuple:
        """What samples depend on, for fingerprints."""
        return (self.num_vokens,)

    def example(
        self, record: Record, turn: int, stretch: int = 0, *, image_root: Path, name: str, where: str
    ) -> Example:
        """The sample that reads the turns before ``turn`` and writes a stretch of that (assistant) turn.

        Args:
          stretch: which of :meth:`Turn.stretches`; those before it stand in the source as they are written.
          name: name of the record where it has no id.
        """
        source, images = prompt_of(record, turn, image_root)
        stretches = record.turns[turn].stretches()
        written = [
            templates.target_text(before.text(), draws=True, num_vokens=self.num_vokens, ends=False)
            for before in stretches[:stretch]
        ]
        answer, last = stretches[stretch], stretch == len(stretches) - 1
        drawn = answer.images()
        base = record.id if record.id is not None else name
        number = f"{turn}" if len(stretches) == 1 else f"{turn}.{stretch}"
        return Example(
            source=" ".join([source, *written]),
            target=templates.target_text(
                answer.text(), draws=bool(drawn), num_vokens=self.num_vokens, ends=last
            ),
            images=images,
            target_image=str(image_root / drawn[0].path) if drawn else None,
            caption=drawn[0].caption if drawn else None,
            task="pair" if record.pair else "dialog",
            item_id=base if record.pair else f"{base}_{number}",
            where=where,
        )
