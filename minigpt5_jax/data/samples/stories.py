"""Samples of an image story: three tasks for every step, in the original's order (fidelity 5.3).

Step ``k`` of a story reads the texts and images of the steps before and

* ``gen``: its own text; the model draws its image;
* ``multimodal`` (k >= 1): nothing more; the model writes its text and draws its image;
* ``understanding`` (k >= 1): its own image; the model writes its text.

Training uses all three (13 samples of five steps), testing ``gen`` alone (5 samples).  Texts are taken as
they are written, and stories take no part in the caption loss.  What a sample reads of the steps before is
its context (:data:`CONTEXTS`, the papers' context ablation, fidelity 9.1): both in the original's training.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import ImageSource
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text import prompts
from minigpt5_jax.data.text.templates import IMAGE, target_text

TASKS = ("gen", "multimodal", "understanding")
CONTEXTS = ("none", "text", "image", "image+text")


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A text, its image (path or encoded bytes) and its number in the file."""

    text: str
    picture: ImageSource
    sequence_index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """Steps in order; ``where`` is the story as a user finds it again."""

    id: str
    steps: tuple[Step, ...]
    where: str


def story_tasks(training: bool, tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """The tasks to use: those asked for, else all in training and ``gen`` in testing.

    Raises:
      DataError: no task, or one that is not in :data:`TASKS`.
    """
    if tasks is None:
        return TASKS if training else TASKS[:1]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise DataError(f"story tasks must be some of {', '.join(TASKS)}; got {', '.join(tasks) or 'none'}")
    return tuple(task for task in TASKS if task in tasks)


def story_samples(
    num_steps: int, training: bool, tasks: Sequence[str] | None = None
) -> list[tuple[int, str]]:
    """(number of the step, task) of a story's samples in order; arguments as :func:`story_tasks`."""
    wanted = story_tasks(training, tasks)
    return [(step, task) for step in range(num_steps) for task in wanted if step or task == "gen"]


def story_example(
    story: Story,
    step: int,
    task: str,
    *,
    wording: int,
    prompt_set: str = "head",
    num_vokens: int = 8,
    context: str = "image+text",
) -> Example:
    """One sample.

    Args:
      step: number of the step, from 0.
      task: one of :data:`TASKS`; all but ``gen`` need a step before.
      wording: which of ``STORY_PROMPTS[prompt_set][task]``.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      num_vokens: vokens of one image.
      context: one of :data:`CONTEXTS`, what is read of the steps before.

    Raises:
      DataError: an unknown context.
    """
    if context not in CONTEXTS:
        raise DataError(f"unknown context {context!r}; known: {', '.join(CONTEXTS)}")
    now, before = story.steps[step], story.steps[:step]
    draws = task != "understanding"
    request = prompts.STORY_PROMPTS[prompt_set][task][wording].format(text=now.text)
    parts = [[one.text] * ("text" in context) + [IMAGE] * ("image" in context) for one in before]
    pictures = [one.picture for one in before if "image" in context]
    return Example(
        source=prompts.story_source([*itertools.chain(*parts)], request),
        target=target_text("" if task == "gen" else now.text, draws=draws, num_vokens=num_vokens),
        images=(*pictures, now.picture) if task == "understanding" else tuple(pictures),
        target_image=now.picture if draws else None,
        caption=None,
        task=f"story-{task}",
        item_id=f"{story.id}_{now.sequence_index}-{task}",
        where=story.where,
    )


@dataclasses.dataclass(frozen=True)
class StoryRules:
    """How stories become samples.

    Attributes:
      training: whether ``tasks=None`` means all tasks or ``gen`` alone.
      tasks: the tasks to use, whatever ``training`` is.
      prompt_set, num_vokens: as :func:`story_example`.
      seed: of the wordings.
      resample_prompts: draw wordings and contexts again each epoch; False keeps the first draw (quirk Q24).
      context_dropout: share of the samples with steps before that read their texts or their images only,
        each as often; 0 in the original.

    Raises:
      DataError: an unknown task or prompt set, or a share outside 0..1.
    """

    training: bool = True
    tasks: Sequence[str] | None = None
    prompt_set: str = "head"
    seed: int = 0
    resample_prompts: bool = True
    num_vokens: int = 8
    context_dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "tasks", story_tasks(self.training, self.tasks))
        prompts.check_prompt_set(self.prompt_set)
        if not 0 <= self.context_dropout <= 1:
            raise DataError(f"context_dropout={self.context_dropout} is no share; give one from 0 to 1")

    def settings(self) -> tuple:
        """What samples depend on, for fingerprints; without a dropout those of the time before it."""
        values = dataclasses.astuple(self)
        return values if self.context_dropout else values[:-1]

    def samples(self, num_steps: int) -> list[tuple[int, str]]:
        """(number of the step, task) of a story's samples, in order."""
        return story_samples(num_steps, self.training, self.tasks)

    def _one(self, story: Story, step: int, task: str, wording: int, context: str = "image+text") -> Example:
        return story_example(
            story,
            step,
            task,
            wording=wording,
            context=context,
            prompt_set=self.prompt_set,
            num_vokens=self.num_vokens,
        )

    def wordings(self, story: Story, step: int, task: str) -> list[Example]:
        """The sample in every wording it may have, with its whole context."""
        return [
            self._one(story, step, task, n) for n in range(len(prompts.STORY_PROMPTS[self.prompt_set][task]))
        ]

    def texts(self, story: Story, step: int, task: str) -> list[tuple[str, str]]:
        """(source, target) of every wording the sample may have; a thinned context only shortens them."""
        return [(example.source, example.target) for example in self.wordings(story, step, task)]

    def example(self, story: Story, step: int, task: str, epoch: int = 0) -> Example:
        """The sample in the wording and context of this epoch, drawn by seed, epoch and the sample's name."""
        choices = self.wordings(story, step, task)
        key = (self.seed, epoch if self.resample_prompts else 0, zlib.crc32(choices[0].item_id.encode()))
        random = np.random.default_rng(key)
        wording = int(random.integers(len(choices)))
        if not (step and self.context_dropout):
            return choices[wording]
        draw, half = random.random(), self.context_dropout / 2
        context = "text" if draw < half else "image" if draw < 2 * half else "image+text"
        return self._one(story, step, task, wording, context)
