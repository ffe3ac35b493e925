"""A run whose next batch never comes: its two worker processes make three and then wait for ever.

Usage: python waiting_worker.py WORKDIR; prints ``waiting`` when the fourth batch is asked for.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parents[2])]

import dataclasses

import numpy as np

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.pipeline import Loader, Report

GIVEN = 3


class Reader:
    """Batches of zeros, as many as are given."""

    source, parts = None, ()
    plan = SimpleNamespace(num_steps=None)

    def __call__(self, step):
        if step >= GIVEN:
            time.sleep(600)
        names = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]
        arrays = {name: np.zeros(1, np.int32) for name in names}
        return {"batch": arrays, "uncached": {}, "report": Report((), 0)}


if __name__ == "__main__":
    import jax
    import jax.numpy as jnp

    from minigpt5_jax.data.batches import pipeline
    from minigpt5_jax.training.checkpoint import Checkpoints
    from minigpt5_jax.training.loop import Loop
    from minigpt5_jax.training.metrics import Metrics
    from minigpt5_jax.training.prefetch import DevicePrefetch
    from minigpt5_jax.training.sharding import make_mesh
    from minigpt5_jax.training.state import TrainState

    folder, pipeline.CLOSING_SECONDS = Path(sys.argv[1]), 0.5

    def train_step(state, frozen, batch):
        if state.step == GIVEN - 1:
            print("waiting", flush=True)
        return state.__class__(state.step + 1, state.trainable, state.opt_state, state.rng), {"loss": 1.0}

    state = TrainState(jnp.asarray(0), {"a": jnp.zeros(2)}, {"m": jnp.zeros(1)}, jnp.zeros(2, jnp.uint32))
    data = DevicePrefetch(Loader(Reader(), budget=0, worker_count=2, prefetch=1), lambda batch: batch, 0)
    checkpoints, metrics = Checkpoints(folder / "checkpoints"), Metrics(folder, 9, first_step=0, active=False)
    mesh = make_mesh(devices=jax.devices()[:1])
    Loop(state, {}, train_step, mesh, data, metrics, checkpoints, {}, 0, 9, 0, 100, 0).run()
