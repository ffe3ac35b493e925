"""CLIP's image encoder: a pre-norm ViT whose tokens pass a norm first, and whose class token is pooled.

Hugging Face ``CLIPVisionModel``; layers are those of the text encoder, without its causal mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minigpt5_jax.models.clip_text.model import ClipEncoderLayer
from minigpt5_jax.models.common import (
    Conv,
    LayerNorm,
    PublishedSizes,
    check_patches,
    check_transformer,
    normal,
    param,
    run_layers,
    stack,
)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(PublishedSizes):
    """Hyper-parameters under the names, and with the defaults, of Hugging Face's ``CLIPVisionConfig``.

    Raises:
      ValueError: a head count that does not divide the width, a patch size that does not divide the image,
        or an unknown activation.
    """

    tower: ClassVar = "CLIP vision"
    implemented: ClassVar = {"attention_dropout": (0, None), "num_channels": (3,)}

    image_size: int = 224
    patch_size: int = 32
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_patches(self)
        check_transformer(self)

    @property
    def num_tokens(self) -> int:
        """The class token and one token per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


VIT_L14 = ClipVisionConfig(
    patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
"""Image encoder of ``openai/clip-vit-large-patch14``."""
VIT_B32 = ClipVisionConfig()
"""Image encoder of ``openai/clip-vit-base-patch32``."""
VIT_B16 = ClipVisionConfig(patch_size=16)
"""Image encoder of ``openai/clip-vit-base-patch16``."""


class VisionOutput(NamedTuple):
    """``tokens`` after the last layer, without closing norm; ``pooled`` is the class token with it."""

    tokens: Float[Array, "i tokens d"]
    pooled: Float[Array, "i d"]


class ClipVisionModel(nnx.Module):
    """The image tower; source names in ``weights.py``.

    ``dtype`` is that of matmuls and the residual stream; the pooled state is float32.  ``remat`` recomputes
    each layer in the backward pass.
    """

    def __init__(self, config: ClipVisionConfig, *, remat: bool = False, rngs: nnx.Rngs, **dtypes: Any):
        self.config, self.remat = config, remat
        size, width, init = config.patch_size, config.hidden_size, normal(0.02)
        axes = dict(axes=(None, "embed"), kernel_init=init)
        self.patch_embedding = Conv(3, width, size, stride=size, bias=False, **axes, rngs=rngs, **dtypes)
        dtype = self.patch_embedding.kernel.dtype
        self.class_embedding = param(rngs, init, (width,), ("embed",), dtype)
        self.position_embedding = param(rngs, init, (config.num_tokens, width), (None, "embed"), dtype)
        norm = dict(eps=config.layer_norm_eps, rngs=rngs)
        self.pre_layernorm = LayerNorm(width, **norm, **dtypes)
        self.layers = stack(
            lambda r: ClipEncoderLayer(config, is_causal=False, rngs=r, **dtypes),
            config.num_hidden_layers,
            rngs,
        )
        self.post_layernorm = LayerNorm(width, **norm, **{**dtypes, "dtype": jnp.float32})

    def __call__(self, pixels: Float[Array, "i height width 3"]) -> VisionOutput:
        """States of images that are normalised with CLIP's mean and deviation, ``image_size`` squared.

        Raises:
          ValueError: images of another size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"images of {pixels.shape[1:3]} pixels, image_size={size}")
        patches = self.patch_embedding(pixels)
        images, width = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (images, 1, width))
        x = jnp.concatenate([first, patches.reshape(images, -1, width)], axis=1)
        x = self.pre_layernorm(x + self.position_embedding[...].astype(x.dtype))
        x = run_layers(self.layers, x, None, remat=self.remat)
        return VisionOutput(x, self.post_layernorm(x[:, 0]))
