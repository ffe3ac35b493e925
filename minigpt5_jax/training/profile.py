"""A trace of some steps of a run, for TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from minigpt5_jax.training.loop import Loop

FOLDER = "profile"


class ProfileError(ValueError):
    """Steps that cannot be traced; the message has the remedy."""


def parse_steps(text: str) -> tuple[int, int]:
    """``"5:8"`` -> (5, 8): the first and the last step.

    Raises:
      ProfileError: anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ProfileError(
            f"--profile_steps={text!r} is not FIRST:LAST, counted from 1, such as 5:8 for four steps"
        )
    return first, last


def check_steps(workdir: str | Path, first: int, last: int, num_steps: int | None) -> None:
    """Refuse steps that the run will not do, before it reads any weights.

    Args:
      num_steps: of the run, or None where only its data tells.

    Raises:
      ProfileError: as :func:`traced`.
    """
    names = [path.name for path in Path(workdir).glob("checkpoints/[0-9]*")]
    _refuse(first, last, max((int(name) for name in names if name.isdecimal()), default=0), num_steps)


def _refuse(first: int, last: int, done: int, num_steps: int | None) -> None:
    if not done < first <= last <= (last if num_steps is None else num_steps):
        end = "its end" if num_steps is None else num_steps
        raise ProfileError(f"--profile_steps={first}:{last}, but this run does the steps {done + 1} to {end}")


@contextlib.contextmanager
def traced(loop: Loop, first: int, last: int) -> Iterator[Loop]:
    """``loop``, which writes a trace of the steps ``first`` to ``last`` into ``profile/`` of its workdir.

    Each process writes the trace of its own devices.  The steps before have ended when it begins, and the
    last one has when it ends; what is done between steps (reading, validating, saving) is in it as well.
    Where the run ends in between, for whatever reason, the trace has what was done until then.

    Raises:
      ProfileError: the run does not do these steps; the loop is closed.
    """
    try:
        _refuse(first, last, loop.first_step, loop.num_steps)
    except ProfileError:
        loop.close()
        raise
    step = _Traced(loop, first, last)
    try:
        yield dataclasses.replace(loop, train_step=step)
    finally:
        step.stop()


class _Traced:
    """A train step that begins and ends the trace."""

    def __init__(self, loop: Loop, first: int, last: int):
        self._step, self._tell = loop.train_step, loop.metrics.message
        self._folder = Path(loop.metrics.workdir) / FOLDER
        self._number, self._first, self._last = loop.first_step, first, last
        self._tracing = False

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        self._number += 1
        if self._number == self._first:
            jax.block_until_ready((state, batch))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a Python function would push out the rest
            # JAX makes Perfetto's form of the trace where a folder has that of one process only.
            alone = jax.process_count() == 1
            jax.profiler.start_trace(self._folder, create_perfetto_trace=alone, profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._number):
            state, values = self._step(state, frozen, batch)
        if self._number == self._last:
            jax.block_until_ready((state, values))
            self.stop()
        return state, values

    def stop(self) -> None:
        """Write the trace, if one is being taken."""
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        self._tell(
            f"steps {self._first} to {self._number} are traced: tensorboard --logdir {self._folder} (with "
            "tensorboard-plugin-profile), or perfetto_trace.json.gz below it at ui.perfetto.dev"
        )
