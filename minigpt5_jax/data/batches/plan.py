"""Which samples a step holds, and in which rows: pure functions of (seed, step).

The global batch comes first: a plan is the same for every process, which then reads its contiguous rows.
A sample of a run has a global number ``g``; its epoch is ``g // length``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64

from minigpt5_jax.data.batches.lengths import LengthIndex
from minigpt5_jax.data.errors import DataError

EMPTY_SLOT = -1  # number of an empty slot


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The samples of one step: a micro-batches of r rows with p places each.

    Attributes:
      numbers: i64[a r p] global number of each sample, :data:`EMPTY_SLOT` for an empty slot.
      limits: i32[a r p] positions the sample may take.
      bucket: which of the plan's lengths the rows have.
    """

    numbers: Int64[np.ndarray, "a r p"]
    limits: Int32[np.ndarray, "a r p"]
    bucket: int = 0


@runtime_checkable
class Plan(Protocol):
    """``step(s)`` for any s in 0 ... num_steps - 1 (no end where that is None)."""

    num_steps: int | None

    def step(self, step: int) -> StepPlan: ...

    def find(self, number: int) -> tuple[int, int]:
        """(epoch, place in the source) of a sample."""
        ...


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a step is laid out: ``micro`` micro-batches of ``rows`` rows of ``places`` samples."""

    micro: int
    rows: int
    places: int = 1

    @property
    def samples(self) -> int:
        """Samples of a step, over all processes."""
        return self.micro * self.rows * self.places


class StreamPlan:
    """Shuffled epochs one after another without a gap.

    A batch may hold the end of one and the beginning of the next: padding the last batch of an epoch would
    give its samples another weight, and dropping it would lose them.  Samples follow each other in the rows;
    with ``shape.places`` above 1 those of a micro-batch are packed so that its rows are equally full.

    Args:
      length: samples of the source.
      seed: of the order.  shuffle: a new permutation each epoch, drawn number by number by grain, so that
        nothing is stored; else the order of the source.
      num_epochs: None for no end.  With an end, the last step is filled with empty slots.
      shape: of a step.  row_length: positions of a row.
      index: sizes of the samples; needed for packing.
      apart: positions of a sample that stand outside of its row.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        shuffle: bool,
        num_epochs: int | None,
        shape: Shape,
        row_length: int,
        index: LengthIndex | None = None,
        apart: int = 0,
    ):
        self._length, self._shape, self._row_length, self._index = length, shape, row_length, index
        self._apart = apart
        self._total = sys.maxsize if num_epochs is None else length * num_epochs
        self.num_steps = None if num_epochs is None else math.ceil(self._total / shape.samples)
        places = grain.MapDataset.range(length)
        self._places = (places.shuffle(seed=seed) if shuffle else places).repeat(num_epochs)

    def find(self, number: int) -> tuple[int, int]:
        return number // self._length, int(self._places[number])

    def step(self, step: int) -> StepPlan:
        shape = self._shape
        numbers = step * shape.samples + np.arange(shape.samples, dtype=np.int64)
        numbers[numbers >= self._total] = EMPTY_SLOT
        numbers = numbers.reshape(shape.micro, shape.rows * shape.places)
        if self._index is None:
            limits = np.full(numbers.shape, self._row_length + self._apart, np.int32)
            return StepPlan(numbers[..., None], limits[..., None])
        sizes = [sizes_in_rows(self, micro, self._index, self._apart) for micro in numbers]
        packed = [pack(*micro, shape.rows, self._row_length) for micro in zip(numbers, sizes, strict=True)]
        limits = np.stack([part[1] for part in packed]) + self._apart
        return StepPlan(np.stack([part[0] for part in packed]), limits)


def sizes_in_rows(
    plan: Plan, numbers: Int64[np.ndarray, " n"], index: LengthIndex, apart: int
) -> Int32[np.ndarray, " n"]:
    """Positions that samples take in their rows; 0 for an empty slot."""
    sizes = [0 if n == EMPTY_SLOT else index.lengths[plan.find(int(n))[1]] - apart for n in numbers]
    return np.maximum(np.asarray(sizes, np.int32), 0)


