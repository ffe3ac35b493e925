"""Weight tables of the EVA ViT: LAVIS ``eva_vit_g.pth`` and Hugging Face's BLIP-2 ``vision_model``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from minigpt5_jax.models.eva_vit.model import EVA_VIT_G, EvaVit, EvaVitConfig
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.table import (
    CONV,
    LINEAR,
    Op,
    Rule,
    Table,
    WeightTableError,
    each,
    linear_rules,
    norm_rules,
    split,
)
from minigpt5_jax.weights.view import Tensors, View, replaced

_QKV_KERNELS = tuple(f"blocks/attn/{name}/kernel" for name in ("q_proj", "k_proj", "v_proj"))
_LINEARS = ("attn.proj>attn/proj", "mlp.fc1>mlp/fc1", "mlp.fc2>mlp/fc2")
_HF_LINEARS = ("self_attn.projection>attn/proj", *_LINEARS[1:])


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
            *each(norm_rules, block, "blocks/", ("norm1", "norm2")),
            Rule(block + "attn.qkv.weight", _QKV_KERNELS, split(3, LINEAR)),
            Rule(block + "attn.q_bias", "blocks/attn/q_proj/bias"),
            Rule(block + "attn.v_bias", "blocks/attn/v_proj/bias"),
            *each(linear_rules, block, "blocks/", _LINEARS),
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
        *each(norm_rules, _HF_LAYER + "layer_", "blocks/", ("norm1", "norm2")),
        Rule(_HF_LAYER + "self_attn.qkv.weight", _QKV_KERNELS, split(3, LINEAR)),
        Rule(
            _HF_LAYER + "self_attn.qkv.bias",
            ("blocks/attn/q_proj/bias", "blocks/attn/v_proj/bias"),
            _FUSED_BIAS,
        ),
        *each(linear_rules, _HF_LAYER, "blocks/", _HF_LINEARS),
    ),
    ignored={r"post_layernorm\.(weight|bias)": "this is ln_vision, which the backbone holds"},
)
"""Names of Hugging Face's ``Blip2VisionModel`` (``vision_model.`` before each in ``Blip2Model``)."""

_IN_BLIP2 = HF_TABLE.prefixed("vision_model.") + Table(
    (), {r"(?!vision_model\.).*": "Q-Former and language model of BLIP-2; this is the vision tower"}
)
_IN_LAVIS = r"(?!visual_encoder\.).*"
_POSITIONS = ("pos_embed", "visual_encoder.pos_embed", "vision_model.embeddings.position_embedding")


def table_for(keys: Iterable[str], config: EvaVitConfig) -> Table:
    """The table that fits a source: ``eva_vit_g.pth``, or BLIP-2 whole, in LAVIS' or Hugging Face's names."""
    keys = set(keys)
    if any(key.startswith("vision_model.") for key in keys):
        return _IN_BLIP2
    if any(key.startswith("visual_encoder.") for key in keys):
        other = Table((), {_IN_LAVIS: "Q-Former and language model of BLIP-2; this is the vision tower"})
        return table(config).prefixed("visual_encoder.") + other
    return table(config)


def fit_positions(source: Tensors, config: EvaVitConfig) -> View:
    """``source`` with its position embedding resized to the tower's grid where it has another one."""
    grid = config.image_size // config.patch_size
    return replaced(source, {name: lambda x: resize_positions(x, grid) for name in _POSITIONS})


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Bicubic resize of ``[1, 1 + n*n, d]`` to ``[1, 1 + grid*grid, d]``; the class token's stays.

    As the original does by torch's ``interpolate(mode="bicubic", align_corners=False)`` (fidelity 1.2):
    cubic convolution with a = -0.75, no antialiasing, edges repeated.

    Raises:
      WeightTableError: the old grid is not square.
    """
    count = positions.shape[1] - 1
    old = round(count**0.5)
    if old == grid and old * old == count:
        return positions
    if old * old != count or count < 1:
        raise WeightTableError(f"pos_embed has {count} patches: no square grid, it cannot be resized")
    weights = _cubic(old, grid)
    square = positions[0, 1:].astype(np.float32).reshape(old, old, -1)
    fitted = np.einsum("ih,jw,hwd->ijd", weights, weights, square, optimize=True).reshape(1, grid * grid, -1)
    return np.concatenate([positions[:, :1], fitted.astype(positions.dtype)], axis=1)


def _cubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Weights [new, old] of a cubic convolution at pixel centres."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        x = np.abs(centre - (first + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    if shape("pos_embed")[2:] == (1024,):
        return "width 1024 is EVA or CLIP ViT-L; MiniGPT-4 uses ViT-g (1408)"
    return ""


TOWER = Tower(
    EvaVitConfig,
    {"eva_vit_g": EVA_VIT_G},
    EvaVit,
    table_for,
    fit_positions,
    marks=("blocks.", "visual_encoder.", "vision_model."),
    cause=_cause,
    published=lambda values: values.get("vision_config", values),  # of BLIP-2 whole
)
