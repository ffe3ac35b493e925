"""Prefix tuning: trainable keys and values in front of the sequence (fidelity 4.4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.common import normal, param, torch_linear


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """PEFT's prefix tuning with projection (fidelity 4.4), the alternative to LoRA."""

    num_virtual_tokens: int = 5
    encoder_hidden_size: int = 1024


class PrefixEncoder(nnx.Module):
    """Trainable keys and values that every layer sees in front of the sequence, fp32.

    ``Embedding(n, d) -> Linear(d, h) -> tanh -> Linear(h, 2 layers width)``; rotary positions are not
    applied to these keys, and real tokens are numbered from ``n`` on.
    """

    def __init__(self, config: PrefixConfig, llm: Any, *, rngs: nnx.Rngs):
        """``llm``: the ``LlamaConfig``."""
        count, inner, hidden = config.num_virtual_tokens, config.encoder_hidden_size, llm.hidden_size
        self.shape = (count, llm.num_hidden_layers, 2, llm.key_value_heads, llm.head_dim)
        self.embedding = param(rngs, normal(1.0), (count, hidden), (None, "embed"))
        widths = ((hidden, inner), (inner, math.prod(self.shape[1:])))
        self.transform = nnx.List(torch_linear(*pair, axes=(None, None), rngs=rngs) for pair in widths)

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer, [layers n kv_heads head_dim] each."""
        first, second = self.transform
        flat = second(jnp.tanh(first(self.embedding[...])))
        keys, values = jnp.moveaxis(flat.reshape(self.shape), 2, 0)
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def prepend(prefix: jax.Array, own: jax.Array) -> jax.Array:
    """Put [n heads d] in front of every row of [b t heads d]."""
    rows = jnp.broadcast_to(prefix.astype(own.dtype), (own.shape[0], *prefix.shape))
    return jnp.concatenate([rows, own], axis=1)
