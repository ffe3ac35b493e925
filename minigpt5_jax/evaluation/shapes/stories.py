"""Held-out stories: whether what earlier images show is drawn again, and whether the story goes on.

**Images** are asked for at the last step, as in the paper's context ablation (fidelity 9.1): by the
image-only prompt, with nothing before it (``none``), the earlier narrations (``text``), the earlier
images (``image``) or both (``image+text``); each with the current narration.  The model is made to
begin with the image; how often it would by itself is counted apart.  A story has the same noise in every
context.

**Attributes that only images reveal**: in half of the stories no text describes the subject.  The subject
is the object at its true place, else the first one that stands where no companion belongs; the choice looks
at no attribute, so guessing stays at chance.  Where there is none, all is wrong.

**Texts** are narrations of the last step: with its image to draw (``multimodal``) and from its image
(``understanding``), after the whole history.  They are measured by ROUGE-L against the true one.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.paths import image_folder
from minigpt5_jax.data.samples.stories import CONTEXTS, Step, Story, StoryRules
from minigpt5_jax.data.sources.vist import mapping_path, parse_story
from minigpt5_jax.data.text.prompts import STORY_PROMPTS
from minigpt5_jax.evaluation.shapes import counts
from minigpt5_jax.evaluation.shapes.revealed import Revealed, image_only_shares
from minigpt5_jax.inference.session import Prompt, Session, mixed_seed
from minigpt5_jax.shapes.dataset import read_truth, write_stories
from minigpt5_jax.shapes.stories import STEPS
from minigpt5_jax.shapes.world import Scene
from minigpt5_jax.wiring.session import LoadedModel

NARRATIONS = ("multimodal", "understanding")
FINAL = STEPS - 1
TABLE_6 = {"none": 0.61, "text": 0.64, "image": 0.69, "image+text": 0.70}
"""CLIP-I of the paper's LoRA model at the last step of VIST, for comparing the order."""


@dataclasses.dataclass(frozen=True)
class Tale:
    """A story as the model's reader gives it, and its truth as ``shapes_*_stories.jsonl`` has it."""

    story: Story
    truth: dict[str, Any]

    @property
    def scene(self) -> Scene:
        """What the last image shows."""
        return Scene.from_json(self.truth["steps"][FINAL]["scene"])


def judge_stories(
    run: LoadedModel,
    *,
    count: int,
    contexts: Sequence[str] = CONTEXTS,
    seed: int = 0,
    batch_size: int = 32,
    narrations: Sequence[str] = NARRATIONS,
) -> dict[str, Any]:
    """Everything above, of ``count`` held-out stories.

    Args:
      contexts: some of :data:`CONTEXTS`.  narrations: some of :data:`NARRATIONS`.

    Returns:
      ``{"count", "seed", "held_out": share of last scenes with an object of a held-out kind (a story begins
      with one, which may change), "contexts": {context: ...}, "order": contexts from the least to the most
      attributes right, "table_6", NARRATION: {"rouge_l", "of_another", "emitted", "cut"}, ...}``.  A context
      has ``image_only`` (:func:`~minigpt5_jax.evaluation.shapes.revealed.image_only_shares`),
      ``all_attributes`` (``attribute_shares``), ``emitted`` (the model
      begins an image by itself) and ``cut`` (prompts that did not fit).  Every share comes with its count
      and standard error.

    Raises:
      ConfigError: an unknown context or narration, a run of another world, one that cannot see and is to
        read images, or no package for ROUGE-L.
    """
    for given, known in ((contexts, CONTEXTS), (narrations, NARRATIONS)):
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    counts.check_run(run, reads_images=bool(narrations) or any("image" in one for one in contexts))
    if narrations:
        counts.rouge_scorer()  # a missing package is reported before the work
    drawer = counts.open_session(run, batch_size=batch_size, force_image="first", max_new_tokens=1)
    writer = counts.open_session(run, batch_size=batch_size)
    vokens, prompt_set = run.spec.backbone.num_vokens, run.config.data.prompt_set
    with tempfile.TemporaryDirectory() as directory:
        tales = read_tales(Path(directory), count, seed)
        found = {}
        for context in contexts:
            prompts = [
                context_prompt(tale.story, context, prompt_set, mixed_seed(seed, number))
                for number, tale in enumerate(tales)
            ]
            found[context] = judge_context(drawer, writer, tales, prompts, context)
        told = {}
        for task in narrations:
            told[task] = judge_narration(writer, tales, task, prompt_set, vokens, seed)
    order = sorted(found, key=lambda context: found[context]["all_attributes"]["together"]["share"])
    return {
        "count": count,
        "seed": seed,
        "held_out": counts.each([tale.scene.held_out for tale in tales]),
        "contexts": found,
        "order": order,
        "table_6": TABLE_6,
        **told,
    }


