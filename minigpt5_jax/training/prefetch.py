"""Batches on the devices before the step asks for them."""

from __future__ import annotations

import collections
from collections.abc import Callable

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.pipeline import Loader


class DevicePrefetch:
    """A loader whose batches are placed ahead: the copy of the next ones runs beside the step.

    Args:
      loader: gives this process's numpy batches; it knows what was skipped.
      place: puts one on the devices; copies are asynchronous.
      ahead: batches placed and not yet used; 0 places each when it is asked for.
      closing: called in the end, behind the loader's.

    Attributes:
      state: the next step to be *used*, which is what a checkpoint stores; batches that only lie ready
        are read again after a restart.
    """

    def __init__(
        self,
        loader: Loader,
        place: Callable[[Batch], Batch],
        ahead: int = 1,
        closing: Callable[[], None] | None = None,
    ):
        self.loader, self._place, self._ahead, self._closing = loader, place, ahead, closing
        self._ready: collections.deque[Batch] = collections.deque()

    @property
    def state(self) -> int:
        return self.loader.state - len(self._ready)

    def __iter__(self) -> DevicePrefetch:
        return self

    def __next__(self) -> Batch:
        """The next batch, on the devices."""
        while len(self._ready) <= self._ahead:
            try:
                self._ready.append(self._place(next(self.loader)))
            except StopIteration:
                if not self._ready:
                    raise
                break
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the loader; batches that lie ready are dropped."""
        self._ready.clear()
        self.loader.close()
        if self._closing is not None:
            self._closing()
