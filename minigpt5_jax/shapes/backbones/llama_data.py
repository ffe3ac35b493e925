"""What the small world's language model is trained on, as rows of ids.

Stories and dialogues are read by the readers of the real data sets, so that prompts are those of stage 2.
Where a sample draws, its vokens become fillers, whose states are asked for the scene.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import MMDialogSource, VistSource
from minigpt5_jax.data.text.templates import IGNORE, TokenizedSample, clean_caption, expand, target_text
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.shapes.backbones.fields import CLASSES, UNTOLD, alone, labels
from minigpt5_jax.shapes.backbones.texts import (
    description,
    draw_training_scene,
    image_question,
    instruction,
    question,
    recall,
)
from minigpt5_jax.shapes.dataset import read_truth, scenes_of_images, write_dialogs, write_stories
from minigpt5_jax.shapes.wording import caption, ends_of_objects
from minigpt5_jax.shapes.world import Scene

FILLERS = 8  # vokens of an image
DIALOG_SHARE = 0.4  # of samples with a history; the others are stories'
DESCRIBED_SHARE = 0.75  # of samples with one image; the others are questions about it
Rows = dict[str, Any]
"""Arrays of a batch by name; see :func:`empty_rows`."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text before it is numbers.

    Attributes:
      source, target: what is read, what is written.
      scenes: of the images read, in order.
      drawn: scene of the image that is drawn, or None.
      whole: whether the source is learnt as well.
    """

    source: str
    target: str
    scenes: tuple[Scene, ...] = ()
    drawn: Scene | None = None
    whole: bool = False


def plain(scene: Scene, random: np.random.Generator) -> Sample:
    """A caption, and its image behind it."""
    text = clean_caption(caption(scene, random))
    return Sample(text, target_text("", draws=True, num_vokens=FILLERS), drawn=scene, whole=True)


def told(scene: Scene, random: np.random.Generator) -> Sample:
    """One of the texts about a scene that is described in words or by an image."""
    kind = random.integers(6)
    if kind == 0:
        asked = instruction(scene, random)
        return Sample(asked, target_text("", draws=True, num_vokens=FILLERS), drawn=scene)
    if kind <= 2:
        return Sample(*(question, recall)[kind - 1](scene, random))
    return Sample(*(image_question if kind == 3 else description)(scene, random), scenes=(scene,))


def seen(scene: Scene, random: np.random.Generator) -> Sample:
    """An image that is described, or, less often, asked about."""
    kind = description if random.random() < DESCRIBED_SHARE else image_question
    return Sample(*kind(scene, random), scenes=(scene,))


class Histories:
    """Samples of stories and dialogues, read from disk by the readers of VIST and MMDialog."""

    def __init__(
        self, folder: Path, split: str, tokenizer: LlamaTokenizer, stories: int, dialogs: int, seed: int
    ):
        cleaned = write_stories(folder, split, stories, seed)
        conversations = write_dialogs(folder, split, dialogs, seed)
        self.stories = VistSource(cleaned, rules=StoryRules(num_vokens=FILLERS))
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
        rules = DialogRules(num_vokens=FILLERS)
        self.dialogs = MMDialogSource(conversations, rules=rules, count_tokens=count)
        self.scenes = scenes_of_images(folder, split, "stories")
        self.scenes |= scenes_of_images(folder, split, "dialogs")
        self.truth = {record["story_id"]: record for record in read_truth(folder, split, "stories")}

    def sample(self, random: np.random.Generator) -> Sample:
        """A story's step or a dialogue's turn."""
        source = self.dialogs if random.random() < DIALOG_SHARE else self.stories
        index, epoch = int(random.integers(len(source))), int(random.integers(1 << 20))
        return self.of_example(source.example(index, epoch))

    def of_example(self, example: Example) -> Sample:
        """What a reader gives, with the scenes of its images."""
        seen = tuple(self.scenes[str(path)] for path in example.images)
        drawn = None if example.target_image is None else self.scenes[str(example.target_image)]
        return Sample(example.source, example.target, seen, drawn)


def empty_rows(count: int, length: int, images: int) -> Rows:
    """Rows without text: labels of the next token (``nexts``), the scene (``asked``), objects (``words``)."""
    return {
        "ids": np.zeros((count, length), np.int32),
        "nexts": np.full((count, length), IGNORE, np.int32),
        "valid": np.zeros((count, length), np.int32),
        "filler": np.zeros((count, length), bool),
        "asked": np.full((count, length, len(CLASSES)), UNTOLD, np.int32),
        "words": np.full((count, length, len(CLASSES)), UNTOLD, np.int32),
        "image": np.zeros(images, np.int32),
        "image_row": np.full(images, count, np.int32),
        "image_start": np.zeros(images, np.int32),
    }


def fill_row(made: Rows, i: int, tokenizer: LlamaTokenizer, sample: Sample, given: TokenizedSample) -> None:
    """Write one sample, images aside.  Rows of new tokens, which no file holds, have id 0."""
    tokens, size = given.tokens, len(given.tokens)
    made["ids"][i, :size] = np.where(tokens < tokenizer.vocab_size, tokens, 0)
    made["valid"][i, :size] = 1
    wanted = tokens if sample.whole else given.labels
    wanted = np.where(wanted < tokenizer.vocab_size, wanted, IGNORE)
    made["nexts"][i, : size - 1] = wanted[1:]
    if given.voken_start is not None and sample.drawn is not None:
        start = given.voken_start
        made["filler"][i, start : start + FILLERS] = True
        made["asked"][i, start - 1 : start + FILLERS] = labels([sample.drawn])
    if sample.whole and sample.drawn is not None:
        for end, item in ends_of_objects(sample.source):
            made["words"][i, len(tokenizer.encode(sample.source[:end]))] = alone(item)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of batch: what it is made of, its length, rows and images at most."""

    draw: Callable[[np.random.Generator], Sample]
    length: int
    rows: int
    images: int


def make_rows(
    tokenizer: LlamaTokenizer, samples: Sequence[Sample], length: int, images: int, image_tokens: int
) -> tuple[Rows, list[Scene]]:
    """Rows of samples, and the scenes their ``image`` counts in."""
    made = empty_rows(len(samples), length, images)
    scenes = list(dict.fromkeys(scene for sample in samples for scene in sample.scenes))
    find, at = {scene: index for index, scene in enumerate(scenes)}, 0
    for i, sample in enumerate(samples):
        given = expand(tokenizer, sample.source, sample.target, image_tokens=image_tokens, max_length=length)
        fill_row(made, i, tokenizer, sample, given)
        shown = labels(sample.scenes)
        for which, start in zip(given.images, given.image_start, strict=True):
            made["image"][at], made["image_row"][at] = find[sample.scenes[which]], i
            made["image_start"][at] = start
            made["asked"][i, start + image_tokens] = shown[which]  # the state behind an image tells of it
            at += 1
    return made, scenes


def kinds_of_batches(histories: Histories) -> tuple[Kind, ...]:
    """One turn of training: captions, texts about scenes, and twice stories and dialogues."""
    history = Kind(histories.sample, 200, 10, 50)
    return (
        Kind(lambda random: plain(draw_training_scene(random), random), 60, 32, 0),
        history,
        Kind(lambda random: told(draw_training_scene(random), random), 104, 20, 20),
        history,
    )


def kinds_of_describing(histories: Histories) -> tuple[Kind, ...]:
    """One turn of the training that follows: two fifths of it tell what is in an image."""
    described = Kind(lambda random: seen(draw_training_scene(random), random), 88, 32, 32)
    captions, history, *_ = kinds_of_batches(histories)
    return captions, history, described, history, described
