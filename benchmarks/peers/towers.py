"""The towers of the peers: classes of transformers and diffusers at full size (on ``meta``) or reduced."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
MAX_POSITIONS = 77  # of a caption, and queries of the mapper


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every tower: values of Hugging Face's configurations.

    Attributes:
      llama, unet, vae, clip: keyword arguments of their configurations.
      mapper: (encoder layers, decoder layers, feed-forward width); its width is the UNet's condition.
      vision: of ViT and Q-Former, None for a model that reads text only.
    """

    llama: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    mapper: tuple[int, int, int]
    vision: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    @property
    def vocabulary(self) -> int:
        """Rows V of the language model's tables before the new tokens."""
        return self.llama["vocab_size"]

    @property
    def width(self) -> int:
        """Of the condition."""
        return self.unet["cross_attention_dim"]


def _llama(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, positions: int
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def _clip(vocabulary: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "gelu",
    }


FULL = Sizes(
    llama=_llama(32_000, 4096, 11_008, 32, 32, 2048),
    unet=UNET
    | {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
    },
    vae=VAE | {"sample_size": 512, "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32},
    clip=_clip(49_408, 1024, 23, 16),
    mapper=(4, 4, 4096),
    vision=(
        {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
        {"hidden_size": 768, "num_hidden_layers": 12, "encoder_hidden_size": 1408, "vocab_size": 1},
    ),
)
"""MiniGPT-5's: Vicuna-7B, Stable Diffusion 2.1-base, EVA ViT-g/14, BLIP-2's Q-Former."""

REDUCED = Sizes(
    llama=_llama(4_000, 512, 1376, 8, 8, 256),
    unet=UNET
    | {
        "sample_size": 32,
        "block_out_channels": [64, 128, 256, 256],
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": 256,
    },
    vae=VAE | {"sample_size": 256, "block_out_channels": [24, 48, 96, 96], "norm_num_groups": 8},
    clip=_clip(4_000, 256, 4, 4),
    mapper=(1, 1, 1024),
)
"""Rows 4, 12 and 13."""


class Mapper(nn.Module):
    """The feature mapper under the names of the original's checkpoints: hidden states [n 8 d] -> [n 77 c]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        inner, width = sizes.llama["hidden_size"], sizes.width
        encoder, decoder, feed_forward = sizes.mapper
        self.fc = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        with warnings.catch_warnings(action="ignore"):  # says that it cannot use nested tensors
            self.llm_to_t2i_mapping = nn.Transformer(
                width, 8, encoder, decoder, feed_forward, dropout=0.0, norm_first=True, batch_first=True
            )
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, MAX_POSITIONS, width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.llm_to_t2i_mapping(self.fc(states), self.t2i_decoder_prompt.expand(len(states), -1, -1))


class Vision(nn.Module):
    """ViT, Q-Former and projection: images [i 3 224 224] -> [i 32 d]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        vit, qformer = sizes.vision
        self.vit = Blip2VisionModel._from_config(Blip2VisionConfig(**vit))
        self.qformer = Blip2QFormerModel._from_config(Blip2QFormerConfig(**qformer))
        self.queries = nn.Parameter(torch.zeros(1, 32, qformer["hidden_size"]))
        self.project = nn.Linear(qformer["hidden_size"], sizes.llama["hidden_size"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.vit(images).last_hidden_state
        queries = self.queries.expand(len(images), -1, -1)
        return self.project(self.qformer(queries, encoder_hidden_states=patches).last_hidden_state)


@dataclasses.dataclass
class Towers:
    """Frozen towers of one set of sizes, on one device."""

    sizes: Sizes
    llama: LlamaForCausalLM
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    clip: CLIPTextModel
    vision: Vision | None = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.llama.lm_head.weight.device


def make_towers(sizes: Sizes, device: str, seed: int = 0, new_rows: int = 0, **clip: int) -> Towers:
    """Towers of random fp32 weights, the language model and the text encoder with eager attention.

    Args:
      device: ``meta`` for shapes alone.
      new_rows: of the language model's tables, behind the V of ``sizes``.
      clip: ids of the captions' begin and end.
    """
    torch.manual_seed(seed)
    llama = LlamaConfig(**sizes.llama | {"vocab_size": sizes.vocabulary + new_rows})
    with torch.device(device):
        towers = Towers(
            sizes,
            LlamaForCausalLM._from_config(llama, attn_implementation="eager", dtype=torch.float32),
            UNet2DConditionModel(**sizes.unet),
            AutoencoderKL(**sizes.vae),
            CLIPTextModel._from_config(CLIPTextConfig(**sizes.clip, **clip), attn_implementation="eager"),
            Vision(sizes) if sizes.vision else None,
        )
    for tower in (towers.llama, towers.unet, towers.vae, towers.clip, towers.vision):
        if tower is not None:
            tower.requires_grad_(False).eval()
    return towers
