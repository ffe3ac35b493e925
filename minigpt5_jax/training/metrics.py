"""What a run shows while it runs: progress bar, ``metrics.jsonl``, TensorBoard, image grids.

Values are read back one step late, so that the host never waits for the step it has just sent off.
clu's writer brings TensorFlow along (seconds to import), so it is imported at the first write, and a
run goes on without it.  clu's periodic actions import TensorFlow too: :func:`due` is used instead.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm.auto import tqdm

from minigpt5_jax.data.errors import printable
from minigpt5_jax.training.tracking import Tracker

SHOWN = ("loss", "text", "image", "caption")  # in the bar
FINITE = ("loss", "grad_norm")  # others are NaN where a step had nothing to count


class TrainingDiverged(RuntimeError):
    """A loss is not finite; the message has the step, its losses and samples, and the last checkpoint."""


def due(step: int, every: int) -> bool:
    """Whether something done every ``every`` steps is due; 0 is never."""
    return every > 0 and step % every == 0


class Metrics:
    """Takes the metrics of each step and writes, every ``log_every`` steps, their means since the last line.

    Args:
      workdir: folder of ``metrics.jsonl``, ``tensorboard/`` and ``images/``.
      num_steps: updates of the whole run, for the time left.
      first_step: updates done already; lines of later steps, from a run that stopped, are dropped.
      samples_per_step: global batch, for samples/s.
      log_every: steps between lines; the first step of a run has its own.
      last_checkpoint: says where to go on from, for the message when training diverges.
      samples: step -> places of its samples in the training data, for the same message.
      active: False on all processes but the main one, which then write nothing (but do check).
      tracker: takes everything too.
    """

    def __init__(
        self,
        workdir: str | Path,
        num_steps: int,
        *,
        first_step: int = 0,
        samples_per_step: int = 1,
        log_every: int = 10,
        last_checkpoint: Callable[[], str | None] = lambda: None,
        samples: Callable[[int], Sequence[int]] = lambda step: (),
        active: bool = True,
        tracker: Tracker | None = None,
    ):
        self.workdir = Path(workdir)
        self.samples_per_step, self.log_every = samples_per_step, log_every
        self._last_checkpoint, self._samples = last_checkpoint, samples
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._window: list[dict[str, float]] = []
        self._seconds, self._since = 0.0, time.monotonic()
        self._num_steps, self._steady_steps, self._steady_seconds = num_steps, 0, 0.0
        self._writer = _Writer(self.workdir, first_step, tracker) if active else None
        self._first_step = first_step
        # Without a terminal each refresh is a line in a log: make them rare.
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not active,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand in the device scalars of update ``step`` (counted from 1); reads back those of the one before.

        Raises:
          TrainingDiverged: the one before had a loss that is not finite.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> dict[str, float] | None:
        """Read back what is pending; returns its values.  Call before evaluating and saving.

        Raises:
          TrainingDiverged: see :meth:`push`.
        """
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        values = {name: float(np.asarray(value)) for name, value in jax.device_get(dict(metrics)).items()}
        self._check(step, values)
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._window.append(values)
        rate = self.samples_per_step * len(self._window) / max(self._seconds, 1e-9)
        shown = "".join(f", {name} {values[name]:.4g}" for name in SHOWN if name in values)
        self._bar.set_postfix_str(f"{self._left(step)}{rate:.1f} samples/s{shown}", refresh=False)
        self._bar.update(1)
        first = step == self._first_step + 1
        if due(step, self.log_every) or first:
            self.write(step, {**_means(self._window), "samples_per_s": rate})
            if not first:
                self._steady_steps += len(self._window)
                self._steady_seconds += self._seconds
            self._window, self._seconds = [], 0.0
        return values

    def _left(self, step: int) -> str:
        """``"03:01 left, "`` at the pace so far, validations apart; nothing yet at the first step."""
        # tqdm's own guess counts the first step, which compiles: two hours for three minutes.
        if step == self._first_step + 1:
            return ""
        pace = (self._steady_seconds + self._seconds) / (self._steady_steps + len(self._window))
        return f"{tqdm.format_interval(pace * (self._num_steps - step))} left, "

    def write(self, step: int, values: Mapping[str, int | float], prefix: str = "") -> None:
        """One line of ``metrics.jsonl`` and TensorBoard scalars, now; names get ``prefix``."""
        if self._writer is not None:
            self._writer.scalars(step, {prefix + name: float(value) for name, value in values.items()})

    def image(self, step: int, name: str, image: np.ndarray) -> Path | None:
        """u8[H W 3] to ``images/<name>_<step>.png`` and TensorBoard; returns the file."""
        return self._writer.image(step, name, image) if self._writer is not None else None

    def message(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self._writer is not None:
            tqdm.write(printable(text), file=sys.stderr)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, grids) does not count in samples/s."""
        self._seconds += time.monotonic() - self._since
        try:
            yield
        finally:
            self._since = time.monotonic()

    def close(self) -> None:
        """Write what is left and let go of the files."""
        try:
            self.flush()
        finally:
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._pending = None  # the error in flight says more than the step before it
        self.close()

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name in FINITE if not math.isfinite(values.get(name, 0.0))]
        bad += [name for name, value in values.items() if math.isinf(value) and name not in bad]
        if not bad:
            return
        where = self._last_checkpoint()
        remedy = f"the last good checkpoint is {where}" if where else "no checkpoint was saved yet"
        shown = ", ".join(f"{name}={value:.6g}" for name, value in values.items())
        samples = " ".join(map(str, self._samples(step)))
        batch = f"samples of this step, by their places in the training data from 0: {samples}; "
        raise TrainingDiverged(
            f"step {step}: {' and '.join(bad)} not finite ({shown}); {batch if samples else ''}{remedy}; "
            "lower optimizer.lr_llm / optimizer.lr_mapper or set optimizer.grad_clip"
        )


