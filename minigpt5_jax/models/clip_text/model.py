"""CLIP text encoder: the caption targets of the voken stage and the native text-to-image condition.

Hugging Face ``CLIPTextModel`` (Stable Diffusion's ``text_encoder``): learned positions, causal
pre-norm transformer, closing LayerNorm.  SD 2.1 keeps 23 of OpenCLIP ViT-H's 24 layers, so
``last_hidden_state`` is the penultimate feature the UNet was trained on (fidelity 1.7).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import (
    Embedding,
    LayerNorm,
    Linear,
    Mlp,
    PublishedSizes,
    check_transformer,
    normal,
    run_layers,
    stack,
)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(PublishedSizes):
    """Hyper-parameters under the names, and with the defaults, of Hugging Face's ``CLIPTextConfig``.

    Raises:
      ValueError: a head count that does not divide the width, or an unknown activation.
    """

    implemented: ClassVar = {"attention_dropout": (0, None)}
    reasons: ClassVar = {"attention_dropout": ", only 0"}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_transformer(self)


SD21_TEXT = ClipTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
"""Text encoder of ``stabilityai/stable-diffusion-2-1-base``: 340,387,840 parameters."""


class ClipAttention(AttentionModule):
    """Multi-head self-attention with biased projections; causal in the text encoder."""

    def __init__(self, config: Any, *, is_causal: bool = True, **kwargs: Any):
        self.num_heads, self.is_causal = config.num_attention_heads, is_causal
        width, heads = config.hidden_size, ("heads", config.num_attention_heads)
        # The residual branches start small with depth (CLIP's own initialisation).
        inner = normal(width**-0.5 * (2 * config.num_hidden_layers) ** -0.5)

        self.q_proj = Linear(width, width, axes=("embed", heads), kernel_init=inner, **kwargs)
        self.k_proj = Linear(width, width, axes=("embed", heads), kernel_init=inner, **kwargs)
        self.v_proj = Linear(width, width, axes=("embed", heads), kernel_init=inner, **kwargs)
        self.out_proj = Linear(width, width, axes=(heads, "embed"), kernel_init=normal(width**-0.5), **kwargs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(self.attend(*projected, self.num_heads, mask=mask, is_causal=self.is_causal))


class ClipEncoderLayer(nnx.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``; ``config`` is that of either encoder."""

    def __init__(self, config: Any, *, is_causal: bool = True, **kwargs: Any):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kwargs)
        self.self_attn = ClipAttention(config, is_causal=is_causal, **kwargs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kwargs)
        width, hidden = config.hidden_size, config.intermediate_size
        inits = normal((2 * width) ** -0.5), normal(width**-0.5 * (2 * config.num_hidden_layers) ** -0.5)
        self.mlp = Mlp(width, hidden, config.hidden_act, inits, **kwargs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipTextModel(nnx.Module):
    """The text tower; source names in ``weights.py``.

    ``dtype`` is that of matmuls and the residual stream; the closing norm returns float32, as the
    original's caption features are (fidelity 1.13).  ``remat`` recomputes each layer in
    the backward pass.
    """

    def __init__(self, config: ClipTextConfig, *, remat: bool = False, rngs: nnx.Rngs, **dtypes: Any):
        self.config, self.remat = config, remat
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.position_embedding = Embedding(
            config.max_position_embeddings, config.hidden_size, axes=(None, "embed"), rngs=rngs, **dtypes
        )
        self.layers = stack(
            lambda r: ClipEncoderLayer(config, rngs=r, **dtypes), config.num_hidden_layers, rngs
        )
        dtypes["dtype"] = jnp.float32
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs, **dtypes)

    def __call__(
        self,
        input_ids: Int[Array, "m c"],
        attention_mask: Int[Array, "m c"] | Bool[Array, "m c"] | None = None,
    ) -> Float[Array, "m c d"]:
        """Last hidden state after the closing norm, float32, for every position.

        Args:
          input_ids: token ids, at most ``max_position_embeddings`` per row.
          attention_mask: nonzero at real tokens.  Without it pads are attended to, as Stable
            Diffusion's pipelines do; the caption target passes it (fidelity 3.3).  It
            changes pad positions only where pads follow the text, because attention is causal.

        Raises:
          ValueError: more tokens than positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens, max_position_embeddings={self.config.max_position_embeddings}"
            )
        x = self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        return self.final_layer_norm(run_layers(self.layers, x, mask, remat=self.remat))