def read_tales(directory: Path, count: int, seed: int) -> list[Tale]:
    """Held-out stories, written to a folder and read as VIST's are."""
    path = write_stories(directory, "held_out", count, seed)
    paths, folder = json.loads(mapping_path(path).read_text()), image_folder(path, directory)
    stories = json.loads(path.read_text())
    tales = []
    for truth in read_truth(directory, "held_out", "stories"):
        name = truth["story_id"]
        story = parse_story(path, name, stories[name], paths, folder)
        if not isinstance(story, Story):
            raise story
        tales.append(Tale(story, truth))
    return tales


def context_prompt(story: Story, context: str, prompt_set: str = "head", seed: int = 0) -> Prompt:
    """The image-only prompt of the last step with one of :data:`CONTEXTS` before it (fidelity 9.1)."""
    example = StoryRules(prompt_set=prompt_set).worded(story, FINAL, "gen", wording=0, context=context)
    return Prompt(example.source, example.images, seed)


def texts_read(story: Story, context: str) -> list[str]:
    """Narrations that the prompt of a context holds."""
    before: Sequence[Step] = story.steps if "text" in context else story.steps[-1:]
    return [step.text for step in before]


def judge_context(
    drawer: Session, writer: Session, tales: Sequence[Tale], prompts: Sequence[Prompt], context: str
) -> dict[str, Any]:
    """One context's numbers; ``drawer`` begins with an image, ``writer`` is free."""
    answers, free = drawer.generate(prompts), writer.generate(prompts, images=False)
    drawn = counts.scenes_drawn(answers)
    voken = writer.tokenizer.first_voken_id
    revealed = [
        Revealed.of(got, tale.truth["steps"][FINAL], texts_read(tale.story, context))
        for got, tale in zip(drawn, tales)
    ]
    return {
        "emitted": counts.each([voken in answer.token_ids for answer in free]),
        "cut": sum(max(pair) > 0 for pair in zip((a.dropped for a in answers), (a.dropped for a in free))),
        "image_only": image_only_shares(revealed),
        "all_attributes": counts.attribute_shares([(got, t.scene) for got, t in zip(drawn, tales)]),
    }


def judge_narration(
    writer: Session, tales: Sequence[Tale], task: str, prompt_set: str, num_vokens: int, seed: int
) -> dict[str, Any]:
    """ROUGE-L of the last step's narration; ``of_another``: that of true narrations of other stories."""
    prompts, rules = [], StoryRules(prompt_set=prompt_set, num_vokens=num_vokens)
    for number, tale in enumerate(tales):
        wording = number % len(STORY_PROMPTS[prompt_set][task])
        example = rules.worded(tale.story, FINAL, task, wording=wording)
        prompts.append(Prompt(example.source, example.images, mixed_seed(seed, number)))
    answers = writer.generate(prompts, images=False)
    wanted = [tale.story.steps[FINAL].text for tale in tales]
    others = wanted if len(wanted) > 1 else []
    voken = writer.tokenizer.first_voken_id
    return {
        "rouge_l": counts.rouge_l([answer.text for answer in answers], wanted),
        "of_another": counts.rouge_l(others[1:] + others[:1], others),
        "emitted": counts.each([voken in answer.token_ids for answer in answers]),
        "cut": sum(answer.dropped > 0 for answer in answers),
    }
