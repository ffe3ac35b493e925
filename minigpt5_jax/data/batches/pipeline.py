"""From a source to batches: worker processes, the error budget, the state.

Which samples step ``s`` holds, and in which rows, is a function of the seed and ``s`` alone
(``plan.py``).  A process reads only its contiguous rows of each micro-batch.  So the
same run continues on another number of processes, and its state is one number, the next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import grain
import numpy as np
from absl import flags

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.collate import collate
from minigpt5_jax.data.batches.encode import EncodeConfig, Sample, Shared, Uncached, encode
from minigpt5_jax.data.batches.lengths import LengthIndex
from minigpt5_jax.data.batches.plan import (
    EMPTY_SLOT,
    BucketPlan,
    PackedBucketPlan,
    Plan,
    Shape,
    StreamPlan,
    fullest_rows,
)
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.batches.stories import StoryIndex, TreePlan
from minigpt5_jax.data.errors import DataError, Problem, SampleError, allowed_errors
from minigpt5_jax.data.sources import Source

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0  # that worker processes have to end by themselves
SHARED_MEMORY_BYTES = 2**20  # arrays from this size on leave a worker in shared memory, others by pipe


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened while a batch was made; travels beside it from the worker process."""

    skips: tuple[Problem, ...]
    truncated: int


UncachedImages = dict[str, np.ndarray]
"""``slots`` i64[n] of images in a field, all micro-batches one after another, their ``keys`` u64[n] and
``pixels`` u8[n H W 3]."""


