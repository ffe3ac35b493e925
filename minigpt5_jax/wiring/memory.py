"""How much memory a step takes, and whether layers are computed again to make it fit."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import Var
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.minigpt5 import loss_counts
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.sharding import Layout
from minigpt5_jax.training.step import loss_and_diagnostics, make_draw
from minigpt5_jax.wiring.model import ModelSpec, build

POLICIES = ("none", "backbone", "generator", "all")
"""What is computed again in the backward pass, from the least work to the least memory."""
USABLE = 0.85
"""Share of a device that is planned with; the rest is for what a layer needs while it runs, and fragments."""
STORED_COPIES = 3
"""fp32 arrays of each trainable that lie where it is stored: value and AdamW's two moments."""


def fit_memory(
    config: ConfigDict,
    spec: ModelSpec,
    batch: Batch,
    layout: Layout,
    limit: int | None = None,
    *,
    extra: int = 0,
) -> tuple[ModelSpec, str]:
    """(model, policy) with as little computed again as fits into a device; ``model.remat`` where it is said.

    Args:
      batch: shapes of this process's part of a micro-batch.
      layout: of the parameters on the mesh.
      limit: bytes of a device (:func:`device_bytes`).  Without a number (CPU) nothing is computed again.
      extra: bytes on each device of what lies there besides the model.
    """
    if config.model.remat != "auto":
        return spec, config.model.remat
    if limit is None:
        return spec, "none"
    room, shares = kept_room(spec, layout, limit, extra=extra)
    for policy in POLICIES[:-1]:
        tried = recomputing(config, spec, policy)
        if residual_bytes(tried, batch) / shares <= room:
            return tried, policy
    return recomputing(config, spec, POLICIES[-1]), POLICIES[-1]


def recomputing(config: ConfigDict, spec: ModelSpec, policy: str) -> ModelSpec:
    """The model that computes layers again by ``policy``; ``spec`` itself with ``none``."""
    return spec if policy == "none" else build(config, remat=policy).without(spec.unused)


def kept_room(spec: ModelSpec, layout: Layout, limit: int, *, extra: int = 0) -> tuple[float, int]:
    """(bytes of a device for what the forward pass keeps, devices that share a process's batch).

    Args:
      layout, limit, extra: as of :func:`fit_memory`.
    """
    # Rows are whole on each device of the tensor axis.
    shares = max(1, layout.shards // jax.process_count())
    return limit * USABLE - resident_bytes(spec, layout) - extra, shares


def device_bytes() -> int | None:
    """Memory of the first local device, None where JAX does not tell; the least of all processes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is None or jax.process_count() == 1:
        return limit
    # All processes must compile the same program.  In MiB: 32 bits are what JAX sends.
    return 2**20 * int(multihost_utils.process_allgather(np.int32(limit // 2**20)).min())


def resident_bytes(spec: ModelSpec, layout: Layout) -> int:
    """Bytes of parameters, gradients and moments on each device."""
    total = 0
    for path, shape in spec.template.shapes.items():
        if path in spec.template.absent:
            continue
        stored = layout.stored[path]
        part = math.prod(stored.shard_shape(shape.shape)) * shape.dtype.itemsize
        if spec.labels[path] == FROZEN:
            total += part
            continue
        used = layout.used[path]
        taken = math.prod(used.shard_shape(shape.shape)) * shape.dtype.itemsize
        # A step has each gradient where it is used, and a copy of the value where less is stored.
        total += STORED_COPIES * part + taken + (taken if used != stored else 0)
    return total


def residual_bytes(spec: ModelSpec, batch: Batch) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass.

    Counted on abstract values: nothing is compiled or allocated.  Parameters and the batch, which are there
    anyway, are not counted.
    """
    shapes, template, options = spec.template.shapes, spec.template, spec.options
    trainable = {path: shape for path, shape in shapes.items() if spec.labels[path] != FROZEN}
    frozen = {path: shape for path, shape in shapes.items() if spec.labels[path] == FROZEN}
    draw = make_draw(template, options)

    def forward(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> Any:
        draws = draw(key, batch)
        counts = loss_counts(batch, draws, options.loss)

        def loss(values: Any) -> jax.Array:
            return loss_and_diagnostics(template, values, frozen, batch, draws, counts, options.loss)[0]

        return jax.vjp(loss, trainable)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(forward)(trainable, frozen, batch, key).jaxpr
    there = set(jaxpr.invars)
    kept = {var for var in jaxpr.outvars if isinstance(var, Var) and var not in there}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)
