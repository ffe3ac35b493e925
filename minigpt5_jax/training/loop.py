"""The loop: step, log the step before, validate, draw, save.  Only sequencing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from minigpt5_jax.batch import Batch
from minigpt5_jax.models.common import Params
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.interruption import Interruption
from minigpt5_jax.training.metrics import Metrics, due
from minigpt5_jax.training.prefetch import DevicePrefetch
from minigpt5_jax.training.state import TrainState


@dataclasses.dataclass
class Loop:
    """Everything a run needs, made by the command line.

    Attributes:
      state: where to start; ``frozen``: parameters that are an argument of the step and never change.
      train_step: ``(state, frozen, batch) -> (state, metrics)``, compiled, donating the state.
      mesh: of the devices; kernels that the compiler cannot split ask for it while the step is traced.
      data: batches on the devices.
      validate: ``trainable -> {name: value}``; ``grid``: ``trainable -> u8[H W 3]``; None for neither.
      reached: told every step that is sent off.
      saved_parts: part name -> arrays saved beside the state (parameters inherited from another run).
      meta: description of the run that a checkpoint carries.
    """

    state: TrainState
    frozen: Params
    train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Any]]]
    mesh: jax.sharding.Mesh
    data: DevicePrefetch
    metrics: Metrics
    checkpoints: Checkpoints
    meta: Mapping[str, Any]
    first_step: int
    num_steps: int
    eval_every: int
    save_every: int
    grid_every: int
    validate: Callable[[Params], dict[str, float]] | None = None
    grid: Callable[[Params], np.ndarray] | None = None
    saved_parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reached: Callable[[int], Any] = lambda step: None

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last validation (empty without one).

        Raises:
          SystemExit: SIGTERM or Ctrl-C asked to stop: with status 143 or 130, after a checkpoint.
        """
        results: dict[str, float] = {}
        step, saved, told = self.first_step, self.first_step, None
        try:
            with jax.set_mesh(self.mesh), self.metrics, Interruption() as interruption:
                while step < self.num_steps and not told:
                    position = self.data.state
                    batch = interruption.wait(lambda: next(self.data))
                    if batch is None:
                        told = interruption.noted
                        break
                    step, position, validated = step + 1, self.data.state, None
                    self.state, values = self.train_step(self.state, self.frozen, batch)
                    self.reached(step)
                    self.metrics.push(step, values)
                    last = step == self.num_steps
                    if self.validate and (due(step, self.eval_every) or (last and self.eval_every)):
                        results = validated = self._validate(step)
                    if self.grid and (due(step, self.grid_every) or (last and self.grid_every)):
                        with self.metrics.paused():
                            self.metrics.image(step, "held_out", self.grid(self.state.trainable))
                    self.checkpoints.check()
                    told = None if last else interruption.after(step)
                    if due(step, self.save_every) or last or told:
                        self._save(step, position, validated)
                        saved = step
                if step > saved:  # told while the next batch was waited for
                    self._save(step, position)
                self._tell_left_out()
        finally:
            self.close()
        if told:
            done = f"step {step} of {self.num_steps} is saved; the same command goes on from it"
            nothing = "no step was done since the start, so there is nothing new to save"
            self.metrics.message(f"stopped by {told.name}: {done if step > self.first_step else nothing}")
            raise SystemExit(128 + told)
        return results

    def close(self) -> None:
        """End worker processes, wait until a checkpoint is on disk, and let go of the workdir.

        A loop that has run did that.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.data.close()
        finally:
            self.checkpoints.close()

    def _tell_left_out(self) -> None:
        skipped, truncated = len(self.data.loader.skipped), self.data.loader.truncated
        if skipped or truncated:
            self.metrics.message(f"{skipped} unusable samples were left out, {truncated} were cut to fit")

    def _validate(self, step: int) -> dict[str, float]:
        self.metrics.flush()
        with self.metrics.paused():
            results = self.validate(self.state.trainable)
        self.metrics.write(step, results, "validation/")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        self.metrics.message(f"step {step}, held out: {shown}")
        return results

    def _save(self, step: int, position: int, validated: Mapping[str, float] | None = None) -> None:
        losses = self.metrics.flush()  # raises before a diverged state can be saved
        state = {**vars(self.state), **self.saved_parts}
        self.checkpoints.save(
            step,
            state,
            position,
            self.meta,
            metrics=validated,
            losses={"loss": losses["loss"]} if losses else None,
        )
