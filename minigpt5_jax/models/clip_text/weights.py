"""Weight table of the CLIP text encoder (Hugging Face ``CLIPTextModel``; SD 2.1 ``text_encoder``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from minigpt5_jax.models.clip_text.model import SD21_TEXT, ClipTextConfig, ClipTextModel
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.table import Rule, Table, each, linear_rules, norm_rules

PREFIX = "text_model."

_LAYER = "encoder.layers.{i}."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

_BARE = Table(
    (
        Rule("embeddings.token_embedding.weight", "token_embedding/embedding"),
        Rule("embeddings.position_embedding.weight", "position_embedding/embedding"),
        *each(norm_rules, _LAYER, "layers/", ("layer_norm1", "layer_norm2")),
        *each(linear_rules, _LAYER + "self_attn.", "layers/self_attn/", _PROJECTIONS),
        *each(linear_rules, _LAYER + "mlp.", "layers/mlp/", ("fc1", "fc2")),
        *norm_rules("final_layer_norm", "final_layer_norm"),
    ),
    ignored={r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ..."},
)

TABLE = _BARE.prefixed(source=PREFIX)
"""Names of every published file (``text_model.encoder.layers.0...``); exports use these."""


def table_for(keys: Iterable[str]) -> Table:
    """The table that fits a source: transformers 5 writes the same names without ``text_model.``."""
    return TABLE if any(key.startswith(PREFIX) for key in keys) else _BARE


def _describe(config: ClipTextConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        **dataclasses.asdict(config),
    }


TOWER = Tower(
    ClipTextConfig,
    {"sd21_base": SD21_TEXT},
    ClipTextModel,
    lambda keys, _: table_for(keys),
    marks=("text_model.",),
    describe=_describe,
    library="transformers",
    class_name="CLIPTextModel",
    bare_prefix=PREFIX,
)
