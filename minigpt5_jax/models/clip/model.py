"""CLIP whole: text and image encoder with their projections into one space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minigpt5_jax.models.clip_text.model import ClipTextConfig, ClipTextModel
from minigpt5_jax.models.clip_vision.model import VIT_B16, VIT_B32, VIT_L14, ClipVisionConfig, ClipVisionModel
from minigpt5_jax.models.common import Linear, normal, param

TEXT_B = ClipTextConfig()
"""Text encoder of ViT-B/32 and ViT-B/16."""


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers, and the width of the space that they share (Hugging Face ``CLIPConfig``)."""

    text_config: ClipTextConfig = TEXT_B
    vision_config: ClipVisionConfig = VIT_B32
    projection_dim: int = 512

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ClipConfig:
        """Sizes from a published ``config.json``.

        Raises:
          ValueError: a value is not implemented, or it is no ``config.json`` of CLIP whole.
        """
        if not {"text_config", "vision_config"} <= config.keys():
            raise ValueError("no text_config and vision_config: this is not the config.json of CLIP whole")
        return cls(
            ClipTextConfig.from_hf(config["text_config"]),
            ClipVisionConfig.from_hf(config["vision_config"]),
            config.get("projection_dim", 512),
        )


CLIP_L14 = ClipConfig(
    ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12), VIT_L14, 768
)
"""``openai/clip-vit-large-patch14``: 427,616,513 parameters."""
CLIP_B32 = ClipConfig()
"""``openai/clip-vit-base-patch32``: 151,277,313 parameters."""
CLIP_B16 = ClipConfig(vision_config=VIT_B16)
"""``openai/clip-vit-base-patch16``."""


class Clip(nnx.Module):
    """Both encoders; source names in ``weights.py``.  Features are not normalised."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        self.text = ClipTextModel(config.text_config, rngs=rngs, **dtypes)
        self.vision = ClipVisionModel(config.vision_config, rngs=rngs, **dtypes)
        width, more = config.projection_dim, dict(bias=False, axes=("embed", None), rngs=rngs, **dtypes)
        text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
        self.text_projection = Linear(text, width, kernel_init=normal(text**-0.5), **more)
        self.visual_projection = Linear(vision, width, kernel_init=normal(vision**-0.5), **more)
        self.logit_scale = param(rngs, jax.nn.initializers.constant(2.6592), (), ())

    def image_features(self, pixels: Float[Array, "i height width 3"]) -> Float[Array, "i d"]:
        """Features of normalised images (:class:`ClipVisionModel`)."""
        return self.visual_projection(self.vision(pixels).pooled)

    def text_features(self, input_ids: Int[Array, "m c"], ends: Int[Array, " m"]) -> Float[Array, "m d"]:
        """Features of texts: the state at the end-of-text token, projected.

        Args:
          input_ids: token ids; what follows the end does not matter, because attention is causal.
          ends: place of the end-of-text token in each row.
        """
        states = self.text(input_ids)
        return self.text_projection(jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0])
