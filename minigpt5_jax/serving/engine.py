"""One thread that owns the model: requests of the same settings are answered together."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from absl import logging

from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.inference.streaming import Asked, Drawer, Finished, Piece, StreamingSession
from minigpt5_jax.serving.metrics import Metrics
from minigpt5_jax.wiring.pipeline import MiniGPT5
from minigpt5_jax.wiring.session import open_sampler, override

Event = Piece | Finished | Exception
KEPT = 8
"""Compiled programs of each kind that are kept; clients choose settings, and each choice compiles."""
GATHERING = 0.02
"""Seconds in which a first request waits for others to come along."""


@dataclasses.dataclass(eq=False)
class Job:
    """One answer that is waited for.

    Attributes:
      asked: the prompt.
      settings: of ``config.inference``, for its text.
      steps: denoising steps of its images; None for the run's.
      tell: called by the model's thread with each event; the last one is ``Finished`` or an exception.
      left: set by whoever waits no longer.
    """

    asked: Asked
    settings: Mapping[str, Any]
    steps: int | None
    tell: Callable[[Event], None]
    left: bool = False

    @property
    def key(self) -> Hashable:
        """Jobs of one key are answered together."""
        return tuple(sorted(self.settings.items())), self.steps, self.asked.image_room


class Kept(collections.OrderedDict):
    """The last :data:`KEPT` values, made when they are asked for."""

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key."""
        if key not in self:
            self[key] = make()
            while len(self) > KEPT:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class Engine:
    """The model's thread and what waits for it.

    Args:
      model: answers nothing else meanwhile.
      batch_size: answers made together.
      metrics: told of every batch.
    """

    def __init__(self, model: MiniGPT5, batch_size: int, metrics: Metrics):
        self.model, self.batch_size, self.metrics = model, batch_size, metrics
        self._sessions, self._drawers = Kept(), Kept()
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self.inside = 0  # requests that were let in, counted by the event loop alone
        self._closing, self._seconds = False, 1.0  # of a batch, as the last ones took
        self.reader = self._session({})
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Compile what most requests need, then answer."""
        prompt, _ = self.model.prompt("hello")
        self.reader.warm_up(prompt, self._drawer(None))
        self._thread.start()

    def read(self, prompt: Prompt, **how: Any) -> Asked:
        """A prompt that may be submitted; ``how`` as the fields of :class:`Asked`."""
        how = {"guidance_scale": self.model.config.inference.guidance_scale} | {
            name: value for name, value in how.items() if value is not None
        }
        return Asked(self.reader.read(prompt), **how)

    def submit(self, *jobs: Job) -> None:
        """Put into the queue; what is the run's own setting anyway needs no program of its own."""
        usual = self.model.config.inference
        for job in jobs:
            job.settings = {name: value for name, value in job.settings.items() if usual[name] != value}
            job.steps = None if job.steps == usual.num_inference_steps else job.steps
        with self._changed:
            self._jobs.extend(jobs)
            self._changed.notify()

    def patience(self) -> int:
        """Seconds after which what waits now will have been answered, about."""
        return max(1, math.ceil(self._seconds * len(self._jobs) / self.batch_size))

    def close(self) -> None:
        """End the thread when all that waits is answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while jobs := self._next():
            started = time.monotonic()
            try:
                self._answer(jobs)
            except Exception as error:  # whatever it was, the next batch may go well
                logging.exception("a batch of %d answers failed", len(jobs))
                for job in jobs:
                    job.tell(error)
            taken = time.monotonic() - started
            self._seconds += 0.3 * (taken - self._seconds)
            self.metrics.batch(len(jobs), taken)

    def _next(self) -> list[Job]:
        """The jobs of the next batch: the one that waits longest, and others of its key; none at the end."""
        with self._changed:
            while True:
                self._jobs = collections.deque(job for job in self._jobs if not job.left)
                if self._jobs:
                    break
                if self._closing:
                    return []
                self._changed.wait()
            until = time.monotonic() + GATHERING
            while len(self._jobs) < self.batch_size and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            key = self._jobs[0].key
            chosen = [job for job in self._jobs if job.key == key][: self.batch_size]
            for job in chosen:
                self._jobs.remove(job)
            return chosen

    def _answer(self, jobs: list[Job]) -> None:
        session, drawer = self._session(jobs[0].settings), self._drawer(jobs[0].steps)
        asked = [job.asked for job in jobs]
        for event in session.stream(asked, drawer, lambda row: not jobs[row].left):
            jobs[event.row].tell(event)

    def _session(self, settings: Mapping[str, Any]) -> StreamingSession:
        def make() -> StreamingSession:
            model = dataclasses.replace(self.model.model, config=self._config(settings))
            return model.session(batch_size=self.batch_size, kind=StreamingSession)

        return self._sessions.get_or_make(tuple(sorted(settings.items())), make)

    def _drawer(self, steps: int | None) -> Drawer:
        def make() -> Drawer:
            config = self._config({} if steps is None else {"num_inference_steps": steps})
            return self.reader.drawer(open_sampler(config, self.model.model.spec))

        return self._drawers.get_or_make(steps, make)

    def _config(self, settings: Mapping[str, Any]) -> Any:
        words = {name: value if isinstance(value, str) else repr(value) for name, value in settings.items()}
        return override(self.model.config.copy_and_resolve_references(), words)
