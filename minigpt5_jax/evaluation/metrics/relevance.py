"""Scores of a turn's parts together: MM-Relevance in both forms, and whether an image came when one was due.

Features are rows of unit length, so a product is a cosine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MMREL = ("m5", "official")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One modality of one turn: whether the reference has it, whether it was made, and how alike both are.

    Raises:
      ValueError: a similarity where one of both is missing, or none where both are there.
    """

    wanted: bool
    made: bool
    similarity: float | None = None

    def __post_init__(self) -> None:
        if (self.similarity is not None) != (self.wanted and self.made):
            raise ValueError(f"{self}: a similarity is there exactly where both sides are")


def _f1(total: float, made: int, wanted: int) -> float:
    if not made or not wanted or total == 0:
        return 0.0
    precision, recall = total / made, total / wanted
    return 2 * precision * recall / (precision + recall)


def mm_relevance_m5(slots: Sequence[Slot]) -> float:
    """MM-Relevance of one dialogue as MiniGPT-5's code has it (Q49).

    The cosines of all turns and of both modalities are summed; precision divides by what was made, recall by
    what was wanted.  Texts meet texts and images meet images.  0 without any similarity.
    """
    total = math.fsum(slot.similarity for slot in slots if slot.similarity is not None)
    return _f1(total, sum(slot.made for slot in slots), sum(slot.wanted for slot in slots))


def mm_relevance_official(predicted: Float[np.ndarray, "m d"], reference: Float[np.ndarray, "n d"]) -> float:
    """MM-Relevance of one response as MMDialog defines it.

    Elements are paired from the left, whatever their modality; cosines are not scaled.
    """
    pairs = min(len(predicted), len(reference))
    total = float(np.sum(predicted[:pairs].astype(np.float64) * reference[:pairs]))
    return _f1(total, len(predicted), len(reference))


def paired_similarity(
    predicted: Float[np.ndarray, "m d"], reference: Float[np.ndarray, "n d"]
) -> float | None:
    """MMDialog's score of one modality: cosines paired from the left, over the number in the reference.

    What is missing counts 0, what is too much does not count; None without a reference.
    """
    pairs = min(len(predicted), len(reference))
    total = float(np.sum(predicted[:pairs].astype(np.float64) * reference[:pairs]))
    return total / len(reference) if len(reference) else None


@dataclasses.dataclass(frozen=True)
class CalledFor:
    """How well images come where the reference has one; a share without cases is None."""

    precision: float | None
    recall: float | None
    f1: float | None
    exact: float | None
    n: int


def image_when_called_for(wanted: Sequence[bool], made: Sequence[bool]) -> CalledFor:
    """Precision, recall, F1 and share of right turns of "an image exactly when one is called for"."""
    pairs = list(zip(wanted, made, strict=True))
    both, needs, has = sum(w and m for w, m in pairs), sum(w for w, _ in pairs), sum(m for _, m in pairs)
    return CalledFor(
        both / has if has else None,
        both / needs if needs else None,
        2 * both / (has + needs) if has + needs else None,
        sum(w == m for w, m in pairs) / len(pairs) if pairs else None,
        len(pairs),
    )


def interrel_inf(
    texts: Float[np.ndarray, "n d"],
    images: Float[np.ndarray, "n d"],
    made_texts: Float[np.ndarray, "n d"],
    made_images: Float[np.ndarray, "n d"],
) -> float:
    """InterRel of one sequence as M2Chat's equation 8 may be meant, times 100.

    The equation has neither a normaliser nor a rule for the end, and no code was published: this is the mean
    of the terms that are defined, over both directions (text with image, image with text).  Its name says
    that it is inferred; it does not belong into a table of the paper.

    Raises:
      ValueError: an empty sequence.
    """
    if not len(texts):
        raise ValueError("InterRel of a sequence without steps")
    terms = [
        np.sum(given[: len(given) - shift].astype(np.float64) * made[shift:], axis=1)
        for given, made in ((texts, made_images), (images, made_texts))
        for shift in (0, 1)
    ]
    return 100 * float(np.concatenate(terms).mean())
