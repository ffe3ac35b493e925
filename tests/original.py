"""The original's whole model in memory, under its own names: what only comparisons with it need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minigpt5_jax.models.clip_text import weights as clip_text
from minigpt5_jax.models.eva_vit import weights as eva_vit
from minigpt5_jax.models.eva_vit.model import EvaVitConfig
from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.mapper import weights as mapper
from minigpt5_jax.models.qformer import weights as qformer
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet import weights as unet
from minigpt5_jax.models.vae import weights as vae
from minigpt5_jax.weights.foreign.minigpt5 import LLAMA_PREFIX, LLM
from minigpt5_jax.weights.table import Table, WeightTableError, linear_rules, norm_rules

GENERATOR_TABLE = (
    unet.TABLE.prefixed("unet.", "unet/")
    + vae.TABLE.prefixed("vae.", "vae/")
    + clip_text.TABLE.prefixed("sd_text_encoder.", "text_encoder/")
).prefixed(target="generator/")

STAGE1_TABLE = mapper.TABLE.prefixed(target="mapper/") + llama.VOKEN_TABLE.prefixed(LLAMA_PREFIX, LLM)
"""The 131 tensors of a stage-1 file; of the two language-model tables only the new rows are read."""


def eva_config(config: Mapping[str, Any]) -> EvaVitConfig:
    """Sizes under the argument names of EVA's own ``VisionTransformer`` (``embed_dim``, ``mlp_ratio``)."""
    assert config.get("qkv_bias", True)
    return EvaVitConfig(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        hidden_size=config["embed_dim"],
        intermediate_size=int(config["embed_dim"] * config["mlp_ratio"]),
        num_hidden_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        layer_norm_eps=config.get("norm_eps", 1e-6),
    )


def vision_table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """From images to the language model: EVA ViT, its norm, Q-Former, projection."""
    parts = Table((*norm_rules("ln_vision", "ln_vision"), *linear_rules("llama_proj", "llama_proj")))
    parts += eva_vit.table(vit).prefixed("visual_encoder.", "vit/")
    parts += qformer.table(qformer_config).prefixed(target="qformer/")
    return parts.prefixed("model.", "backbone/")


def whole_table(vit: EvaVitConfig, qformer_config: QFormerConfig) -> Table:
    """Every tensor of a stage-1 model's memory (``state_dict()`` before anything is dropped)."""
    return (
        llama.TABLE.prefixed(LLAMA_PREFIX, LLM)
        + STAGE1_TABLE
        + vision_table(vit, qformer_config)
        + GENERATOR_TABLE
    )


def split_tables(source: Mapping[str, np.ndarray], num_new: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Cut the last ``num_new`` rows off both tables of words of a state dict, under ``<key>.new``.

    Raises:
      WeightTableError: if a table is missing or has no more rows than that.
    """
    cut = dict(source)
    for key in (prefix + llama.EMBED, prefix + llama.HEAD):
        if key not in cut or cut[key].shape[0] <= num_new:
            raise WeightTableError(f"{key!r} with more than {num_new} rows is needed")
        cut[key], cut[key + ".new"] = cut[key][:-num_new], cut[key][-num_new:]
    return cut


def split_rows(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of the original with the nine new rows of both tables under keys of their own."""
    return split_tables(source, 9, LLAMA_PREFIX)


def stage1_to_params(
    source: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """What stage 1 trains, of the ``state_dict`` of its file; ``shapes``: path -> shape of it."""
    cut = split_rows(source)
    for key in (llama.EMBED, llama.HEAD):
        del cut[LLAMA_PREFIX + key]  # Vicuna's rows come from Vicuna
    return STAGE1_TABLE.to_params(cut, shapes)
