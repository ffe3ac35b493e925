"""EVA-CLIP ViT-g/14, the image encoder of BLIP-2 and MiniGPT-4.

A pre-norm ViT without closing norm, pooling or head: what leaves the tower is the un-normalised
output of its last block for every token, CLS included; ``ln_vision`` belongs to the backbone that
uses it.  EVA-g has 40 blocks, BLIP-2 builds the first 39 (fidelity 1.2).
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
    Conv,
    LayerNorm,
    Linear,
    Mlp,
    PublishedSizes,
    check_patches,
    check_transformer,
    normal,
    param,
    run_layers,
    stack,
)

INITIALIZER = normal(0.02)


@dataclasses.dataclass(frozen=True)
class EvaVitConfig(PublishedSizes):
    """Hyper-parameters under the names, and with the defaults, of Hugging Face's ``Blip2VisionConfig``.

    Raises:
      ValueError: a head count that does not divide the width, a patch size that does not divide
        the image, or an unknown activation.
    """

    implemented: ClassVar = {"attention_dropout": (0, None), "qkv_bias": (True,)}
    reasons: ClassVar = {"attention_dropout": ", only 0", "qkv_bias": ": the tower has q and v biases"}

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_patches(self)
        check_transformer(self)

    @property
    def num_tokens(self) -> int:
        """CLS and one token per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


EVA_VIT_G = EvaVitConfig()
"""The tower MiniGPT-4 and MiniGPT-5 use: 39 blocks, 985,894,528 parameters."""


class EvaAttention(AttentionModule):
    """Self-attention whose key projection has no bias (a constant zero in the original).

    The checkpoint's fused qkv matrix is kept as three kernels, so that each shards over whole heads.
    """

    def __init__(self, config: EvaVitConfig, **kwargs: Any):
        self.num_heads = config.num_attention_heads
        width, heads = config.hidden_size, ("heads", config.num_attention_heads)
        kwargs["kernel_init"] = INITIALIZER
        self.q_proj = Linear(width, width, axes=("embed", heads), **kwargs)
        self.k_proj = Linear(width, width, axes=("embed", heads), bias=False, **kwargs)
        self.v_proj = Linear(width, width, axes=("embed", heads), **kwargs)
        self.proj = Linear(width, width, axes=(heads, "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads))


class EvaBlock(nnx.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    def __init__(self, config: EvaVitConfig, **kwargs: Any):
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kwargs)
        self.attn = EvaAttention(config, **kwargs)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **kwargs)
        inits = (INITIALIZER, INITIALIZER)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act, inits, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EvaVit(nnx.Module):
    """The image tower; source names in ``weights.py``.

    ``dtype`` is that of matmuls, of the residual stream and of the result; ``remat`` recomputes
    each block in the backward pass.
    """

    def __init__(self, config: EvaVitConfig, *, remat: bool = False, rngs: nnx.Rngs, **dtypes: Any):
        self.config, self.remat = config, remat
        size, width, axes = config.patch_size, config.hidden_size, (None, "embed")
        self.patch_embed = Conv(
            3, width, size, stride=size, axes=axes, kernel_init=INITIALIZER, rngs=rngs, **dtypes
        )
        dtype = self.patch_embed.kernel.dtype
        self.cls_token = param(rngs, INITIALIZER, (1, 1, width), (None, *axes), dtype)
        self.pos_embed = param(rngs, INITIALIZER, (1, config.num_tokens, width), (None, *axes), dtype)
        self.blocks = stack(lambda r: EvaBlock(config, rngs=r, **dtypes), config.num_hidden_layers, rngs)

    def __call__(self, pixels: Float[Array, "i height width 3"]) -> Float[Array, "i tokens d"]:
        """Output of the last block, CLS first, then the patches row by row.

        Args:
          pixels: images normalised with CLIP's mean and deviation, ``image_size`` squared.

        Raises:
          ValueError: images of another size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"images of {pixels.shape[1:3]} pixels, image_size={size}")
        patches = self.patch_embed(pixels)
        images, width = patches.shape[0], patches.shape[-1]
        patches = patches.reshape(images, -1, width)
        cls = jnp.broadcast_to(self.cls_token[...].astype(patches.dtype), (images, 1, width))
        x = jnp.concatenate([cls, patches], axis=1) + self.pos_embed[...].astype(patches.dtype)
        return run_layers(self.blocks, x, remat=self.remat)