def _gather(
    micro: Sequence[Sequence[tuple[str, int, Uncached]]], sizes: dict[str, int]
) -> dict[str, UncachedImages]:
    """Field -> the images whose features it lacks; ``sizes`` are the slots of a micro-batch."""
    found: dict[str, list[tuple[int, Uncached]]] = {}
    for number, uncached in enumerate(micro):
        for field, slot, image in uncached:
            found.setdefault(field, []).append((number * sizes[field] + slot, image))
    return {
        field: {
            "slots": np.array([slot for slot, _ in images]),
            "keys": np.array([image.key for _, image in images], np.uint64),
            "pixels": np.stack([image.pixels for _, image in images]),
        }
        for field, images in found.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class StepReader:
    """Makes this process's part of the batch of any step; what worker processes run.

    Returns ``{"batch": fields of a Batch, "uncached": field -> UncachedImages, "report": Report}``.

    Attributes:
      parts: shapes of this process's part of a micro-batch, one for each bucket of the plan.
      first_row: row of the whole micro-batch where the part begins.
      seed: of the mirrors.
    """

    source: Source
    config: EncodeConfig
    plan: Plan
    parts: Sequence[BatchSpec]
    first_row: int
    seed: int

    def __call__(self, step: int) -> dict[str, Any]:
        plan = self.plan.step(int(step))
        part, skips, micro, truncated = self.parts[plan.bucket], [], [], 0
        uncached: list[list[tuple[str, int, Uncached]]] = []
        mine = slice(self.first_row, self.first_row + part.rows)
        for numbers, limits in zip(plan.numbers[:, mine], plan.limits[:, mine]):
            samples = self._read(numbers.ravel().tolist(), limits.ravel().tolist(), part, skips)
            rows = [samples[i : i + part.pack] for i in range(0, len(samples), part.pack)]
            truncated += sum(sample is not None and sample.text.dropped > 0 for row in rows for sample in row)
            uncached.append([])
            micro.append(collate(rows, part, numbers, self.config, self.first_row, uncached[-1]))
        if len(micro) == 1:
            arrays = micro[0]
        else:
            arrays = {name: np.stack([part[name] for part in micro]) for name in micro[0]}
        lacking = _gather(uncached, {name: len(value) for name, value in micro[0].items()})
        return {"batch": arrays, "uncached": lacking, "report": Report(tuple(skips), truncated)}

    def _read(
        self, numbers: list[int], limits: list[int], spec: BatchSpec, skips: list[Problem]
    ) -> list[Sample | None]:
        """Samples, None for an empty slot and where one is unusable.

        All are found, then fetched, then encoded: step by step the code stays in the processor's cache, which
        saves a quarter of the time of samples without pixels.
        """
        keys = [None if number == EMPTY_SLOT else self.plan.find(number) for number in numbers]
        fetch, config, shared = self.source.example, self.config, [None] * len(keys)
        if config.features is not None:
            config.features.at_epoch(max((key[0] for key in keys if key), default=0))
        if spec.tree is not None:  # a story is named by its first sample
            firsts = [key and Shared((self.seed, *key)) for key in keys[:: spec.pack]]
            shared = [first for first in firsts for _ in range(spec.pack)]
        examples = [key and _attempt(key[1], skips, fetch, key[1], key[0]) for key in keys]
        return [
            example and _attempt(key[1], skips, encode, example, config, spec, (self.seed, *key), limit, own)
            for key, example, limit, own in zip(keys, examples, limits, shared)
        ]


def _attempt(place: int, skips: list[Problem], make: Callable[..., Any], *args: Any) -> Any:
    """``make(*args)``; None where the sample at ``place`` of the source is unusable, which is taken down."""
    try:
        return make(*args)
    except SampleError as error:
        skips.append(Problem(place, error.where, error.reason))
        return None


class Loader:
    """Iterator over batches of numpy arrays; made by :func:`make_loader`.

    Each batch is this process's part.  Row numbers in it (``voken_row``, ``image_row``) count within the
    whole micro-batch, so that parts joined over processes need no correction.

    Attributes:
      source: where samples come from; its ``fingerprint()`` belongs into a checkpoint.
      num_steps: batches in all, None without an end; the last one is filled with empty rows.
      skipped: unusable samples met so far by this process, each once.
      truncated: samples cut to fit so far.
      complete: gets (step, fields of its batch, field -> UncachedImages) and puts in the features that
        these lack; None leaves them at zero.
    """

    SHOWN = 5

    def __init__(
        self,
        reader: StepReader,
        *,
        budget: int,
        worker_count: int,
        prefetch: int,
    ):
        self.source, self._reader = reader.source, reader
        self.num_steps = reader.plan.num_steps
        self._budget, self._worker_count, self._prefetch = budget, worker_count, prefetch
        self._skips: dict[int, Problem] = {}
        self.truncated = 0
        self.complete: Callable[[int, dict[str, np.ndarray], dict[str, UncachedImages]], None] | None = None
        self._step = 0
        self._batches: grain.DatasetIterator | None = None
        self._others: list[BaseProcess] = []

    @property
    def largest(self) -> BatchSpec:
        """Shapes of the longest rows, this process's part of a micro-batch."""
        return self._reader.parts[-1]

    @property
    def state(self) -> int:
        """The next step: all there is to restore."""
        return self._step

    @property
    def skipped(self) -> list[Problem]:
        return list(self._skips.values())

    def samples(self, step: int) -> list[int]:
        """Places in the source of the samples of a step's whole batch, over all processes, row by row."""
        plan = self._reader.plan
        numbers = plan.step(step).numbers.ravel().tolist()
        return [plan.find(number)[1] for number in numbers if number != EMPTY_SLOT]

    def restore(self, state: int) -> None:
        """Continues before step ``state``, whatever the process or worker count was."""
        if state < 0 or (self.num_steps is not None and state > self.num_steps):
            raise DataError(f"data state {state} is not in 0 ... {self.num_steps}")
        self.close()
        self._step = state

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts them again."""
        if self._batches is None:
            return
        # grain waits for what a worker is making, without end where a file does not answer, and for what a
        # killed one has written in part: by a thread, which is left behind then.
        closing = threading.Thread(target=self._batches.close, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        if closing.is_alive():
            _kill_workers(self._others)
            closing.join(CLOSING_SECONDS)
        self._batches = None

    def _open(self) -> None:
        """Make ``_batches``, set before any process starts: a signal may end this, and close() ends them."""
        stop = sys.maxsize if self.num_steps is None else self.num_steps
        steps = grain.MapDataset.range(self._step, stop).map(self._reader)
        if self._worker_count:
            # grain reads its absl flags when it starts processes, and these may be unparsed where no
            # absl.app runs (notebooks, tests).
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            buffer = max(1, self._prefetch)
            workers = grain.MultiprocessingOptions(self._worker_count, per_worker_buffer_size=buffer)
            options = grain.experimental.DatasetOptions(min_shm_size=SHARED_MEMORY_BYTES)
            read = grain.experimental.WithOptionsIterDataset(steps.to_iter_dataset(here), options)
            self._batches = iter(read.mp_prefetch(workers, worker_init_fn=_end_with_parent))
            self._batches.get_state()  # makes the iterators of the workers, which are started here
            self._others = multiprocessing.active_children()
            with _signals_held():
                self._batches.start_prefetch()
            return
        threads = grain.ReadOptions(num_threads=min(1, self._prefetch), prefetch_buffer_size=self._prefetch)
        self._batches = iter(steps.to_iter_dataset(threads))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next batch; DataError when more samples are unusable than the budget allows."""
        if self.num_steps is not None and self._step >= self.num_steps:
            self.close()
            raise StopIteration
        if self._batches is None:
            self._open()
        element = next(self._batches)
        self._step += 1
        self._count(element["report"])
        # Workers hand large arrays over in shared memory.  A copy of ours, and emptying the element that
        # grain still holds, give it back at once.
        copy = np.array if self._worker_count else np.asarray
        fields = {name: copy(value) for name, value in element["batch"].items()}
        if self.complete is not None:
            self.complete(self._step - 1, fields, element["uncached"])
        element["batch"].clear()
        element["uncached"].clear()
        return Batch(**fields)

    def _count(self, report: Report) -> None:
        if report.truncated and not self.truncated:
            logger.warning("samples have more positions, images or targets than fit: cut, and counted")
        self.truncated += report.truncated
        for skip in report.skips:
            if skip.index not in self._skips:
                self._skips[skip.index] = skip
                logger.warning("sample left out: %s", skip)
        if len(self._skips) > self._budget:
            self.close()
            shown = "\n  ".join(str(skip) for skip in self.skipped[: self.SHOWN])
            raise DataError(
                f"{len(self._skips)} samples are unusable, the error budget allows {self._budget}; the first:"
                f"\n  {shown}\nMend or remove them (`python -m minigpt5_jax.prepare check` lists all), or "
                "raise data.error_budget, a share below 1 or a count: --config.data.error_budget="
                f"{2 * len(self._skips)}"
            )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that start inside never get SIGINT and SIGTERM, whenever these come.

    Both reach all processes of a terminal or a job: the trainer takes note of them, saves, and then ends its
    workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(*_: int) -> None:
    """Ends the worker process that calls it with the trainer, which may be killed before it can end it."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _kill_workers(others: Sequence[BaseProcess]) -> None:
    """Kill grain's processes, which its threads have started, but for those that were there before."""
    for process in multiprocessing.active_children():
        if process not in others and process.name.startswith("grain-process-prefetch"):
            process.kill()


def _check_sizes(
    spec: BatchSpec, global_batch: int, accumulation: int, process_index: int, process_count: int
) -> None:
    """DataError where micro-batches of ``spec`` do not make up the batch or do not divide over processes."""
    samples = spec.rows * spec.pack
    if global_batch != samples * accumulation:
        raise DataError(
            f"global_batch = {global_batch} is not samples of a micro-batch x accumulation = "
            f"{spec.rows} rows x {spec.pack} x {accumulation}"
        )
    if spec.rows % process_count:
        raise DataError(
            f"global_batch = {global_batch} over accumulation = {accumulation} gives {spec.rows} rows"
            f"{f' of {spec.pack} samples' if spec.pack > 1 else ''}, which {process_count} processes do not "
            "divide"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index = {process_index} of {process_count} processes")


MAX_OVERFLOW = 0.01  # share of packed rows that may be too full before it is an error


def _make_plan(
    spec: BatchSpec,
    shape: Shape,
    length: int,
    index: LengthIndex | None,
    buckets: tuple[int, ...],
    stories: StoryIndex | None,
    *,
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
) -> tuple[Plan, list[BatchSpec]]:
    """The plan, and the shapes of its buckets."""
    if stories is not None:
        if not shuffle or buckets:
            raise DataError("stories as trees are shuffled, and their rows have lengths of their own")
        plan = TreePlan(stories, limit=spec.length, seed=seed, num_epochs=num_epochs, shape=shape)
        return plan, plan.shapes(spec)
    if (buckets or spec.pack > 1) and (index is None or len(index) != length):
        raise DataError("length buckets and packing need the length index of this source")
    if buckets:
        if not shuffle:
            raise DataError("length buckets go with shuffled samples")
        if buckets[-1] != spec.length:
            raise DataError(f"the last bucket is {buckets[-1]}, rows have {spec.length} positions")
        options = {"seed": seed, "num_epochs": num_epochs, "shape": shape}
        if spec.pack > 1 or spec.split:
            plan = PackedBucketPlan(index, buckets, apart=spec.apart, **options)
            sizes = zip(plan.row_lengths, plan.buckets, strict=True)
            return plan, [spec.bucket(size, plan.images_in(bucket)) for size, bucket in sizes]
        plan = BucketPlan(index, buckets, **options)
        return plan, [spec.bucket(size, plan.images_in(i)) for i, size in enumerate(buckets)]
    packed = index if spec.pack > 1 else None
    if packed:
        sizes = np.maximum(packed.lengths - spec.apart, 0)
        share = float((fullest_rows(sizes, shape.rows, shape.places) > spec.length).mean())
        if share > MAX_OVERFLOW:
            raise DataError(
                f"{share:.0%} of rows of {spec.length} positions do not hold {spec.pack} samples; use longer "
                "rows (data.max_length) or fewer samples in each (data.pack)"
            )
    row_length = spec.length - (0 if packed else spec.apart)
    plan = StreamPlan(
        length,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shape=shape,
        row_length=row_length,
        index=packed,
        apart=spec.apart,
    )
    return plan, [spec.bucket(row_length, spec.images // spec.samples)]


def make_loader(
    source: Source,
    encode_config: EncodeConfig,
    spec: BatchSpec,
    *,
    global_batch: int,
    accumulation: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    buckets: tuple[int, ...] = (),
    index: LengthIndex | None = None,
    stories: StoryIndex | None = None,
    process_index: int = 0,
    process_count: int = 1,
    worker_count: int = 0,
    prefetch: int = 2,
    error_budget: int | float = 0.01,
) -> Loader:
    """Batches of a source.

    Args:
      source: random-access samples.
      encode_config: tokenizers and rules.
      spec: shapes of one micro-batch over all processes:
        ``spec.rows * spec.pack * accumulation == global_batch``.
      global_batch: samples of one step over all processes and micro-batches.
      accumulation: micro-batches of a step; more than one gives every array a leading axis.
      seed: of the order and of the mirrors.
      shuffle: a new order each epoch; else the order of the source.
      num_epochs: None for no end.  With an end, the last batch is filled with empty rows.
      buckets: lengths of rows, ascending up to ``spec.length``; each step takes samples of one bucket and
        has its shape.  Empty: every row has ``spec.length`` positions.
      index: sizes of the samples, for buckets and packing (``spec.pack`` above 1).
      stories: sizes of whole stories: each row is one, its ``spec.pack`` samples (or fewer) a tree; ``spec``
        is of rows of single samples, and those of trees follow from the sizes.
      process_index, process_count: which rows are read here.
      worker_count: processes that read and decode; 0 for one thread here.
      prefetch: batches made ahead (per worker).
      error_budget: unusable samples all processes may meet before one of them stops, each at its share
        (rounded up): a share of the source below 1 or a count, each sample counted once.

    Raises:
      DataError: sizes that do not divide, with the numbers; an empty source; tokenizers that do not fit
        ``spec``; packed rows that are too short.
    """
    _check_sizes(spec, global_batch, accumulation, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise DataError(f"seed must be in 0 ... {2**32 - 1}, got {seed}")
    if not len(source):
        raise DataError(f"no samples in {source.describe()}")
    encode_config = dataclasses.replace(encode_config, image_root=source.image_root)
    encode_config.check(spec)
    plan, specs = _make_plan(
        spec,
        Shape(accumulation, spec.rows, spec.pack),
        len(source),
        index,
        buckets,
        stories,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
    )
    parts = [shapes.part(process_count) for shapes in specs]
    reader = StepReader(source, encode_config, plan, parts, process_index * parts[0].rows, seed)
    return Loader(
        reader,
        budget=-(-allowed_errors(error_budget, len(source)) // process_count),
        worker_count=worker_count,
        prefetch=prefetch,
    )