class _Writer:
    """The files of a run."""

    def __init__(self, workdir: Path, first_step: int, tracker: Tracker | None):
        self.workdir, self._tracker = workdir, tracker
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_lines_after(path, first_step)
        self._lines = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        # A value that is not finite was not counted in this step; JSON has no NaN.
        kept = {name: value for name, value in values.items() if math.isfinite(value)}
        with _named(self._lines.name):
            self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **kept}) + "\n")
            self._lines.flush()
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, kept)
        if self._tracker is not None:
            self._tracker.scalars(step, kept)

    def image(self, step: int, name: str, image: np.ndarray) -> Path:
        from PIL import Image

        path = self.workdir / "images" / f"{name}_{step:06d}.png"
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        if self._tensorboard is not None:
            self._tensorboard.write_images(step, {name: image[None]})
        if self._tracker is not None:
            self._tracker.image(step, name, image)
        return path

    def close(self) -> None:
        with _named(self._lines.name):
            self._lines.close()
        if (opened := vars(self).get("_tensorboard")) is not None:
            opened.close()
        if self._tracker is not None:
            self._tracker.close()

    @functools.cached_property
    def _tensorboard(self) -> Any:
        """Opened at the first write."""
        return _open_tensorboard(self.workdir / "tensorboard")


def _open_tensorboard(directory: Path) -> Any:
    """clu's asynchronous TensorBoard writer; None, with one notice, where TensorFlow is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _silenced():  # banners of TensorFlow's C++, in the middle of the bar
            import tensorflow as tf
            from clu import metric_writers

            tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
            return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))
    except ImportError as error:
        logging.warning(
            "no TensorBoard files: %s; metrics.jsonl is written all the same.  "
            "To have them: pip install 'minigpt5_jax[metrics]'",
            error,
        )
        return None


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """An error of the file system inside says of which file it is: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the file system
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What is written to the file descriptor of stderr meanwhile, by C++ too, goes nowhere."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each value over the steps in which it was counted."""
    names = dict.fromkeys(name for values in window for name in values)
    counted = {name: [v[name] for v in window if math.isfinite(v.get(name, math.nan))] for name in names}
    return {name: sum(values) / len(values) for name, values in counted.items() if values}


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``: a resumed run writes the later ones again.  A cut-off last line goes."""
    if not path.exists():
        return

    def kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    part = path.with_suffix(".part")
    part.write_text("".join(line for line in lines if kept(line)), encoding="utf-8")
    part.replace(path)
