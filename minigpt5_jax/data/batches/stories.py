"""Whole stories as units of a plan: their sizes as trees, and which of them a step holds.

The size of a story is known before its wordings are drawn: an upper bound over all of them, made from words
alone (images are not opened) and kept in a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64
from tqdm import tqdm

from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.lengths import LengthIndex, kept_index
from minigpt5_jax.data.batches.plan import EMPTY_SLOT, BucketPlan, Shape, StepPlan
from minigpt5_jax.data.batches.spec import BatchSpec, TreeSpec
from minigpt5_jax.data.batches.tree import common, count_images, image_keys, plant
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.sources.base import stories_of
from minigpt5_jax.data.text.templates import IGNORE, TokenizedSample, expand


@dataclasses.dataclass(frozen=True, eq=False)
class StoryIndex:
    """Sizes of the n stories of a source as trees, whatever their wording.

    Attributes:
      starts: i64[n + 1] first sample of each story, and the number of samples.
      lengths: i32[n] nodes at most.
      images: i32[n] input images.  image_places: i32[n] places in the tree where they are read, at most.
      items: i32[n] images to draw.
      labels: i32[n] target positions of its samples, at most.
    """

    starts: Int64[np.ndarray, " n1"]
    lengths: Int32[np.ndarray, " n"]
    images: Int32[np.ndarray, " n"]
    image_places: Int32[np.ndarray, " n"]
    items: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def samples(self) -> int:
        """Samples of the longest story."""
        return longest_story(self.starts)


def longest_story(starts: Int64[np.ndarray, " n1"]) -> int:
    """Samples of the longest story of :func:`~minigpt5_jax.data.sources.base.stories_of`."""
    return int(np.diff(starts).max())


SIZES = ("lengths", "images", "image_places", "items", "labels")


def story_index(source: Source, config: EncodeConfig, spec: BatchSpec, folder: str | Path) -> StoryIndex:
    """The index of a source of stories, from its file in ``folder`` or made and left there.

    Args:
      spec: shapes of single samples; those of its fields that cut samples are read.

    Raises:
      DataError: the file is there and not readable; samples of the source are no stories.
    """
    depends = [
        *(source.fingerprint(), config.tokenizer.identity(), spec.image_tokens, spec.length),
        *(spec.sample_images, spec.targets, config.truncation, config.mask_all_inner_vokens),
    ]
    return kept_index(StoryIndex, "stories", depends, folder, lambda: measure_stories(source, config, spec))


def measure_stories(source: Source, config: EncodeConfig, spec: BatchSpec) -> StoryIndex:
    """Tokenises every wording of every sample, story by story; arguments as :func:`story_index`."""
    starts = stories_of(source)
    if starts is None:
        raise DataError(f"the samples of {source.describe()} are no stories")
    sizes = np.zeros((len(starts) - 1, len(SIZES)), np.int32)
    for story in tqdm(range(len(sizes)), desc="measuring stories", delay=2, unit="story"):
        samples = []
        for sample in range(int(starts[story]), int(starts[story + 1])):
            try:
                texts = source.texts(sample)
            except SampleError:
                continue  # found again, named and counted when the sample is read
            samples.append([_expand(*words, config, spec) for words in dict.fromkeys(texts)])
        if samples:
            sizes[story] = _measure(samples, spec.image_tokens)
    return StoryIndex(starts, **dict(zip(SIZES, sizes.T, strict=True)))


def _expand(source: str, target: str, config: EncodeConfig, spec: BatchSpec) -> TokenizedSample:
    return expand(
        config.tokenizer,
        source,
        target,
        image_tokens=spec.image_tokens,
        max_length=spec.length,
        max_images=spec.sample_images,
        max_targets=spec.targets,
        truncation=config.truncation,
        mask_all_inner_vokens=config.mask_all_inner_vokens,
    )


def _measure(samples: Sequence[Sequence[TokenizedSample]], image_tokens: int) -> tuple[int, ...]:
    """:data:`SIZES` of a story of which these are the wordings of its samples.

    What all wordings of a sample begin with is in the tree for certain, and shared; of what follows, the
    longest wording counts, shared or not.
    """
    keyed = [[image_keys(w.tokens, w.image_start, w.images, image_tokens) for w in each] for each in samples]
    certain = plant([each[0][: min(common(each[0], keys) for keys in each)] for each in keyed])
    first = [each[0] for each in keyed]
    nodes = {}  # node -> key, of what is certain
    for path, keys in zip(certain.paths, first, strict=True):
        nodes.update(zip(path.tolist(), keys))
    length, places = len(nodes), count_images(nodes.values(), image_tokens)
    for each, path in zip(keyed, certain.paths, strict=True):
        length += max(len(keys) - len(path) for keys in each)
        places += max(count_images(keys[len(path) :], image_tokens) for keys in each)
    images = {image for each in samples for wording in each for image in wording.images}
    items = sum(any(wording.voken_start is not None for wording in each) for each in samples)
    labels = sum(max(int((wording.labels != IGNORE).sum()) for wording in each) for each in samples)
    return length, len(images), places, items, labels


class TreePlan:
    """Steps of whole stories of about one size: a row is a story, its places are the story's samples.

    Stories are shuffled and put into steps as :class:`BucketPlan` does with samples; the lengths of rows are
    those that hold 35, 70, 95 and 100 % of the stories.  A step holds ``shape.micro * shape.rows`` stories;
    places that a shorter story leaves are empty.

    Args:
      stories: their sizes.
      limit: positions of a sample.
      seed, num_epochs, shape: as in :class:`StreamPlan`, ``shape.places`` samples of a story.

    Attributes:
      lengths: of rows, ascending.
    """

    SHARES, MULTIPLE = (0.35, 0.7, 0.95, 1.0), 4

    def __init__(self, stories: StoryIndex, *, limit: int, seed: int, num_epochs: int | None, shape: Shape):
        if shape.places < stories.samples:
            raise DataError(f"a story has {stories.samples} samples, a row {shape.places} places")
        sizes = np.ceil(np.quantile(np.maximum(stories.lengths, 2), self.SHARES) / self.MULTIPLE)
        self.lengths = tuple(sorted({int(size) * self.MULTIPLE for size in sizes}))
        self._stories, self._limit, self._places = stories, limit, shape.places
        self._units = BucketPlan(
            LengthIndex(stories.lengths, stories.images),
            self.lengths,
            seed=seed,
            num_epochs=num_epochs,
            shape=Shape(shape.micro, shape.rows),
        )
        self.num_steps = self._units.num_steps

    def find(self, number: int) -> tuple[int, int]:
        return divmod(number, int(self._stories.starts[-1]))

    def step(self, step: int) -> StepPlan:
        units, starts = self._units.step(step), self._stories.starts
        numbers = np.full((*units.numbers.shape[:2], self._places), EMPTY_SLOT, np.int64)
        for row in np.argwhere(units.numbers[..., 0] != EMPTY_SLOT):
            epoch, story = self._units.find(int(units.numbers[*row, 0]))
            samples = np.arange(starts[story], starts[story + 1])
            numbers[*row, : len(samples)] = epoch * starts[-1] + samples
        return StepPlan(numbers, np.full(numbers.shape, self._limit, np.int32), units.bucket)

    def shapes(self, spec: BatchSpec) -> list[BatchSpec]:
        """Shapes of a micro-batch of each length, from those of rows of single samples."""
        return [self._shape(spec, length) for length in self.lengths]

    def _shape(self, spec: BatchSpec, length: int) -> BatchSpec:
        inside = self._stories.lengths <= length  # shorter ones may be moved up
        most = {name: int(getattr(self._stories, name)[inside].max()) for name in SIZES}
        return dataclasses.replace(
            spec,
            length=length,
            targets=min(spec.targets, length),
            items=spec.rows * most["items"],
            images=spec.rows * most["images"],
            tree=TreeSpec(
                length=spec.length,
                images=spec.sample_images,
                image_places=most["image_places"],
                labels=max(1, most["labels"]),
            ),
        )
