"""Q-Former, query branch only: 32 learned queries read the image tokens by cross-attention.

BERT's post-norm layers; the text branch of BLIP-2 (word embeddings, text feed-forward, LM head) is
not built, as in MiniGPT-4 (fidelity 1.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    PublishedSizes,
    check_transformer,
    normal,
    param,
    run_layers,
    stack,
)


@dataclasses.dataclass(frozen=True)
class QFormerConfig(PublishedSizes):
    """Hyper-parameters under the names, and with the defaults, of Hugging Face's ``Blip2QFormerConfig``.

    Dropout rates of a published file are not read: the tower is frozen and always in evaluation mode.
    ``num_query_tokens`` is the one field that lives in ``Blip2Config`` there.  The first of every
    ``cross_attention_frequency`` layers has cross-attention.

    Raises:
      ValueError: a head count that does not divide the width, a layer count that the frequency
        does not divide, or an unknown activation.
    """

    implemented: ClassVar = {"position_embedding_type": ("absolute",)}
    reasons: ClassVar = {"position_embedding_type": ""}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    num_query_tokens: int = 32

    def __post_init__(self) -> None:
        if self.num_hidden_layers % self.cross_attention_frequency:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} does not divide into groups of "
                f"cross_attention_frequency={self.cross_attention_frequency}"
            )
        check_transformer(self)


BLIP2_QFORMER = QFormerConfig()
"""BLIP-2's Q-Former: 105,137,664 parameters and 24,576 of query tokens."""


class QFormerAttention(AttentionModule):
    """Multi-head attention with its residual and post-norm; keys and values from ``context``."""

    def __init__(self, config: QFormerConfig, context_size: int, **kwargs: Any):
        self.num_heads = config.num_attention_heads
        width, heads = config.hidden_size, ("heads", config.num_attention_heads)
        dense = dict(kernel_init=normal(config.initializer_range), **kwargs)
        self.query = Linear(width, width, axes=("embed", heads), **dense)
        self.key = Linear(context_size, width, axes=("embed", heads), **dense)
        self.value = Linear(context_size, width, axes=("embed", heads), **dense)
        self.output = Linear(width, width, axes=(heads, "embed"), **dense)
        self.layer_norm = LayerNorm(width, eps=config.layer_norm_eps, **{**kwargs, "dtype": jnp.float32})

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        attended = self.attend(self.query(x), self.key(context), self.value(context), self.num_heads)
        return self.layer_norm(x + self.output(attended))


class QFormerLayer(nnx.Module):
    """Self-attention, cross-attention if the layer has it, then the query feed-forward; all post-norm."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool, **kwargs: Any):
        dense = dict(kernel_init=normal(config.initializer_range), **kwargs)
        width, hidden = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = QFormerAttention(config, width, **kwargs)
        self.crossattention = (
            QFormerAttention(config, config.encoder_hidden_size, **kwargs) if has_cross_attention else None
        )
        self.intermediate_query = Linear(width, hidden, axes=("embed", "mlp"), **dense)
        self.output_query = Linear(hidden, width, axes=("mlp", "embed"), **dense)
        self.layer_norm = LayerNorm(width, eps=config.layer_norm_eps, **{**kwargs, "dtype": jnp.float32})

    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image)
        return self.layer_norm(x + self.output_query(self.activation(self.intermediate_query(x))))


class QFormerGroup(nnx.Module):
    """The unit that repeats: one layer with cross-attention and the plain layers after it."""

    def __init__(self, config: QFormerConfig, **kwargs: Any):
        self.layer = nnx.List(
            QFormerLayer(config, position == 0, **kwargs)
            for position in range(config.cross_attention_frequency)
        )

    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        for layer in self.layer:
            x = layer(x, image)
        return x


class QFormer(nnx.Module):
    """Queries and encoder; source names in ``weights.py``.

    Matmuls run in ``dtype``; the residual stream leaves every post-norm, and the tower, in float32
    (fidelity 1.13).  ``remat`` recomputes each group of layers in the backward pass.
    """

    def __init__(self, config: QFormerConfig, *, remat: bool = False, rngs: nnx.Rngs, **dtypes: Any):
        self.config, self.remat = config, remat
        shape, dtype = (
            (1, config.num_query_tokens, config.hidden_size),
            dtypes.get("param_dtype", jnp.float32),
        )
        self.query_tokens = param(rngs, normal(config.initializer_range), shape, (None, None, "embed"), dtype)
        full = {**dtypes, "dtype": jnp.float32}
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs, **full)
        count = config.num_hidden_layers // config.cross_attention_frequency
        self.groups = stack(lambda r: QFormerGroup(config, rngs=r, **dtypes), count, rngs)

    def __call__(self, encoder_hidden_states: Float[Array, "i p d_enc"]) -> Float[Array, "i q d"]:
        """Last hidden state of the queries, float32, for each image.

        Args:
          encoder_hidden_states: image tokens after ``ln_vision``; every one is attended to.
        """
        x = self.layer_norm(self.query_tokens[...])  # BERT's embedding norm: applied to the queries too
        x = jnp.broadcast_to(x, (encoder_hidden_states.shape[0], *x.shape[1:]))
        return run_layers(self.groups, x, encoder_hidden_states, remat=self.remat)
