"""Counting of the judges: shares with their standard errors, and scenes compared place by place."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

from minigpt5_jax.config import ConfigError
from minigpt5_jax.evaluation.shapes import counts
from minigpt5_jax.shapes.world import Object, make_scene

STAR = Object(shape=3, colour=1, size=0, texture=2, place=0)
BOX = Object(shape=1, colour=4, size=1, texture=0, place=3)
WANT = make_scene(2, [STAR, BOX])


def test_a_share_of_independent_answers():
    found = counts.each([True, True, True, False])
    assert found == {"share": 0.75, "count": 4, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4))}


def test_answers_of_one_group_hang_together():
    found = counts.share([[True, False], [True], []])
    # residuals 1 - 2 * 2/3 = -1/3 and 1 - 2/3 = 1/3
    assert found["count"] == 3 and found["share"] == pytest.approx(2 / 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 9) / 3)
    alike = counts.share([[True] * 4, [False] * 4])
    assert alike["standard_error"] == pytest.approx(counts.each([True, False])["standard_error"])


def test_nothing_asked_is_no_number():
    assert counts.share([[], []]) == {"share": None, "count": 0, "standard_error": None}


def test_objects_are_compared_at_their_places():
    red = dataclasses.replace(STAR, colour=0)
    right = counts.attributes_right(make_scene(2, [red, BOX]), WANT)
    assert right["colour"] == [False, True] and right["background"] == [True]
    assert all(right[name] == [True, True] for name in ("shape", "size", "texture", "place"))
    moved = counts.attributes_right(make_scene(1, [STAR, dataclasses.replace(BOX, place=1)]), WANT)
    assert moved["background"] == [False]
    assert all(moved[name] == [True, False] for name in ("shape", "colour", "size", "texture", "place"))
    assert not any(value for values in counts.attributes_right(None, WANT).values() for value in values)


def test_objects_too_many_are_not_all_right():
    more = make_scene(2, [STAR, BOX, dataclasses.replace(BOX, shape=0, place=1)])
    found = counts.attribute_shares([(more, WANT), (WANT, WANT)])
    assert found["all_right"]["share"] == 0.5 and found["together"]["share"] == 1.0
    assert found["too_many"]["mean"] == 0.5
    assert found["together"]["count"] == 2 * 11 and found["texture"]["count"] == 4


def test_rouge_l_is_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    found = counts.rouge_l(["it turns green .", ""], ["now it turns blue .", "it leaves ."])
    # "it turns" of 3 and 4 words: precision 2/3, recall 2/4
    assert found["mean"] == pytest.approx((2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)) / 2) and found["count"] == 2


def test_rouge_l_without_its_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match="pip install rouge-score"):
        counts.rouge_l(["a"], ["a"])
