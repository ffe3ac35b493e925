"""What is judged: two systems' answers after the same scenes, and controls whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt5_jax.config import ConfigError
from minigpt5_jax.evaluation.human.design import Draw
from minigpt5_jax.evaluation.human.questions import QUESTIONS, TIE
from minigpt5_jax.evaluation.suite.samples import (
    IMAGE,
    Sample,
    Scene,
    join,
    read_predictions,
    read_references,
    read_scenes,
)

ITEM, TRUTH, IDENTICAL = "item", "truth", "identical"
"""Kinds: of two systems; the reference against that of another sample; an answer against itself."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One of two answers: whose, and what of it is shown.  ``image`` is None where none was drawn."""

    system: str
    text: str
    image: Path | None


@dataclasses.dataclass(frozen=True)
class Item:
    """Two answers after the same scenes.

    Attributes:
      kind: one of the kinds.  sample: whose scenes they are.
      expected: of controls, question -> the right answer, a system or a tie.
    """

    kind: str
    sample: str
    scenes: tuple[Scene, ...]
    options: tuple[Option, Option]
    expected: Mapping[str, str] = dataclasses.field(default_factory=dict)


def shown(text: str) -> str:
    """A text without the marks of a prompt and of images."""
    return text.replace(IMAGE, "").replace("###", "").strip()


def read_items(
    references: str,
    systems: Mapping[str, str],
    questions: Sequence[str],
    count: int | None,
    draw: Draw,
    allow_outside_images: bool = False,
) -> tuple[list[Item], list[Item]]:
    """Items, and controls of both kinds, of samples that are drawn from those of the references.

    Args:
      references: the file.  systems: name -> folder of predictions, two of them.
      count: items; None for all samples.

    Raises:
      ConfigError: not two systems, or a question about texts or images that nobody wrote.
      DataError: predictions of other samples, fewer than ``count`` or two, or a file that breaks the schema.
    """
    if len(systems) != 2 or {ITEM, TRUTH, TIE} & systems.keys():
        raise ConfigError(
            f"give two systems, --system NAME=DIR --system OTHER=DIR (not called {ITEM}, {TRUTH} or {TIE}), "
            f"got {len(systems)}"
        )
    wanted = read_references(references, allow_outside_images)
    scenes = read_scenes(references, allow_outside_images)
    answers = {
        name: {s.id: s for s in join(wanted, read_predictions(folder, allow_outside_images))}
        for name, folder in systems.items()
    }
    chosen = draw.order([reference.id for reference in wanted], "samples")[:count]
    if len(chosen) < (count or 2):
        raise ConfigError(
            f"{count or 2} items are wanted, but there are {len(wanted)} samples; lower --count"
        )

    def option(name: str, sample: Sample) -> Option:
        return Option(name, shown(sample.text), sample.image)

    def before(name: str) -> tuple[Scene, ...]:
        return tuple(
            tuple(shown(part) if isinstance(part, str) else part for part in scene) for scene in scenes[name]
        )

    items = []
    for name in chosen:
        pair = [option(system, answers[system][name]) for system in systems]
        first, second = pair[::-1] if draw.coin("option", name) else pair
        items.append(Item(ITEM, name, before(name), (first, second)))
    _check_questions(questions, items)
    truths = {r.id: Option(TRUTH, shown(r.text), r.image) for r in wanted}
    return items, _controls(items, truths, questions, draw)


def _check_questions(questions: Sequence[str], items: Sequence[Item]) -> None:
    """ConfigError for a question that is unknown, or about what no answer has."""
    if unknown := [name for name in questions if name not in QUESTIONS]:
        raise ConfigError(f"unknown question {', '.join(unknown)}; known: {', '.join(QUESTIONS)}")
    options = [option for item in items for option in item.options]
    texts, images = any(o.text for o in options), any(o.image for o in options)
    asks = {"continuity": texts, "quality": images, "coherence": texts or images}
    if bad := [name for name in questions if not asks[name]]:
        fitting = ",".join(name for name in questions if asks[name])
        what = "texts" if "continuity" in bad else "images"
        raise ConfigError(
            f"no answer has {what}, so {', '.join(bad)} cannot be judged: give --questions {fitting}"
        )


def _controls(
    items: Sequence[Item], truths: Mapping[str, Option], questions: Sequence[str], draw: Draw
) -> list[Item]:
    """For each item one of both kinds, where its sample allows it."""
    found = []
    for place, item in enumerate(items):
        other = truths[items[place - 1].sample]
        truth = truths[item.sample]
        expected = {"continuity": truth.text != other.text, "coherence": truth.image != other.image}
        right = {name: TRUTH for name in questions if expected.get(name)}
        if right and bool(truth.image) == bool(other.image) and bool(truth.text) == bool(other.text):
            wrong = dataclasses.replace(other, system="shuffled")
            pair = (wrong, truth) if draw.coin("control", item.sample) else (truth, wrong)
            found.append(Item(TRUTH, item.sample, item.scenes, pair, right))
        same = item.options[draw.coin("identical", item.sample)]
        found.append(Item(IDENTICAL, item.sample, item.scenes, (same, same), dict.fromkeys(questions, TIE)))
    return found
