"""How the records of a prepared data set become samples: the raw sources' rules over stored fields."""

from __future__ import annotations

import abc
import collections
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.samples.dialogs import Dialog, DialogRules, DialogTurn
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.samples.records import Record, RecordRules, parse_record
from minigpt5_jax.data.samples.stories import Step, Story, StoryRules

Fields = dict[str, Any]
Numbers = Int[np.ndarray, " n"]
CountTokens = Callable[[str], int] | None
Rules = PairRules | StoryRules | DialogRules | RecordRules
LOST = b""  # stands for an image that the dialogue has lost
UNREAD = "image"  # stands for one that is not read, where words are all that is wanted


class Kind(abc.ABC):
    """The samples of one kind of record.

    Attributes:
      rules: how they are made.
      left_out: what is not used, by kind; known after ``counts``.
    """

    def __init__(self, rules: Any):
        self.rules = rules
        self.left_out: collections.Counter[str] = collections.Counter()

    @abc.abstractmethod
    def counts(self, lines: Iterable[str], units: Numbers, count_tokens: CountTokens) -> Numbers:
        """Number of samples of each record.

        Args:
          lines: of the units' file.
          units: the number that each record had in the raw files.
          count_tokens: length of a text, for rules that limit it.
        """

    @abc.abstractmethod
    def example(self, fields: Fields, images: list[bytes], place: int, epoch: int) -> Example:
        """Sample ``place`` of a record."""

    @abc.abstractmethod
    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        """(source, target) of sample ``place`` of a record in every wording, made without its images."""

    @abc.abstractmethod
    def layout(self) -> tuple:
        """The part of the rules' settings which decides what images a sample has."""


class PairKind(Kind):
    """CC3M: a pair, and its instruction sample for rows 0, 100, 200, ... of the raw table."""

    rules: PairRules

    def counts(self, lines: Iterable[str], units: Numbers, count_tokens: CountTokens) -> Numbers:
        every = self.rules.instruction_every
        return 1 + (units % every == 0) if every else np.ones_like(units)

    def example(self, fields: Fields, images: list[bytes], place: int, epoch: int) -> Example:
        return self.rules.example(self._pair(fields, images[0]), place == 1, epoch)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return self.rules.texts(self._pair(fields, UNREAD), place == 1)

    def layout(self) -> tuple:
        return (self.rules.instruction_every,)

    def _pair(self, fields: Fields, image: ImageSource) -> Pair:
        return Pair(fields["row"], fields["caption"], image, fields["where"])


class StoryKind(Kind):
    """VIST: the tasks of each step."""

    rules: StoryRules

    def counts(self, lines: Iterable[str], units: Numbers, count_tokens: CountTokens) -> Numbers:
        steps = [len(json.loads(line)["steps"]) for line in lines]
        return np.array([len(self.rules.samples(number)) for number in steps], np.int64)

    def example(self, fields: Fields, images: list[bytes], place: int, epoch: int) -> Example:
        return self.rules.example(*self._sample(fields, images, place), epoch)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return self.rules.texts(*self._sample(fields, [UNREAD] * len(fields["steps"]), place))

    def layout(self) -> tuple:
        return (self.rules.tasks,)

    def story(self, fields: Fields, images: Iterable[ImageSource]) -> Story:
        """The whole story of a record."""
        steps = tuple(
            Step(step["caption"], image, step["sequence_index"])
            for step, image in zip(fields["steps"], images, strict=True)
        )
        return Story(fields["id"], steps, fields["where"])

    def _sample(self, fields: Fields, images: Iterable[ImageSource], place: int) -> tuple[Story, int, str]:
        story = self.story(fields, images)
        return story, *self.rules.samples(len(story.steps))[place]


class DialogKind(Kind):
    """MMDialog: every turn but the first, as far as the dialogue can be used."""

    rules: DialogRules

    def counts(self, lines: Iterable[str], units: Numbers, count_tokens: CountTokens) -> Numbers:
        self.rules.check_counter(count_tokens)
        found = []
        for line in lines:
            dialog = self._dialog(json.loads(line), None)
            usable, remarks = self.rules.usable(dialog, lambda image: image != LOST, count_tokens)
            self.left_out.update(remark.kind for remark in remarks)
            found.append(max(0, usable - 1))
        return np.array(found, np.int64)

    def example(self, fields: Fields, images: list[bytes], place: int, epoch: int) -> Example:
        return self.rules.example(self._dialog(fields, images), place + 1)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return [self.rules.example(self._dialog(fields, None), place + 1).words]

    def layout(self) -> tuple:
        return self.rules.settings()

    def _dialog(self, fields: Fields, images: list[bytes] | None) -> Dialog:
        turns = []
        for turn in fields["turns"]:
            image: ImageSource | None = LOST if turn["media"] else None
            if turn["picture"] >= 0:
                image = UNREAD if images is None else images[turn["picture"]]
            turns.append(DialogTurn(turn["text"], image, tuple(filter(None, turn["media"].split("/")))))
        return Dialog(fields["id"], tuple(turns), fields["where"])


class RecordKind(Kind):
    """The user's own JSONL: every assistant turn."""

    rules: RecordRules

    def counts(self, lines: Iterable[str], units: Numbers, count_tokens: CountTokens) -> Numbers:
        return np.array([len(self._record(json.loads(line)).samples()) for line in lines], np.int64)

    def example(self, fields: Fields, images: list[bytes], place: int, epoch: int) -> Example:
        record, example = self._record(fields), self._example(fields, place)
        paths = (str(Path(image.path)) for turn in record.turns for image in turn.images())
        found: dict[ImageSource, bytes] = dict(zip(paths, images, strict=True))
        target = None if example.target_image is None else found[example.target_image]
        read = tuple(found[path] for path in example.images)
        return dataclasses.replace(example, images=read, target_image=target)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return [self._example(fields, place).words]

    def layout(self) -> tuple:
        return ()

    def _record(self, fields: Fields) -> Record:
        return parse_record(fields["record"], fields["where"])

    def _example(self, fields: Fields, place: int) -> Example:
        """The sample with paths for images."""
        record = self._record(fields)
        turn, stretch = record.samples()[place]
        named = {"name": fields["name"], "where": fields["where"]}
        return self.rules.example(record, turn, stretch, image_root=Path(), **named)


RULES: dict[str, type[Rules]] = {
    "cc3m": PairRules,
    "vist": StoryRules,
    "mmdialog": DialogRules,
    "jsonl": RecordRules,
}
KINDS: dict[str, type[Kind]] = {
    "cc3m": PairKind,
    "vist": StoryKind,
    "mmdialog": DialogKind,
    "jsonl": RecordKind,
}


def make_rules(dataset: str, **settings: Any) -> Rules:
    """The rules of a data set with these of its settings; the others are those of the original's training."""
    return RULES[dataset](**settings)
