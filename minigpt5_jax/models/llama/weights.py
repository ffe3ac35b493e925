"""LLaMA in Hugging Face layout, and the whole tables of MiniGPT-5 checkpoints (fidelity 7.2, 7.3, 7.6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minigpt5_jax.models.llama.model import VICUNA_7B, Llama, LlamaConfig
from minigpt5_jax.models.tower import Shapes, Tower, module_shapes
from minigpt5_jax.weights.table import COPY, LINEAR, Rule, Table
from minigpt5_jax.weights.view import Tensors

_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

TABLE = Table(
    (
        Rule(EMBED, "embed_tokens/embedding", COPY),
        Rule(HEAD, "lm_head/kernel", LINEAR),
        Rule("model.norm.weight", "norm/scale", COPY),
        *(
            Rule(f"model.layers.{{i}}.{part}.{name}.weight", f"layers/{part}/{name}/kernel", LINEAR)
            for part, names in _PROJECTIONS.items()
            for name in names
        ),
        *(Rule(f"model.layers.{{i}}.{name}.weight", f"layers/{name}/scale", COPY) for name in _NORMS),
    ),
    {
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from rope_theta",
        r"model\.rotary_emb\.inv_freq": "computed from rope_theta",
    },
)

VOKEN_TABLE = Table(
    (Rule(EMBED + ".new", "embed_tokens/voken", COPY), Rule(HEAD + ".new", "lm_head/voken", COPY))
)
"""New rows, cut off the whole tables."""


def join_tables(source: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The whole tables of words of a MiniGPT-5 state dict, of old rows and those under ``<key>.new``."""
    joined = dict(source)
    for key in (prefix + EMBED, prefix + HEAD):
        joined[key] = np.concatenate([joined[key], joined.pop(key + ".new")])
    return joined


def lora_table(target_modules: tuple[str, ...] = ("q_proj", "v_proj")) -> Table:
    """PEFT's names of the low-rank factors: A is [r, in], B is [out, r] there."""
    rules = []
    for name in target_modules:
        for factor, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            source = f"base_model.model.model.layers.{{i}}.self_attn.{name}.{factor}.default.weight"
            rules.append(Rule(source, f"layers/self_attn/{name}/{leaf}", LINEAR))
    return Table(tuple(rules))


SIZES = {5120: "13B", 6656: "33B", 8192: "65B or 70B", 3200: "3B"}
"""Hidden size -> the LLaMA that has it; the 7B model's is 4096."""


def _shapes(config: LlamaConfig) -> Shapes:
    """Without new rows: a pretrained file has none."""
    shapes = module_shapes(lambda rngs: Llama(config, num_new_tokens=1, rngs=rngs))
    return {path: shape for path, shape in shapes.items() if not path.endswith("/voken")}


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    rows = shape(EMBED)
    if rows[1:] and rows[1] in SIZES:
        return f"hidden size {rows[1]} is LLaMA-{SIZES[rows[1]]}; MiniGPT-5 stands on the 7B model"
    if rows and rows[0] == 32001:
        return "32001 rows: Vicuna v0 as its delta gives it, with a [PAD] row; `convert llm` takes it off"
    if any(".lora_" in key or key.startswith("base_model.") for key in source):
        return "these are LoRA factors, not a language model; merge them first, or give the base model"
    return ""


def _describe(config: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(config),
        "num_key_value_heads": config.key_value_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


TOWER = Tower(
    LlamaConfig,
    {"vicuna_7b": VICUNA_7B},
    table=lambda *_: TABLE,
    shapes_of=_shapes,
    marks=("model.layers.", "model.embed_tokens"),
    cause=_cause,
    describe=_describe,
)
