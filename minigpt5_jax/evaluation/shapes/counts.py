"""What the judges of the small world share: sessions for their prompts, comparing scenes, and counting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError
from minigpt5_jax.inference.session import Generation, Session
from minigpt5_jax.shapes.oracle import read
from minigpt5_jax.shapes.render import IMAGE_SIZE
from minigpt5_jax.shapes.world import ATTRIBUTES, Object, Scene
from minigpt5_jax.wiring.session import LoadedModel

NEW_TOKENS = 64  # no text of the small world is longer; a run's own limit may be lower
Numbers = dict[str, float | int | bool | None]


def check_run(run: LoadedModel, *, reads_images: bool) -> None:
    """Whether the oracle can read what a run draws, and the run what is put to it.

    Raises:
      ConfigError: images of another size than the small world's, or no vision tower.
    """
    size = run.spec.generator.image_size
    if size != IMAGE_SIZE:
        raise ConfigError(
            f"the oracle reads images of {IMAGE_SIZE} pixels, this run draws {size} "
            "(model.generator.image_size); judge a run of the small world"
        )
    if reads_images and not run.spec.backbone.image_tokens:
        raise ConfigError(
            "this run's model has no vision tower and cannot read images; "
            "judge its stories with contexts none and text and no narrations, or a run that sees"
        )


def open_session(run: LoadedModel, *, batch_size: int, **inference: object) -> Session:
    """A session with the run's settings, ``inference`` keys replaced.

    A prompt may be as long as the model; an answer has one image at most, unforced, and room for
    :data:`NEW_TOKENS`.

    Raises:
      ConfigError: settings that do not go together.
    """
    config = ConfigDict(run.config.to_dict())
    tokens = max(NEW_TOKENS, config.inference.max_new_tokens)
    config.inference.update(max_images=1, force_image="off", max_new_tokens=tokens)
    config.inference.update(inference)
    image = run.spec.backbone.num_vokens - 1
    room = config.inference.max_new_tokens + config.inference.max_images * image
    positions = run.spec.backbone.max_positions
    if room >= positions:
        raise ConfigError(
            f"an answer may take {room} positions (inference.max_new_tokens="
            f"{config.inference.max_new_tokens}), the language model has {positions}; lower the former"
        )
    config.data.max_length = positions - room
    return dataclasses.replace(run, config=config).session(batch_size=batch_size)


def scenes_drawn(answers: Sequence[Generation]) -> list[Scene | None]:
    """What the oracle reads in the first image of each answer; None where there is none."""
    there = [number for number, answer in enumerate(answers) if answer.images]
    found: list[Scene | None] = [None] * len(answers)
    if there:
        images = np.stack([answers[number].images[0] for number in there])
        for number, scene in zip(there, read(images), strict=True):
            found[number] = scene
    return found


def object_at(scene: Scene | None, place: int) -> Object | None:
    """What stands at a place."""
    if scene is None:
        return None
    return next((item for item in scene.objects if item.place == place), None)


def attributes_right(got: Scene | None, want: Scene) -> dict[str, list[bool]]:
    """Attribute -> whether it is right, object by object of ``want``; ``background`` has one entry.

    Where nothing stands at an object's place, all of its attributes are wrong; ``place`` asks just whether
    something does.  Objects too many are not counted here.
    """
    right = {"background": [got is not None and got.background == want.background]}
    pairs = [(object_at(got, item.place), item) for item in want.objects]
    for name in ATTRIBUTES:
        right[name] = [
            drawn is not None and getattr(drawn, name) == getattr(item, name) for drawn, item in pairs
        ]
    return right


def share(groups: Sequence[Sequence[bool | float]], name: str = "share") -> Numbers:
    """``{name: mean, "count", "standard_error"}`` of what is asked in groups (stories, dialogues).

    The standard error is that of a ratio of sums over independent groups:
    ``sqrt(sum_g (right_g - share * asked_g)^2) / asked``.  Both are None where nothing was asked.
    """
    asked = np.array([len(group) for group in groups], float)
    total = int(asked.sum())
    if not total:
        return {name: None, "count": 0, "standard_error": None}
    right = np.array([float(sum(group)) for group in groups])
    mean = right.sum() / total
    error = math.sqrt(np.square(right - mean * asked).sum()) / total
    return {name: float(mean), "count": total, "standard_error": error}


def each(values: Sequence[bool | float], name: str = "share") -> Numbers:
    """:func:`share` of values that are independent."""
    return share([[value] for value in values], name)


def attribute_shares(rows: Sequence[tuple[Scene | None, Scene]]) -> dict[str, Numbers]:
    """Shares right over (drawn, true) scenes, and the mean number of objects ``too_many``.

    ``all_right``: everything; ``together``: all attributes of all objects and the background; and each one.
    """
    right = [attributes_right(got, want) for got, want in rows]
    found = {
        "all_right": each([got == want for got, want in rows]),
        "together": share([[value for values in row.values() for value in values] for row in right]),
    }
    for name in ("background", *ATTRIBUTES):
        found[name] = share([row[name] for row in right])
    surplus = [float(max(0, len(got.objects) - len(want.objects))) if got else 0.0 for got, want in rows]
    return found | {"too_many": each(surplus, "mean")}


def rouge_scorer() -> Any:
    """ROUGE-L of the package rouge-score: the F measure of the longest common subsequence of words.

    Raises:
      ConfigError: the package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "ROUGE-L needs the package rouge-score; install it: pip install rouge-score"
        ) from None
    return RougeScorer(["rougeL"])


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> Numbers:
    """Mean ROUGE-L of texts; see :func:`rouge_scorer`."""
    scorer, pairs = rouge_scorer(), zip(texts, references, strict=True)
    return each([float(scorer.score(want, got)["rougeL"].fmeasure) for got, want in pairs], "mean")
