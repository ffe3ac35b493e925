"""Synthetic samples of given lengths as sources of the project's own data layer, so that loaders, buckets and
packing are those of training.

Words are pieces of the packaged tokenizer, one token each, drawn by seed: no two samples share a beginning
that real ones would not share.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from benchmarks import lengths
from minigpt5_jax.data.samples.example import Example, Ready
from minigpt5_jax.data.sources.base import Source, stories_of
from minigpt5_jax.data.sources.features import FeatureSpec
from minigpt5_jax.data.text.templates import target_text
from minigpt5_jax.data.text.tokenizer import IMAGE_TOKEN

WORDS = (
    "striped top bottom and upper lower small large big tiny triangle that background star blue orange shape "
    "image red yellow purple with dotted green there solid plain spotted picture generate you are pink white "
    "gray black square"
).split()
IMAGE = Ready(np.zeros(0, np.float32))  # stands for an image whose features are given by the store


class Captions(Source):
    """Stage-1 samples: i captions of ``counts[i]`` tokens, an image to draw each."""

    ends_in_vokens = True

    def __init__(self, counts: np.ndarray, seed: int = 0):
        self._counts, self._seed = counts, seed

    def __len__(self) -> int:
        return len(self._counts)

    def example(self, index: int, epoch: int = 0) -> Example:
        random = np.random.default_rng((self._seed, index))
        caption = _words(random, int(self._counts[index]))
        target = target_text("", draws=True)
        return Example(caption, target, (), IMAGE, caption, "cc3m", f"cc3m_{index}", f"drawn:{index}")

    def fingerprint(self) -> str:
        return _hash("captions", self._counts, self._seed)

    def describe(self) -> str:
        return f"{len(self)} drawn captions"


class Stories(Source):
    """Stage-2 samples: thirteen for each row of ``texts`` (tokens of its steps), in the original's order."""

    def __init__(self, texts: np.ndarray, seed: int = 0):
        self._texts, self._seed = texts, seed

    def __len__(self) -> int:
        return len(self._texts) * len(lengths.SAMPLES)

    def example(self, index: int, epoch: int = 0) -> Example:
        story, number = divmod(index, len(lengths.SAMPLES))
        sample, counts = lengths.SAMPLES[number], self._texts[story]
        random = np.random.default_rng((self._seed, story))
        system = _words(random, lengths.SYSTEM - 1)  # BOS is the template's
        texts = [_words(random, int(count)) for count in counts]
        requests = {task: _words(random, count) for task, count in lengths.REQUEST.items()}
        before = " ".join([system, *(f"{text} {_image(random)}" for text in texts[: sample.step])])
        own = {"gen": texts[sample.step], "multimodal": "", "understanding": _image(random)}[sample.task]
        written = "" if sample.task == "gen" else texts[sample.step]
        draws = lengths.draws(sample)
        return Example(
            " ".join(filter(None, (before, requests[sample.task], own))),
            target_text(written, draws=draws),
            (IMAGE,) * lengths.input_images(sample),
            IMAGE if draws else None,
            None,
            f"story-{sample.task}",
            f"{story}_{sample.step}-{sample.task}",
            f"drawn:{story}",
        )

    def stories(self) -> np.ndarray:
        return np.arange(len(self._texts) + 1) * len(lengths.SAMPLES)

    def fingerprint(self) -> str:
        return _hash("stories", self._texts, self._seed)

    def describe(self) -> str:
        return f"{len(self)} samples of {len(self._texts)} drawn stories"


class Featured(Source):
    """The samples of a source with given features in the place of their images.

    Args:
      source: the samples.
      spec: what the features are.
      targets: sample -> moments of its image; zeros by default, where only shapes matter.
    """

    def __init__(self, source: Source, spec: FeatureSpec, targets: np.ndarray | None = None):
        self._source, self.spec, self._targets = source, spec, targets
        self.ends_in_vokens = source.ends_in_vokens

    def __len__(self) -> int:
        return len(self._source)

    def example(self, index: int, epoch: int = 0) -> Example:
        example = self._source.example(index, epoch)
        draws = example.target_image is not None
        # Input images are different ones, as the images of a story are.
        images = tuple(
            Ready(np.full(self.spec.image or 0, n, self.spec.dtype("image")))
            for n in range(len(example.images))
        )
        return dataclasses.replace(
            example, images=images, target_image=Ready(self._target(index)) if draws else None
        )

    def _target(self, index: int) -> np.ndarray:
        if self._targets is not None:
            return self._targets[index]
        return np.zeros(self.spec.target, self.spec.dtype("target"))

    def texts(self, index: int) -> list[tuple[str, str]]:
        return self._source.texts(index)

    def stories(self) -> np.ndarray | None:
        return stories_of(self._source)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def describe(self) -> str:
        return self._source.describe()


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, count))


def _image(random: np.random.Generator) -> str:
    """An input image between as many words as its signs take."""
    first = lengths.IMAGE_WORDS // 2
    return f"{_words(random, first)} {IMAGE_TOKEN} {_words(random, lengths.IMAGE_WORDS - first)}"


def _hash(name: str, counts: np.ndarray, seed: int) -> str:
    return hashlib.sha256(f"{name} {seed}".encode() + counts.tobytes()).hexdigest()
