"""MM-Relevance in both forms, InterRel, and images exactly when they are called for."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.evaluation.metrics.relevance import (
    Slot,
    image_when_called_for,
    interrel_inf,
    mm_relevance_m5,
    mm_relevance_official,
    paired_similarity,
)


def unit(*angles: float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_mm_relevance_of_the_recorded_dialogue():
    both, missing, extra = (lambda s: Slot(True, True, s)), Slot(True, False), Slot(False, True)
    dialogue = [both(0.8), both(0.6), both(0.7), missing, extra, extra]
    assert mm_relevance_m5(dialogue) == pytest.approx(0.466667, abs=5e-7)


def test_mm_relevance_without_similarity_is_zero():
    assert mm_relevance_m5([]) == mm_relevance_m5([Slot(True, False), Slot(False, True)]) == 0
    assert mm_relevance_m5([Slot(True, True, 0.5), Slot(True, True, -0.5)]) == 0
    with pytest.raises(ValueError, match="where both sides are"):
        Slot(True, False, 0.3)
    with pytest.raises(ValueError, match="where both sides are"):
        Slot(True, True)


def test_official_mm_relevance_pairs_from_the_left():
    predicted, reference = unit(0.0, 0.5), unit(0.1, 0.5, 1.0)
    total = np.cos(0.1) + 1
    want = 2 * (total / 2) * (total / 3) / (total / 2 + total / 3)
    assert mm_relevance_official(predicted, reference) == pytest.approx(want)
    assert mm_relevance_official(predicted[:0], reference) == 0
    assert paired_similarity(predicted, reference) == pytest.approx(total / 3)  # two against three
    assert paired_similarity(reference, predicted) == pytest.approx(total / 2)  # three against two
    assert paired_similarity(predicted, reference[:0]) is None


def test_images_exactly_when_called_for():
    score = image_when_called_for([True, True, False, False], [True, False, True, False])
    assert (score.precision, score.recall, score.f1, score.exact, score.n) == (0.5, 0.5, 0.5, 0.5, 4)
    none = image_when_called_for([], [])
    assert (none.precision, none.recall, none.f1, none.exact, none.n) == (None, None, None, None, 0)
    assert image_when_called_for([False], [False]).exact == 1


def test_interrel_is_the_mean_of_the_defined_terms():
    texts, images, made_texts, made_images = unit(0, 1), unit(0.2, 0.9), unit(0.1, 1.3), unit(0.4, 0.7)
    terms = [np.cos(0.4), np.cos(0.3), np.cos(0.7), np.cos(0.1), np.cos(0.4), np.cos(1.1)]
    assert interrel_inf(texts, images, made_texts, made_images) == pytest.approx(100 * np.mean(terms))
    with pytest.raises(ValueError, match="without steps"):
        interrel_inf(texts[:0], images[:0], made_texts[:0], made_images[:0])
