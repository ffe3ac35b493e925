"""Which samples a step holds: every sample once an epoch, in rows of its length, a function of the step."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from minigpt5_jax.data.batches.lengths import LengthIndex
from minigpt5_jax.data.batches.plan import (
    EMPTY_SLOT,
    BucketPlan,
    PackedBucketPlan,
    Shape,
    StreamPlan,
    fullest_rows,
    pack,
)
from minigpt5_jax.data.errors import DataError


def index_of(n, seed=0, low=5, high=60):
    random = np.random.default_rng(seed)
    return LengthIndex(
        random.integers(low, high, n).astype(np.int32), random.integers(0, 4, n).astype(np.int32)
    )


def bucket_plan(n=103, lengths=(16, 32, 64), shape=None, epochs=None, seed=1):
    return BucketPlan(
        index_of(n), lengths, seed=seed, num_epochs=epochs, shape=Shape(1, 8) if shape is None else shape
    )


def places_of(plan, steps):
    """Place in the source of each sample of some steps; empty places left out."""
    numbers = np.concatenate([plan.step(s).numbers.ravel() for s in steps])
    return [plan.find(int(n)) for n in numbers if n != EMPTY_SLOT]


def test_an_epoch_of_buckets_reads_every_sample_once():
    plan = bucket_plan()
    assert plan.epoch_steps == 13 == -(-103 // 8) and plan.num_steps is None
    for epoch in (0, 1, 5):
        found = places_of(plan, range(13 * epoch, 13 * (epoch + 1)))
        assert sorted(found) == [(epoch, place) for place in range(103)]
    assert places_of(plan, range(13)) != [(0, p) for _, p in places_of(plan, range(13, 26))]
    assert bucket_plan(epochs=2).num_steps == 26


def test_rows_of_a_step_hold_the_lengths_of_its_bucket():
    plan, index = bucket_plan(), index_of(103)
    moved = 0
    seen = set()
    for step in range(13):
        part = plan.step(step)
        limit = plan.lengths[part.bucket]
        assert (part.limits == limit).all()
        sizes = np.array([index.lengths[place] for _, place in places_of(plan, [step])])
        assert sizes.max() <= limit
        moved += (sizes <= (0, 16, 32)[part.bucket]).sum()
        images = max(index.images[place] for _, place in places_of(plan, [step]))
        assert images <= plan.images_in(part.bucket)
        seen.add(part.bucket)
    assert seen == {0, 1, 2}
    assert 0 < moved < 2 * 8  # less than a step's worth from each shorter bucket


def test_samples_too_long_for_any_bucket_go_to_the_last():
    lengths = np.array([10, 500, 12, 11], np.int32)
    plan = BucketPlan(
        LengthIndex(lengths, np.zeros(4, np.int32)), (16, 32), seed=0, num_epochs=1, shape=Shape(1, 3)
    )
    buckets = {plan.step(s).bucket: {p for _, p in places_of(plan, [s])} for s in range(2)}
    assert buckets == {0: {0, 2, 3}, 1: {1}}
    short = BucketPlan(
        LengthIndex(lengths[:2], np.zeros(2, np.int32)), (16,), seed=0, num_epochs=1, shape=Shape(1, 4)
    )
    assert short.epoch_steps == 1 and (short.step(0).numbers == EMPTY_SLOT).sum() == 2


def test_bucket_plans_depend_on_the_seed_only_and_survive_pickling():
    plan = bucket_plan()
    again = pickle.loads(pickle.dumps(plan))
    backwards = {step: bucket_plan().step(step) for step in reversed(range(30))}
    for step in range(30):
        np.testing.assert_array_equal(plan.step(step).numbers, again.step(step).numbers)
        np.testing.assert_array_equal(plan.step(step).numbers, backwards[step].numbers)
    other = bucket_plan(seed=2)
    assert any((plan.step(s).numbers != other.step(s).numbers).any() for s in range(5))


def test_steps_are_laid_out_in_micro_batches_of_rows():
    plan = bucket_plan(shape=Shape(2, 4))
    flat = bucket_plan()
    for step in range(5):
        assert plan.step(step).numbers.shape == (2, 4, 1)
        np.testing.assert_array_equal(plan.step(step).numbers.ravel(), flat.step(step).numbers.ravel())


@pytest.mark.parametrize("lengths", [(), (32, 16), (16, 16)])
def test_bucket_lengths_ascend(lengths):
    with pytest.raises(DataError, match="bucket lengths must ascend"):
        bucket_plan(lengths=lengths)


def test_packing_fills_rows_evenly():
    sizes = np.array([30, 5, 5, 20, 10, 10], np.int32)
    numbers, limits = pack(np.arange(100, 106), sizes, rows=3, row_length=40)
    assert numbers.tolist() == [[100, 102], [101, 103], [104, 105]]  # 35, 25, 20
    assert limits.tolist() == [[30, 5], [5, 20], [10, 10]]
    _, short = pack(np.arange(100, 106), sizes, rows=3, row_length=32)
    assert short.tolist() == [[27, 5], [5, 20], [10, 10]]  # the longest sample of the full row gives way
    for row_length, want in ((120, [20, 33, 33, 34]), (160, [20, 46, 46, 46]), (150, [20, 43, 43, 44])):
        _, limits = pack(np.arange(4), np.array([20, 46, 46, 46]), rows=1, row_length=row_length)
        assert limits.tolist() == [want]  # several long ones share what is missing


def test_packed_steps_hold_the_samples_of_unpacked_ones():
    index = index_of(50, high=30)
    kwargs = {"seed": 3, "shuffle": True, "num_epochs": None, "row_length": 64}
    plain = StreamPlan(50, shape=Shape(1, 12), **kwargs)
    packed = StreamPlan(50, shape=Shape(1, 4, 3), index=index, **kwargs)
    for step in range(9):
        part = packed.step(step)
        assert part.numbers.shape == (1, 4, 3)
        assert sorted(part.numbers.ravel()) == plain.step(step).numbers.ravel().tolist()
        for numbers, limits in zip(part.numbers[0], part.limits[0]):
            assert limits.tolist() == [index.lengths[packed.find(int(n))[1]] for n in numbers]
            assert limits.sum() <= 64
    filled = fullest_rows(index.lengths, 4, 3)
    assert filled.shape == (50, 4) and filled.max() <= 64
    assert 0.2 < (filled > 48).mean() < 1.0


@pytest.mark.parametrize("apart", [0, 9])
def test_packed_buckets_hold_the_samples_of_buckets_and_cut_none(apart):
    index = index_of(200, high=40)
    kwargs = {"lengths": (24, 40), "seed": 3, "num_epochs": 1}
    plain = BucketPlan(index, shape=Shape(2, 12), **kwargs)
    packed = PackedBucketPlan(index, shape=Shape(2, 3, 4), apart=apart, **kwargs)
    assert packed.row_lengths[-1] == 4 * (40 - apart) and len(packed.row_lengths) == len(packed.buckets) <= 6
    seen, used = [], set()
    for step in range(packed.num_steps):
        part, numbers = packed.step(step), plain.step(step).numbers
        assert part.numbers.shape == (2, 3, 4)
        assert sorted(part.numbers.ravel()) == sorted(numbers.ravel())
        there = part.numbers != EMPTY_SLOT
        sizes = [index.lengths[packed.find(int(n))[1]] for n in part.numbers[there]]
        assert np.all(part.limits[there] >= sizes)
        rows = np.where(there, part.limits - apart, 0).sum(-1)
        assert rows.max() <= packed.row_lengths[part.bucket]
        seen += part.numbers[there].tolist()
        used.add(part.bucket)
    assert sorted(seen) == list(range(200)) and len(used) >= 2


def test_a_bucket_too_short_for_a_sample_is_empty():
    index = index_of(200, high=40)
    plan = PackedBucketPlan(index, (8, 40), seed=0, num_epochs=1, shape=Shape(1, 2, 2), apart=9)
    assert min(plan.row_lengths) >= 2


def test_the_last_packed_step_has_empty_places():
    index = index_of(10, high=20)
    plan = StreamPlan(
        10, seed=0, shuffle=True, num_epochs=1, shape=Shape(1, 2, 3), row_length=64, index=index
    )
    assert plan.num_steps == 2
    last = plan.step(1)
    assert (last.numbers == EMPTY_SLOT).sum() == 2 and (last.limits[last.numbers == EMPTY_SLOT] == 0).all()
