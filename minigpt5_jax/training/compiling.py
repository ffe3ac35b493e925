"""What a run says while XLA makes its programs, which takes minutes at full size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from minigpt5_jax.training.metrics import Metrics

_running: set[Announced] = set()


def compiling() -> bool:
    """Whether an announced compilation is going on in this process, which then does no step."""
    return bool(_running)


class Announced:
    """A jitted function that announces its compilations.  Those behind the first do not count in the pace.

    It compiles when its last argument has arrays of shapes that it has not had before: the first batch, and
    in a run of several lengths the first one of each.

    Args:
      function: with arguments that keep their shapes, but for the last one.
      what: it does, as in ``compiling the step``.
      metrics: of the run; takes the lines, and leaves out the time.
    """

    def __init__(self, function: Callable[..., Any], what: str, metrics: Metrics):
        self.function, self._what, self._metrics = function, what, metrics
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(args[-1]))
        if shapes in self._known:
            return self.function(*args)
        first = not self._known
        self._known.add(shapes)
        self._metrics.flush()  # the step before is still being done
        why = "once before it first runs" if first else "anew for batches of another length"
        cache = jax.config.jax_compilation_cache_dir
        kept = f"; the same run reads it from {cache} next time" if cache else ""
        self._metrics.message(f"compiling {self._what}, {why}, which may take minutes{kept}")
        start = time.monotonic()
        _running.add(self)
        try:
            with contextlib.nullcontext() if first else self._metrics.paused():
                result = self.function(*args)
        finally:
            _running.discard(self)
        self._metrics.message(f"{self._what} is compiled ({time.monotonic() - start:.0f} s)")
        return result
