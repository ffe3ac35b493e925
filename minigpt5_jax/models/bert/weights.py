"""Weight table of BERT (Hugging Face ``BertModel``; sentence-transformers stores the same names)."""

from __future__ import annotations

import dataclasses
from typing import Any

from minigpt5_jax.models.bert.model import MINILM_L6, Bert, BertConfig
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.table import Rule, Table, each, linear_rules, norm_rules

_LAYER = "encoder.layer.{i}."

TABLE = Table(
    (
        *(
            Rule(f"embeddings.{name}.weight", f"{name}/embedding")
            for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        ),
        *norm_rules("embeddings.LayerNorm", "layer_norm"),
        *each(linear_rules, _LAYER + "attention.self.", "layers/", ("query", "key", "value")),
        *linear_rules(_LAYER + "attention.output.dense", "layers/output"),
        *norm_rules(_LAYER + "attention.output.LayerNorm", "layers/attention_norm"),
        *linear_rules(_LAYER + "intermediate.dense", "layers/fc1"),
        *linear_rules(_LAYER + "output.dense", "layers/fc2"),
        *norm_rules(_LAYER + "output.LayerNorm", "layers/output_norm"),
    ),
    ignored={
        r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
        r"pooler\..*": "the pooler of BERT's pretraining; sentence embeddings are means of states",
    },
)


def _describe(config: BertConfig) -> dict[str, Any]:
    return {"architectures": ["BertModel"], "model_type": "bert", **dataclasses.asdict(config)}


TOWER = Tower(
    BertConfig,
    {"minilm_l6": MINILM_L6},
    Bert,
    lambda *_: TABLE,
    marks=("embeddings.word_embeddings.", "encoder.layer."),
    describe=_describe,
    library="transformers",
    class_name="BertModel",
)
