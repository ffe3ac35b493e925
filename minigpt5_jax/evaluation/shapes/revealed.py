"""Attributes that only images reveal: which are drawn right, and how far that is from guessing."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from minigpt5_jax.evaluation.shapes.counts import object_at, share
from minigpt5_jax.shapes.wording import understand
from minigpt5_jax.shapes.world import BACKGROUNDS, NAMES, PLACES, Object, Scene

ASKED = ("shape", "colour", "size", "texture", "background")
VALUES = {name: len(NAMES[name]) for name in ASKED[:-1]} | {"background": len(BACKGROUNDS)}


@dataclasses.dataclass(frozen=True)
class Revealed:
    """A last step whose truth lists attributes that only images reveal.

    Attributes:
      got, want: what was drawn (None for nothing) and what is true.
      place: of the subject.  names: what is asked, some of :data:`ASKED`.
      texts: the narrations that the model read.
    """

    got: Scene | None
    want: Scene
    place: int
    names: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, got: Scene | None, truth: dict[str, Any], texts: Sequence[str]) -> Revealed:
        """From a step's truth in ``shapes_*_stories.jsonl``."""
        place, names = PLACES.index(truth["subject_place"]), tuple(truth["only_images"])
        return cls(got, Scene.from_json(truth["scene"]), place, names, tuple(texts))

    @property
    def subject(self) -> Object | None:
        """The drawn subject: at its place, else the first object where no companion belongs."""
        if self.got is None:
            return None
        companions = {item.place for item in self.want.objects} - {self.place}
        others = (item for item in self.got.objects if item.place not in companions)
        return object_at(self.got, self.place) or next(others, None)

    def drawn(self, name: str) -> int | None:
        """Index of the drawn value; None where there is nothing to have one."""
        holder = self.got if name == "background" else self.subject
        return None if holder is None else getattr(holder, name)

    def true(self, name: str) -> int:
        """Index of the true value."""
        return getattr(self.want if name == "background" else object_at(self.want, self.place), name)

    def left_open(self, name: str) -> int:
        """How many values the texts leave possible: a companion never has the subject's shape."""
        if name != "shape":
            return VALUES[name]
        told = {item["shape"] for text in self.texts for item in understand(text).objects}
        return VALUES[name] - len(told)


def image_only_shares(steps: Sequence[Revealed]) -> dict[str, Any]:
    """Shares right of what only images reveal, each beside what guessing gives.

    Returns:
      ``{"stories": stories with such attributes, "placed": share of subjects at their place, "found": share
      of subjects found at all, "together" and each of ASKED: {"share", "count", "standard_error", "chance",
      "chance_by_texts", "chance_by_margins", "from_chance", "near_chance"}}``:

      * ``chance``: mean of 1 / number of values;
      * ``chance_by_texts``: the same over the values that the texts leave open;
      * ``chance_by_margins``: right if the drawn values were dealt out among the stories at random, which
        minds that values are not equally frequent, and images without a subject;
      * ``from_chance``: how far the share is from the range of ``chance`` to ``chance_by_texts``, in which it
        tells of nothing but texts, in standard errors (of the share or of guessing, the larger);
      * ``near_chance``: whether that is two of them at most.
    """
    steps = [step for step in steps if step.names]
    result: dict[str, Any] = {
        "stories": len(steps),
        "placed": share([[object_at(step.got, step.place) is not None] for step in steps]),
        "found": share([[step.subject is not None] for step in steps]),
    }
    by_margins = {name: _by_margins([step for step in steps if name in step.names], name) for name in ASKED}
    for key, names in (("together", ASKED), *((name, (name,)) for name in ASKED)):
        asked = [[name for name in step.names if name in names] for step in steps]
        right = [[s.drawn(name) == s.true(name) for name in some] for s, some in zip(steps, asked)]
        row = share(right)
        uniform = [1 / VALUES[name] for some in asked for name in some]
        by_texts = [1 / s.left_open(name) for s, some in zip(steps, asked) for name in some]
        margins = [by_margins[name] for some in asked for name in some]
        result[key] = row | _beside_chance(row, uniform, by_texts, margins)
    return result


def _beside_chance(row: dict[str, Any], *guesses: Sequence[float]) -> dict[str, Any]:
    if not row["count"]:
        names = ("chance", "chance_by_texts", "chance_by_margins", "from_chance", "near_chance")
        return dict.fromkeys(names)
    chance, by_texts, by_margins = (sum(values) / len(values) for values in guesses)
    away = row["share"] - min(max(row["share"], chance), by_texts)
    # where all or none of a few are right, the share's own error is 0
    error = max(row["standard_error"], math.sqrt(chance * (1 - chance) / row["count"]))
    return {
        "chance": chance,
        "chance_by_texts": by_texts,
        "chance_by_margins": by_margins,
        "from_chance": away / error,
        "near_chance": abs(away) <= 2 * error,
    }


def _by_margins(steps: Sequence[Revealed], name: str) -> float:
    """Chance that the drawn value of one step is the true value of another drawn at random with it."""
    drawn = collections.Counter(step.drawn(name) for step in steps)
    true = collections.Counter(step.true(name) for step in steps)
    return sum(drawn[value] * true[value] for value in true) / max(1, len(steps)) ** 2
