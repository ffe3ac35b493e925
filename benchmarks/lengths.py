"""Lengths of captions and stories, drawn by seed (numbers of tokens; the sources of each number below).

They are those of CC3M and VIST as far as they are known without the language model's own tokenizer:
``performance.md`` 1.2 and 1.3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

CAPTION_MEAN, CAPTION_STD = 13.4, 5.85  # CC3M: 10.3 words (its paper), 1.3 tokens to a word
CAPTION_RANGE = (3, 60)
VOKENS, END = 8, 1  # [IMG0] ... [IMG7], ###

SYSTEM = 45  # BOS and the prompt in front of a story
TEXT_MEAN = 13.0  # of a step
TEXT_STD = TEXT_MEAN * CAPTION_STD / CAPTION_MEAN  # as spread as captions are: VIST's own is not known
TEXT_RANGE = (3, 40)
IMAGE_TOKENS, IMAGE_WORDS = 32, 7  # of an input image, and of the signs around it
REQUEST = {"gen": 18, "multimodal": 14, "understanding": 17}  # words of a task's request
STEPS = 5  # of a story


@dataclasses.dataclass(frozen=True)
class StorySample:
    """One of a story's thirteen samples.

    Attributes:
      step: from 0.  task: a key of :data:`REQUEST`.
    """

    step: int
    task: str


SAMPLES = tuple(StorySample(step, task) for step in range(STEPS) for task in REQUEST if step or task == "gen")
"""The samples of a story in the original's order (fidelity 5.3)."""


def _draw(
    shape: int | tuple[int, ...], seed: int, mean: float, std: float, span: tuple[int, int]
) -> np.ndarray:
    """Gamma-distributed, as lengths are: never negative, so that clipping does not move the mean."""
    values = np.random.default_rng(seed).gamma((mean / std) ** 2, std**2 / mean, shape)
    return np.clip(np.round(values), *span).astype(np.int64)


def caption_lengths(count: int, seed: int, longest: int = CAPTION_RANGE[1]) -> np.ndarray:
    """Tokens of captions, i64[count]; without BOS, vokens and end."""
    return _draw(count, seed, CAPTION_MEAN, CAPTION_STD, (CAPTION_RANGE[0], longest))


def story_texts(count: int, seed: int) -> np.ndarray:
    """Tokens of the text of each step of each story, i64[count STEPS]."""
    return _draw((count, STEPS), seed, TEXT_MEAN, TEXT_STD, TEXT_RANGE)


def caption_sequence(caption: int) -> int:
    """Positions of a caption's sample: BOS, caption, vokens, end."""
    return 1 + caption + VOKENS + END


def story_sequence(texts: np.ndarray, sample: StorySample) -> int:
    """Positions of one sample of a story, of which ``texts`` are i64[STEPS]."""
    image = IMAGE_TOKENS + IMAGE_WORDS
    own = image if sample.task == "understanding" else VOKENS
    before = SYSTEM + int(texts[: sample.step].sum()) + image * sample.step
    return before + REQUEST[sample.task] + int(texts[sample.step]) + own + END


def input_images(sample: StorySample) -> int:
    """Images that a sample reads."""
    return sample.step + (sample.task == "understanding")


def draws(sample: StorySample) -> bool:
    """Whether it writes vokens."""
    return sample.task != "understanding"
