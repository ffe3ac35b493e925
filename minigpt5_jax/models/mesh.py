"""Which axes of a mesh activations are spread over.  Outside of a mesh (``jax.set_mesh``) nothing is.

The train step runs its shards, the places of ``data x fsdp``, apart from each other as a mapped axis
(:data:`SHARDS`, :mod:`minigpt5_jax.training.step`): in there these two axes are taken.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

SHARDS = "shards"
SHARD_AXES = ("data", "fsdp")
LAYOUTS = {"rows": (SHARD_AXES, "tensor"), "items": ((*SHARD_AXES, "tensor"), None)}
"""What is computed -> mesh axes of its batch and of its heads (:mod:`minigpt5_jax.training.sharding`)."""


def batch_axes(layout: str) -> tuple[str, ...]:
    """Mesh axes that a batch is spread over here."""
    axes = LAYOUTS[layout][0]
    return tuple(axis for axis in axes if axis not in SHARD_AXES) if inside_shards() else axes


def inside_shards() -> bool:
    """Whether what is traced is one of the train step's shards."""
    try:
        jax.lax.axis_size(SHARDS)
    except NameError:
        return False
    return True


def spread(x: jax.Array, layout: str, dim: int = 0, heads: int | None = None) -> jax.Array:
    """``x``, told to lie on the mesh as a batch of this layout does; the values are the same.

    Args:
      dim: the dimension that is the batch.  heads: the one that is the heads of attention, if there is one.
    """
    if jax.sharding.get_abstract_mesh().empty or x.shape[dim] == 1:
        return x
    spec: list[Any] = [None] * x.ndim
    spec[dim] = batch_axes(layout) or None
    if heads is not None:
        spec[heads] = LAYOUTS[layout][1]
    return jax.lax.with_sharding_constraint(x, P(*spec))
