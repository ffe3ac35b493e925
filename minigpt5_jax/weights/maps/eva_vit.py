"""Weight tables of the EVA ViT: LAVIS ``eva_vit_g.pth`` and Hugging Face's BLIP-2 ``vision_model``."""

from __future__ import annotations

import numpy as np

from minigpt5_jax.models.eva_vit import EvaVitConfig
from minigpt5_jax.weights.table import (
    CONV,
    LINEAR,
    Op,
    Rule,
    Table,
    WeightTableError,
    linear_rules,
    norm_rules,
    split,
)

_QKV_KERNELS = tuple(f"blocks/attn/{name}/kernel" for name in ("q_proj", "k_proj", "v_proj"))


def _q_and_v(bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    query, key, value = np.split(bias, 3)
    if key.any():
        raise WeightTableError("the key part of a fused qkv.bias is not zero; EVA has no key bias")
    return query, value


_FUSED_BIAS = Op("qkv_bias", _q_and_v, lambda qv: np.concatenate([qv[0], np.zeros_like(qv[0]), qv[1]]))


def table(config: EvaVitConfig) -> Table:
    """Names of ``eva_vit_g.pth`` (``visual_encoder.`` before each inside BLIP-2 style checkpoints).

    Blocks at or beyond ``num_hidden_layers`` are left out, as BLIP-2 does with EVA's 40th.
    """
    block = "blocks.{i}."
    depth = config.num_hidden_layers
    built = "|".join(map(str, range(depth)))
    return Table(
        (
            Rule("cls_token", "cls_token"),
            Rule("pos_embed", "pos_embed"),
            Rule("patch_embed.proj.weight", "patch_embed/kernel", CONV),
            Rule("patch_embed.proj.bias", "patch_embed/bias"),
            *norm_rules(block + "norm1", "blocks/norm1"),
            *norm_rules(block + "norm2", "blocks/norm2"),
            Rule(block + "attn.qkv.weight", _QKV_KERNELS, split(3, LINEAR)),
            Rule(block + "attn.q_bias", "blocks/attn/q_proj/bias"),
            Rule(block + "attn.v_bias", "blocks/attn/v_proj/bias"),
            *linear_rules(block + "attn.proj", "blocks/attn/proj"),
            *linear_rules(block + "mlp.fc1", "blocks/mlp/fc1"),
            *linear_rules(block + "mlp.fc2", "blocks/mlp/fc2"),
        ),
        ignored={
            rf"blocks\.(?!({built})\.)\d+\..*": f"only the first {depth} blocks are built",
            r"(norm|fc_norm)\.(weight|bias)": "EVA's closing norm; BLIP-2 has ln_vision instead",
            r"head\.(weight|bias)": "EVA's classification head",
        },
    )


_HF_LAYER = "encoder.layers.{i}."

HF_TABLE = Table(
    (
        Rule("embeddings.class_embedding", "cls_token"),
        Rule("embeddings.position_embedding", "pos_embed"),
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", CONV),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
        *norm_rules(_HF_LAYER + "layer_norm1", "blocks/norm1"),
        *norm_rules(_HF_LAYER + "layer_norm2", "blocks/norm2"),
        Rule(_HF_LAYER + "self_attn.qkv.weight", _QKV_KERNELS, split(3, LINEAR)),
        Rule(_HF_LAYER + "self_attn.qkv.bias", ("blocks/attn/q_proj/bias", "blocks/attn/v_proj/bias"),
             _FUSED_BIAS),
        *linear_rules(_HF_LAYER + "self_attn.projection", "blocks/attn/proj"),
        *linear_rules(_HF_LAYER + "mlp.fc1", "blocks/mlp/fc1"),
        *linear_rules(_HF_LAYER + "mlp.fc2", "blocks/mlp/fc2"),
    ),
    ignored={r"post_layernorm\.(weight|bias)": "this is ln_vision, which the backbone holds"},
)
"""Names of Hugging Face's ``Blip2VisionModel`` (``vision_model.`` before each in ``Blip2Model``)."""
