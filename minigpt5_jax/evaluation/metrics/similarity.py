"""Cosines, and the scores that are made of those of CLIP and of sentence embeddings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

CAPTION_PREFIX = "A photo depicts "
"""Before every text of CLIPScore as it was published (EMNLP 2021)."""


def cosines(one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Cosine of each pair of rows of unit length: CLIP-I, CLIP-T and S-BERT of the papers, float64.

    Nothing is scaled or clipped; the papers print means over samples.
    """
    return np.sum(one.astype(np.float64) * other, axis=1)


def clip_score(similarities: Float[np.ndarray, " n"]) -> float:
    """CLIPScore of torchmetrics: 100 times the mean cosine of image and text, at least 0.

    Raises:
      ValueError: no samples.
    """
    if not len(similarities):
        raise ValueError("CLIPScore of no samples")
    return max(0.0, 100 * float(similarities.mean()))


def clip_score_captioning(similarities: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """CLIPScore as it was published: 2.5 times the cosine per sample, at least 0.

    It is defined for ViT-B/32 and texts that start with :data:`CAPTION_PREFIX`.
    """
    return 2.5 * similarities.clip(0)
