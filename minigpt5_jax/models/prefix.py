"""Prefix tuning: trainable keys and values in front of the sequence (reference section 4.4)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.common import Linear, normal, param, uniform_fan_in


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """PEFT's prefix tuning with projection (reference 4.4), the alternative to LoRA."""

    num_virtual_tokens: int = 5
    encoder_hidden_size: int = 1024


class PrefixEncoder(nnx.Module):
    """Trainable keys and values that every layer sees in front of the sequence, fp32.

    ``Embedding(n, d) -> Linear(d, h) -> tanh -> Linear(h, 2 layers width)``; rotary positions are not
    applied to these keys, and real tokens are numbered from ``n`` on.
    """

    def __init__(
        self,
        config: PrefixConfig,
        *,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
    ):
        self.shape = (config.num_virtual_tokens, num_layers, 2, num_heads, head_dim)
        inner, size = config.encoder_hidden_size, 2 * num_layers * num_heads * head_dim
        self.embedding = param(rngs, normal(1.0), (config.num_virtual_tokens, hidden_size), (None, "embed"))
        self.transform = nnx.List(
            [
                Linear(
                    i,
                    o,
                    axes=(None, None),
                    kernel_init=uniform_fan_in(i),
                    bias_init=uniform_fan_in(i),
                    rngs=rngs,
                )
                for i, o in ((hidden_size, inner), (inner, size))
            ]
        )

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer, [layers n kv_heads head_dim] each."""
        first, second = self.transform
        flat = second(jnp.tanh(first(self.embedding[...])))
        keys, values = jnp.moveaxis(flat.reshape(self.shape), 2, 0)
        return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def behind(prefix: jax.Array, own: jax.Array) -> jax.Array:
    """Put [n heads d] in front of every row of [b t heads d]."""
    rows = jnp.broadcast_to(prefix.astype(own.dtype), (own.shape[0], *prefix.shape))
    return jnp.concatenate([rows, own], axis=1)