def pack(
    numbers: Int64[np.ndarray, " n"], sizes: Int[np.ndarray, " n"], rows: int, row_length: int
) -> tuple[Int64[np.ndarray, "r p"], Int32[np.ndarray, "r p"]]:
    """Spreads samples over rows, the same number to each, so that the rows are equally full.

    The longest goes first, each to the emptiest row that has a place (LPT); ties go by number.  Where a
    row is too full, the limits of its longest samples are lowered, so that none is left without room.

    Returns:
      Numbers and limits, [rows, samples / rows].
    """
    places = len(numbers) // rows
    chosen = np.full((rows, places), 0, np.int64)
    filled, used = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for sample in np.argsort(-sizes, kind="stable"):
        row = int(np.argmin(np.where(used < places, filled, np.iinfo(np.int64).max)))
        chosen[row, used[row]] = sample
        filled[row] += sizes[sample]
        used[row] += 1
    chosen.sort(axis=1)  # inside a row, in the order of the stream
    limits = sizes[chosen].astype(np.int32)
    for row in np.flatnonzero(filled > row_length):
        limits[row] = _lower(limits[row], row_length)
    return numbers[chosen], limits


def _lower(sizes: Int32[np.ndarray, " p"], room: int) -> Int32[np.ndarray, " p"]:
    """Sizes that take ``room`` together: the longest are lowered to one height, the others stay."""
    lowered, order = sizes.copy(), np.argsort(sizes, kind="stable")
    for rank, place in enumerate(order):
        lowered[place] = min(sizes[place], room // (len(order) - rank))
        room -= lowered[place]
    return lowered


def fullest_rows(
    sizes: Int32[np.ndarray, " n"], rows: int, places: int, trials: int = 50
) -> Int[np.ndarray, "trials rows"]:
    """Positions that the rows of random packed samples take, if nothing is cut."""
    random, filled = np.random.default_rng(0), []
    for _ in range(trials):
        drawn = random.choice(sizes, rows * places)
        chosen, _ = pack(np.arange(len(drawn)), drawn, rows, sys.maxsize)
        filled.append(drawn[chosen].sum(-1))
    return np.asarray(filled)


class BucketPlan:
    """Steps of samples of about one length, each with the static shape of its bucket.

    A sample belongs to the first bucket that holds it (the last one, where it is cut, if none does).
    Each epoch is shuffled, cut into steps bucket by bucket, and these steps are shuffled.  What is left
    over in a bucket goes to the next longer one, so that an epoch reads every sample once in
    ``ceil(length / samples of a step)`` steps, the last of the longest bucket filled with empty slots.

    Args:
      index: sizes of the samples.  lengths: of the buckets, ascending.
      seed, num_epochs, shape: as in :class:`StreamPlan`.
    """

    def __init__(
        self,
        index: LengthIndex,
        lengths: tuple[int, ...],
        *,
        seed: int,
        num_epochs: int | None,
        shape: Shape,
    ):
        if not lengths or list(lengths) != sorted(set(lengths)):
            raise DataError(f"bucket lengths must ascend, got {lengths}")
        self.lengths, self._seed, self._shape = lengths, seed, shape
        self._size = len(index)
        self._bucket = np.minimum(np.searchsorted(lengths, index.lengths), len(lengths) - 1)
        self._images = index.images
        self.epoch_steps = math.ceil(self._size / shape.samples)
        self.num_steps = None if num_epochs is None else num_epochs * self.epoch_steps
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def images_in(self, bucket: int) -> int:
        """Input images of a sample in this bucket at most; shorter ones may be moved up into it."""
        return int(self._images[self._bucket <= bucket].max(initial=0))

    def find(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, self._size)
        return epoch, int(self._epoch(epoch)[0][place])

    def step(self, step: int) -> StepPlan:
        epoch, part = divmod(step, self.epoch_steps)
        _, numbers, buckets = self._epoch(epoch)
        shape, bucket = self._shape, int(buckets[part])
        chosen = numbers[part].reshape(shape.micro, shape.rows, shape.places)
        chosen = np.where(chosen == EMPTY_SLOT, EMPTY_SLOT, chosen + epoch * self._size)
        return StepPlan(chosen, np.full(chosen.shape, self.lengths[bucket], np.int32), bucket)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(permutation [n], places in it of each step's samples [s, samples], bucket of each step [s])."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(self._size)
        size, last = self._shape.samples, len(self.lengths) - 1
        steps, buckets, rest = [], [], np.zeros(0, np.int64)
        for bucket in range(last + 1):
            mine = np.sort(np.concatenate([np.flatnonzero(self._bucket[order] == bucket), rest]))
            if bucket == last:
                empty = np.full(-len(mine) % size, EMPTY_SLOT, np.int64)
                mine = np.concatenate([mine, empty])
            whole = len(mine) // size
            steps.append(mine[: whole * size].reshape(whole, size))
            buckets.append(np.full(whole, bucket))
            rest = mine[whole * size :]
        shuffled = random.permutation(self.epoch_steps)
        return order, np.concatenate(steps)[shuffled], np.concatenate(buckets)[shuffled]


class PackedBucketPlan(BucketPlan):
    """The steps of :class:`BucketPlan`, their samples packed into rows that are equally full.

    All rows of a step are filled together, whatever micro-batch they are of: the update is a sum over them.
    Rows have one of three lengths for each bucket: two that hold half and 95 % of steps, one that holds any.

    Args:
      apart: positions of a sample that stand outside of its row.
      index, lengths, options: as in :class:`BucketPlan`.

    Attributes:
      row_lengths: positions of rows; ``StepPlan.bucket`` is a place in it.
    """

    MULTIPLE, SHARES = 4, (0.5, 0.95)  # what row lengths are rounded up to; steps that the shorter ones hold

    def __init__(self, index: LengthIndex, lengths: tuple[int, ...], *, apart: int = 0, **options: Any):
        super().__init__(index, lengths, **options)
        self._index, self._apart = index, apart
        self._ladder = [self._lengths_of(bucket) for bucket in range(len(lengths))]
        self.row_lengths = tuple(sum(self._ladder, ()))
        self.buckets = tuple(bucket for bucket, rungs in enumerate(self._ladder) for _ in rungs)

    def _lengths_of(self, bucket: int) -> tuple[int, ...]:
        """Usual and greatest lengths of a bucket's rows, ascending."""
        shape, longest = self._shape, max(2, self.lengths[bucket] - self._apart)
        greatest = shape.places * longest
        mine = self._index.lengths[self._bucket == bucket] - self._apart
        if not len(mine):
            return (greatest,)
        filled = fullest_rows(np.clip(mine, 1, longest), shape.micro * shape.rows, shape.places)
        usual = np.ceil(np.quantile(filled.max(-1), self.SHARES) / self.MULTIPLE) * self.MULTIPLE
        return tuple(sorted({*(int(size) for size in usual if size < greatest), greatest}))

    def step(self, step: int) -> StepPlan:
        plan, shape = super().step(step), self._shape
        numbers = plan.numbers.ravel()
        longest, rungs = max(2, self.lengths[plan.bucket] - self._apart), self._ladder[plan.bucket]
        sizes = np.minimum(sizes_in_rows(self, numbers, self._index, self._apart), longest)
        chosen, limits = pack(numbers, sizes, shape.micro * shape.rows, rungs[-1])
        rung = int(np.searchsorted(rungs, limits.sum(-1).max()))
        before = sum(len(rungs) for rungs in self._ladder[: plan.bucket])
        return StepPlan(
            chosen.reshape(plan.numbers.shape),
            (limits + self._apart).reshape(plan.numbers.shape).astype(np.int32),
            before + rung,
        )
