"""Weight table of CLIP's image encoder (Hugging Face ``CLIPVisionModel``, alone or inside ``CLIPModel``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from minigpt5_jax.models.clip_vision.model import VIT_B16, VIT_B32, VIT_L14, ClipVisionConfig, ClipVisionModel
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.table import CONV, Rule, Table, each, linear_rules, norm_rules

PREFIX = "vision_model."

_LAYER = "encoder.layers.{i}."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

_BARE = Table(
    (
        Rule("embeddings.class_embedding", "class_embedding"),
        Rule("embeddings.patch_embedding.weight", "patch_embedding/kernel", CONV),
        Rule("embeddings.position_embedding.weight", "position_embedding"),
        *norm_rules("pre_layrnorm", "pre_layernorm"),  # the name is misspelt in every file
        *each(norm_rules, _LAYER, "layers/", ("layer_norm1", "layer_norm2")),
        *each(linear_rules, _LAYER + "self_attn.", "layers/self_attn/", _PROJECTIONS),
        *each(linear_rules, _LAYER + "mlp.", "layers/mlp/", ("fc1", "fc2")),
        *norm_rules("post_layernorm", "post_layernorm"),
    ),
    ignored={r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ..."},
)

TABLE = _BARE.prefixed(source=PREFIX)
"""Names of every published file (``vision_model.encoder.layers.0...``); exports use these."""

_WHOLE = TABLE + Table((), {r"(?!vision_model\.).*": "text encoder and projections of CLIP"})


def table_for(keys: Iterable[str]) -> Table:
    """The table that fits a source: with ``vision_model.`` (and all of CLIP around it), or without."""
    return _WHOLE if any(key.startswith(PREFIX) for key in keys) else _BARE


def _describe(config: ClipVisionConfig) -> dict[str, Any]:
    more = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return {**more, **dataclasses.asdict(config)}


TOWER = Tower(
    ClipVisionConfig,
    {"vit_l14": VIT_L14, "vit_b32": VIT_B32, "vit_b16": VIT_B16},
    ClipVisionModel,
    lambda keys, _: table_for(keys),
    marks=("vision_model.embeddings.",),
    published=lambda values: values.get("vision_config", values),  # of CLIP whole
    describe=_describe,
    library="transformers",
    class_name="CLIPVisionModel",
    bare_prefix=PREFIX,
)
