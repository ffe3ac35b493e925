"""What training changes: the trainable parameters, the optimizer, the step and the random key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minigpt5_jax.training.optimizer import with_frozen_masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Donated to every step.  Frozen weights are not in it; they are an argument of their own.

    Attributes:
      step: i32[], number of updates done.
      trainable: path -> fp32 array.
      opt_state: Optax state of the trainable leaves.
      rng: key of the run; step s draws from ``fold_in(rng, s)``.
    """

    step: Any
    trainable: Any
    opt_state: Any
    rng: Any


def init_state(
    trainable: Mapping[str, jax.Array],
    labels: Mapping[str, str],
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """State at step 0."""
    opt_state = optimizer.init(with_frozen_masked(trainable, labels))
    return TrainState(jnp.zeros((), jnp.int32), dict(trainable), opt_state, jax.random.key(seed))
