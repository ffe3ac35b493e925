"""Throw-away linear heads that read a scene's attributes from single vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from minigpt5_jax.shapes.texts import VALUES

Heads = dict[str, jax.Array]


def init_heads(key: jax.Array, width: int) -> Heads:
    """One linear map for all attributes, small at the start."""
    count = sum(len(values) for values in VALUES.values())
    return {"kernel": 0.02 * jax.random.normal(key, (width, count)), "bias": jnp.zeros(count)}


def read_loss(
    heads: Heads,
    states: Float[Array, "n t d"],
    labels: Int[Array | np.ndarray, "n a"],
    mask: Bool[Array | np.ndarray, "n t"],
) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy summed over attributes, share with all of them right), means over marked states."""
    logits = states @ heads["kernel"] + heads["bias"]
    total, right, start = 0.0, mask, 0
    for number, values in enumerate(VALUES.values()):
        part, want = logits[..., start : start + len(values)], labels[:, None, number]
        start += len(values)
        want = jnp.broadcast_to(want, part.shape[:-1])
        total += optax.softmax_cross_entropy_with_integer_labels(part, want)
        right = right & (part.argmax(-1) == want)
    return (total * mask).sum() / mask.sum(), right.sum() / mask.sum()
