"""Samples to score: what the references want, and what was predicted.

Both are files in the schema of :mod:`minigpt5_jax.data.samples.records`.  In the references a record is a
pair, a story or a dialogue, and each of its assistant turns is a sample, ``{id of the record}_{number of the
turn}``; a pair is one sample with the record's id.  In a folder of predictions each record of
``conversations.jsonl`` is the answer to one sample and has its name; the assistant's turns are what was
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.lines import TextLines, check_jsonl
from minigpt5_jax.data.paths import ImageFolder
from minigpt5_jax.data.samples.records import Record, RecordImage, parse_record
from minigpt5_jax.inference.prompts import OUTSIDE

FILE = "conversations.jsonl"
NO_IMAGE = "no image was written"
IMAGE = "[IMG0]"
"""Stands in a text where an image was written: scores of texts end there, as in the original."""
SHOWN = 5
Scene = tuple[str | Path, ...]
"""Texts and images of a turn or two, in order."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one sample should be.

    Attributes:
      id: of the sample.  group: id of its pair, story or dialogue.  step: number of the sample in it, from 0.
      text: that should be written, '' for none.
      image: that should be drawn, or None.
      caption: what the image shows in words: a pair's caption, else the text right before it.
    """

    id: str
    group: str
    step: int
    text: str
    image: Path | None
    caption: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A reference with its answer.

    Attributes:
      text: that was written, :data:`IMAGE` for each image.  image: that was drawn and can be read, or None.
      why: why there is no image, where one is wanted; '' otherwise.
    """

    reference: Reference
    text: str
    image: Path | None
    why: str = ""

    @property
    def id(self) -> str:
        """Of the sample."""
        return self.reference.id

    @property
    def group(self) -> str:
        """Of the sample."""
        return self.reference.group

    @property
    def wants_image(self) -> bool:
        """Whether the reference has an image."""
        return self.reference.image is not None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was predicted for one sample: its text (with :data:`IMAGE`), the first image, why none."""

    text: str
    image: Path | None
    why: str = ""


def _records(path: str | Path, *, generated: bool) -> list[tuple[str, Record]]:
    """(where, record) of each line, every id used once."""
    lines = TextLines(Path(path).expanduser())
    check_jsonl(lines.path, lines[0])
    found: dict[str, tuple[str, Record]] = {}
    for number in range(len(lines)):
        where = lines.where(number)
        record = parse_record(lines[number], where, generated=generated)
        name = record.id if record.id is not None else f"{lines.path.stem}_{lines.number(number)}"
        if name in found:
            raise SampleError(where, f"id {name!r} was used already")
        found[name] = (where, dataclasses.replace(record, id=name))
    return list(found.values())


def images_beside(path: Path, allow_outside: bool) -> ImageFolder:
    """The folder that image paths of a file lead into: its own."""
    return ImageFolder(path.parent, allow_outside, remedy=OUTSIDE)


def read_references(path: str | Path, allow_outside_images: bool = False) -> list[Reference]:
    """The samples of a file of references, in its order.

    Args:
      path: the file.  allow_outside_images: whether image paths may lead out of its folder.

    Raises:
      DataError: no such file, a line that breaks the schema, an id used twice, a path outside of the file's
        folder, two samples of one name, or no sample.
    """
    folder, found = images_beside(Path(path).expanduser(), allow_outside_images), []
    names: set[str] = set()
    for where, record in _records(path, generated=True):
        for step, number in enumerate(record.answers()):
            turn, before = record.turns[number], record.turns[number - 1 : number]
            image = next(iter(turn.images()), None)
            caption = (image.caption if image else None) or (before[0].text() if before else "")
            name = str(record.id) if record.pair else f"{record.id}_{number}"
            if name in names:
                raise DataError(f"{where}: two samples are called {name}; give this record another id")
            names.add(name)
            found.append(
                Reference(
                    id=name,
                    group=str(record.id),
                    step=step,
                    text=turn.text(),
                    image=Path(folder.path(image.path, where)) if image else None,
                    caption=caption,
                )
            )
    if not found:
        raise DataError(f"{path} has no assistant turn, so nothing to compare with")
    return found


def read_scenes(path: str | Path, allow_outside_images: bool = False) -> dict[str, list[Scene]]:
    """Sample -> what comes before its answer: a scene is a user's turn and the assistant's turn behind it.

    Args:
      path: a file of references.  allow_outside_images: whether image paths may lead out of its folder.

    Raises:
      DataError: as :func:`read_references`.
    """
    folder, found = images_beside(Path(path).expanduser(), allow_outside_images), {}
    for where, record in _records(path, generated=True):
        scenes: list[Scene] = []
        for number, turn in enumerate(record.turns):
            if turn.role == "assistant":
                name = str(record.id) if record.pair else f"{record.id}_{number}"
                found[name] = list(scenes)
            if turn.role == "user" or not scenes:
                scenes.append(())
            parts = [p if isinstance(p, str) else Path(folder.path(p.path, where)) for p in turn.parts]
            scenes[-1] += tuple(part for part in parts if part)
    return found


def _predicted(folder: str | Path, allow_outside: bool) -> tuple[ImageFolder, list[tuple[str, Record]]]:
    """The folder of images of predictions, and (where, record) of each; DataError where there are none."""
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise DataError(f"{path} is missing; --predictions is a folder with {FILE} and its images")
    return images_beside(path, allow_outside), _records(path, generated=True)


def read_predictions(folder: str | Path, allow_outside_images: bool = False) -> dict[str, Answer]:
    """Sample -> answer, of a folder with ``conversations.jsonl`` and the images that it names.

    An image that is not there or cannot be read is as one that was not drawn, and the answer says why.

    Args:
      folder: the folder.  allow_outside_images: whether image paths may lead out of it.

    Raises:
      DataError: no such file, a line that breaks the schema, or a path outside of the folder.
    """
    images, records = _predicted(folder, allow_outside_images)
    found = {}
    for where, record in records:
        turns = [turn for turn in record.turns if turn.role == "assistant"]
        parts = [part for turn in turns for part in turn.parts]
        text = " ".join(part if isinstance(part, str) else IMAGE for part in parts if part)
        drawn = next((part for part in parts if isinstance(part, RecordImage)), None)
        answer = Answer(text, None, NO_IMAGE)
        if drawn is not None:
            answer = _with_image(text, Path(images.path(drawn.path, where)))
        found[str(record.id)] = answer
    return found


def read_parts(folder: str | Path, allow_outside_images: bool = False) -> dict[str, Scene]:
    """Record -> all texts and images of its assistant's turns in order, of a folder as for predictions.

    Raises:
      DataError: as :func:`read_predictions`.
    """
    images, records = _predicted(folder, allow_outside_images)
    found = {}
    for where, record in records:
        parts = [part for turn in record.turns if turn.role == "assistant" for part in turn.parts]
        found[str(record.id)] = tuple(
            part.replace("###", "").strip() if isinstance(part, str) else Path(images.path(part.path, where))
            for part in parts
            if not isinstance(part, str) or part.replace("###", "").strip()
        )
    return found


def _with_image(text: str, image: Path) -> Answer:
    try:
        load_image(image)
    except SampleError as error:
        return Answer(text, None, str(error))
    return Answer(text, image)


def join(
    references: Sequence[Reference], answers: Mapping[str, Answer], *, surplus: bool = False
) -> list[Sample]:
    """Every reference with its answer.

    Args:
      surplus: answers to other samples are left out without a word.

    Raises:
      DataError: a reference has no answer, or (without ``surplus``) an answer no reference; with their ids.
    """
    names = {reference.id for reference in references}
    missing, unknown = sorted(names - answers.keys()), sorted(answers.keys() - names)
    if missing or (unknown and not surplus):
        told = [f"{len(missing)} samples of the references have no prediction: {_shown(missing)}"] * bool(
            missing
        )
        told += [f"{len(unknown)} predictions are of no reference: {_shown(unknown)}"] * bool(unknown)
        raise DataError(
            f"{'; '.join(told)}; give predictions and references of the same samples (a prediction has the "
            "id of a pair, or the record's id, _ and the number of the turn)"
        )
    samples = []
    for reference in references:
        answer = answers[reference.id]
        why = answer.why if reference.image is not None and answer.image is None else ""
        samples.append(Sample(reference, answer.text, answer.image, why))
    return samples


def _shown(ids: Collection[str]) -> str:
    some = list(ids)[:SHOWN]
    return ", ".join(some) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def check_missing(samples: Sequence[Sample], rule: str) -> None:
    """The rule ``error`` for images that are wanted and not there.

    Raises:
      DataError: there is such a sample, and ``rule`` is ``error``.
    """
    missing = [sample for sample in samples if sample.why]
    if missing and rule == "error":
        told = "\n  ".join(f"{sample.id}: {sample.why}" for sample in missing[:SHOWN])
        raise DataError(
            f"{len(missing)} of {len(samples)} samples have no image:\n  {told}\ngenerate them again, or "
            "choose --switch missing_image=skip (leave them out of scores of images) or =zero (they count 0)"
        )
