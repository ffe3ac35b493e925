"""How the records of a prepared data set become samples: the raw sources' rules over stored fields."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.samples.dialogs import Dialog, DialogRules, DialogTurn
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.pairs import Pair, PairRules
from minigpt5_jax.data.samples.records import Record, parse_record, to_example
from minigpt5_jax.data.samples.stories import Step, Story, StoryRules

Fields = dict[str, Any]
LOST = b""  # stands for an image that the dialogue has lost
UNREAD = "picture"  # stands for one that is not read, where words are all that is wanted


@runtime_checkable
class Kind(Protocol):
    """The samples of one kind of record.

    ``counts`` gives the number of samples of each record, from the lines of the units' file and the number
    each unit had in the raw files; ``example`` and ``texts`` give sample ``place`` of one record, the latter
    without images; ``settings`` is everything they depend on, ``layout`` that part of it which decides
    what images a sample has, ``left_out`` what is not used, by kind.
    """

    def counts(self, lines: Iterable[str], units: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]: ...

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example: ...

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]: ...

    def settings(self) -> tuple: ...

    def layout(self) -> tuple: ...

    def left_out(self) -> dict[str, int]: ...


class PairKind:
    """CC3M: a pair, and its instruction sample for rows 0, 100, 200, ... of the raw table."""

    def __init__(self, rules: PairRules):
        self._rules = rules

    def counts(self, lines: Iterable[str], units: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return 1 + (units % self._rules.every == 0) if self._rules.every else np.ones_like(units)

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example:
        return self._rules.example(self._pair(fields, pictures[0]), place == 1, epoch)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return self._rules.texts(self._pair(fields, UNREAD), place == 1)

    def settings(self) -> tuple:
        return dataclasses.astuple(self._rules)

    def layout(self) -> tuple:
        return (self._rules.every,)

    def left_out(self) -> dict[str, int]:
        return {}

    def _pair(self, fields: Fields, picture: ImageSource) -> Pair:
        return Pair(fields["row"], fields["caption"], picture, fields["where"])


class StoryKind:
    """VIST: the tasks of each step."""

    def __init__(self, rules: StoryRules):
        self._rules = rules

    def counts(self, lines: Iterable[str], units: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        steps = [len(json.loads(line)["steps"]) for line in lines]
        return np.array([len(self._rules.samples(number)) for number in steps], np.int64)

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example:
        return self._rules.example(*self._sample(fields, pictures, place), epoch)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        return self._rules.texts(*self._sample(fields, [UNREAD] * len(fields["steps"]), place))

    def settings(self) -> tuple:
        return self._rules.settings()

    def layout(self) -> tuple:
        return (self._rules.tasks,)

    def left_out(self) -> dict[str, int]:
        return {}

    def _sample(self, fields: Fields, pictures: Iterable[ImageSource], place: int) -> tuple[Story, int, str]:
        steps = tuple(
            Step(step["caption"], picture, step["sequence_index"])
            for step, picture in zip(fields["steps"], pictures, strict=True)
        )
        story = Story(fields["id"], steps, fields["where"])
        return story, *self._rules.samples(len(steps))[place]


class DialogKind:
    """MMDialog: every turn but the first, as far as the dialogue can be used.

    Args:
      count_tokens: length of a text; needed where the rules count tokens, and not kept after ``counts``.
    """

    def __init__(self, rules: DialogRules, count_tokens: Callable[[str], int] | None):
        if rules.counts_tokens and count_tokens is None:
            raise DataError(
                f"training with loader {rules.loader!r} leaves out long turns: give count_tokens="
            )
        self._rules, self._count_tokens = rules, count_tokens
        self._left_out: collections.Counter[str] = collections.Counter()

    def counts(self, lines: Iterable[str], units: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        found = []
        for line in lines:
            dialog = self._dialog(json.loads(line), None)
            usable, remarks = self._rules.usable(dialog, lambda picture: picture != LOST, self._count_tokens)
            self._left_out.update(remark.kind for remark in remarks)
            found.append(max(0, usable - 1))
        self._count_tokens = None
        return np.array(found, np.int64)

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example:
        return self._rules.example(self._dialog(fields, pictures), place + 1)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        example = self._rules.example(self._dialog(fields, None), place + 1)
        return [(example.source, example.target)]

    def settings(self) -> tuple:
        return dataclasses.astuple(self._rules)

    def layout(self) -> tuple:
        return self.settings()

    def left_out(self) -> dict[str, int]:
        return dict(sorted(self._left_out.items()))

    def _dialog(self, fields: Fields, pictures: list[bytes] | None) -> Dialog:
        turns = []
        for turn in fields["turns"]:
            picture: ImageSource | None = LOST if turn["media"] else None
            if turn["picture"] >= 0:
                picture = UNREAD if pictures is None else pictures[turn["picture"]]
            turns.append(DialogTurn(turn["text"], picture, tuple(filter(None, turn["media"].split("/")))))
        return Dialog(fields["id"], tuple(turns), fields["where"])


class RecordKind:
    """The user's own JSONL: every assistant turn."""

    def __init__(self, num_vokens: int):
        self._num_vokens = num_vokens

    def counts(self, lines: Iterable[str], units: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.array([len(self._record(json.loads(line)).answers()) for line in lines], np.int64)

    def example(self, fields: Fields, pictures: list[bytes], place: int, epoch: int) -> Example:
        record, example = self._record(fields), self._example(fields, place)
        paths = (str(Path(image.path)) for turn in record.turns for image in turn.images())
        found: dict[ImageSource, bytes] = dict(zip(paths, pictures, strict=True))
        target = None if example.target_image is None else found[example.target_image]
        images = tuple(found[path] for path in example.images)
        return dataclasses.replace(example, images=images, target_image=target)

    def texts(self, fields: Fields, place: int) -> list[tuple[str, str]]:
        example = self._example(fields, place)
        return [(example.source, example.target)]

    def settings(self) -> tuple:
        return (self._num_vokens,)

    def layout(self) -> tuple:
        return ()

    def left_out(self) -> dict[str, int]:
        return {}

    def _record(self, fields: Fields) -> Record:
        return parse_record(fields["record"], fields["where"])

    def _example(self, fields: Fields, place: int) -> Example:
        """The sample with paths for images."""
        record = self._record(fields)
        return to_example(
            record,
            record.answers()[place],
            image_root=Path(),
            name=fields["name"],
            where=fields["where"],
            num_vokens=self._num_vokens,
        )
