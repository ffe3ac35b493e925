"""Throw-away linear heads that read a scene's fields from single vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from minigpt5_jax.shapes.backbones.fields import CLASSES

Heads = dict[str, jax.Array]


def init_heads(key: jax.Array, width: int) -> Heads:
    """One linear map for all fields, small at the start."""
    kernel = 0.02 * jax.random.normal(key, (width, sum(CLASSES)))
    return {"kernel": kernel, "bias": jnp.zeros(sum(CLASSES))}


def read_loss(
    heads: Heads, states: Float[Array, "n t d"], labels: Int[Array | np.ndarray, "n t f"]
) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy summed over fields, share with all of them right), means over asked states.

    Negative labels are not asked; a state that is asked nothing does not count.
    """
    logits = states @ heads["kernel"] + heads["bias"]
    total, right, start = jnp.zeros(labels.shape[:2]), jnp.ones(labels.shape[:2], bool), 0
    for number, classes in enumerate(CLASSES):
        part, want = logits[..., start : start + classes], labels[..., number]
        start += classes
        asked = want >= 0
        error = optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(want, 0))
        total += jnp.where(asked, error, 0.0)
        right = right & (~asked | (part.argmax(-1) == want))
    counted = jnp.asarray((labels >= 0).any(-1))
    count = jnp.maximum(counted.sum(), 1)
    return (total * counted).sum() / count, (right & counted).sum() / count


def read(heads: Heads, states: Float[Array, "n d"]) -> Int[Array, "n f"]:
    """Most probable class of every field."""
    logits = states @ heads["kernel"] + heads["bias"]
    edges = np.cumsum(CLASSES)[:-1].tolist()
    return jnp.stack([part.argmax(-1) for part in jnp.split(logits, edges, axis=-1)], axis=-1)
