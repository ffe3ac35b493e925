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
    image: ImageSource
    sequence_index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """Steps in order; ``where`` is the story as a user finds it again."""

    id: str
    steps: tuple[Step, ...]
    where: str


@dataclasses.dataclass(frozen=True)
class StoryRules:
    """How stories become samples.

    Attributes:
      training: whether ``tasks=None`` means all tasks or ``gen`` alone.
      tasks: some of :data:`TASKS`, whatever ``training`` is; kept in their order.
      prompt_set: ``head`` or ``release``, the wording of the original's two code generations.
      seed: of the wordings.
      resample_prompts: draw wordings and contexts again each epoch; False keeps the first draw (quirk Q24).
      num_vokens: vokens of one image.
      context_dropout: share of the samples with steps before that read their texts or their images only,
        each as often; 0 in the original.

    Raises:
      DataError: no task, an unknown task or prompt set, or a share outside 0..1.
    """

    training: bool = True
    tasks: Sequence[str] | None = None
    prompt_set: str = "head"
    seed: int = 0
    resample_prompts: bool = True
    num_vokens: int = 8
    context_dropout: float = 0.0

    def __post_init__(self):
        wanted = self.tasks
        if wanted is None:
            wanted = TASKS if self.training else TASKS[:1]
        if not wanted or not set(wanted) <= set(TASKS):
            given = ", ".join(wanted) or "none"
            raise DataError(f"story tasks must be some of {', '.join(TASKS)}; got {given}")
        object.__setattr__(self, "tasks", tuple(task for task in TASKS if task in wanted))
        prompts.check_prompt_set(self.prompt_set)
        if not 0 <= self.context_dropout <= 1:
            raise DataError(f"context_dropout={self.context_dropout} is no share; give one from 0 to 1")

    def settings(self) -> tuple:
        """What samples depend on, for fingerprints; without a dropout those of the time before it."""
        values = dataclasses.astuple(self)
        return values if self.context_dropout else values[:-1]

    def samples(self, num_steps: int) -> list[tuple[int, str]]:
        """(number of the step, task) of a story's samples, in order."""
        return [(step, task) for step in range(num_steps) for task in self.tasks if step or task == "gen"]

    def worded(
        self, story: Story, step: int, task: str, *, wording: int, context: str = "image+text"
    ) -> Example:
        """The sample in one wording and context.

        Args:
          step: number of the step, from 0.
          task: one of :data:`TASKS`; all but ``gen`` need a step before.
          wording: which of ``STORY_PROMPTS[prompt_set][task]``.
          context: one of :data:`CONTEXTS`, what is read of the steps before.

        Raises:
          DataError: an unknown context.
        """
        if context not in CONTEXTS:
            raise DataError(f"unknown context {context!r}; known: {', '.join(CONTEXTS)}")
        now, before = story.steps[step], story.steps[:step]
        draws = task != "understanding"
        request = prompts.STORY_PROMPTS[self.prompt_set][task][wording].format(text=now.text)
        parts = [[one.text] * ("text" in context) + [IMAGE] * ("image" in context) for one in before]
        images = [one.image for one in before if "image" in context]
        written = "" if task == "gen" else now.text
        return Example(
            source=prompts.story_source([*itertools.chain(*parts)], request),
            target=target_text(written, draws=draws, num_vokens=self.num_vokens),
            images=(*images, now.image) if task == "understanding" else tuple(images),
            target_image=now.image if draws else None,
            caption=None,
            task=f"story-{task}",
            item_id=f"{story.id}_{now.sequence_index}-{task}",
            where=story.where,
        )

    def wordings(self, story: Story, step: int, task: str) -> list[Example]:
        """The sample in every wording it may have, with its whole context."""
        count = len(prompts.STORY_PROMPTS[self.prompt_set][task])
        return [self.worded(story, step, task, wording=number) for number in range(count)]

    def texts(self, story: Story, step: int, task: str) -> list[tuple[str, str]]:
        """(source, target) of every wording the sample may have; a thinned context only shortens them."""
        return [example.words for example in self.wordings(story, step, task)]

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
        return self.worded(story, step, task, wording=wording, context=context)
