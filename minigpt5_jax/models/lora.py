"""Low-rank adaptation of frozen dense layers (fidelity 4.3, 7.3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.common import Axis, Linear, param, uniform_fan_in, zeros

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """PEFT's ``LoraConfig`` fields: ``W + lora_alpha / r * A B``, dropout on the input of A.

    Raises:
      ValueError: for a rank below 1, a dropout outside [0, 1) or a target that is no attention
        projection.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"LoRA r={self.r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA lora_dropout={self.lora_dropout} must be in [0, 1)")
        if unknown := sorted(set(self.target_modules) - set(ATTENTION_PROJECTIONS)):
            raise ValueError(f"LoRA target_modules={unknown}: only {ATTENTION_PROJECTIONS} can be targets")

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return self.lora_alpha / self.r


class LoraLinear(Linear):
    """A frozen dense layer without bias, plus a trainable low-rank update held in fp32.

    Args:
      lora: the update, or None for a plain dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora: LoraConfig | None,
        axes: tuple[Axis, Axis],
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, axes=axes, bias=False, rngs=rngs, **kwargs)
        self.lora = lora
        if lora is not None:
            # torch's kaiming_uniform(a=sqrt(5)) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
            self.lora_a = param(rngs, uniform_fan_in(in_features), (in_features, lora.r), (axes[0], None))
            self.lora_b = param(rngs, zeros, (lora.r, out_features), (None, axes[1]))

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """``x [b t in] -> [b t out]``; ``dropout_keys`` (key[b]) drops inputs of A, row by row."""
        y = super().__call__(x)
        if self.lora is None:
            return y
        if dropout_keys is not None and self.lora.lora_dropout > 0:
            keep = 1.0 - self.lora.lora_dropout
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(dropout_keys)
            x = jnp.where(kept, x / keep, 0.0).astype(x.dtype)
        low = x.astype(self.dtype) @ self.lora_a[...].astype(self.dtype)
        return y + self.lora.scale * (low @ self.lora_b[...].astype(self.dtype))
