"""Weight tables of CLIP whole: Hugging Face's ``CLIPModel``, and the names of OpenAI and open_clip."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from minigpt5_jax.models.clip.model import CLIP_B16, CLIP_B32, CLIP_L14, Clip, ClipConfig
from minigpt5_jax.models.clip_text.weights import TABLE as TEXT
from minigpt5_jax.models.clip_vision.weights import TABLE as VISION
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.table import CONV, LINEAR, Rule, Table, each, linear_rules, norm_rules, split
from minigpt5_jax.weights.view import Tensors

HF_TABLE = (
    TEXT.prefixed(target="text/")
    + VISION.prefixed(target="vision/")
    + Table(
        (
            Rule("text_projection.weight", "text_projection/kernel", LINEAR),
            Rule("visual_projection.weight", "visual_projection/kernel", LINEAR),
            Rule("logit_scale", "logit_scale"),
        )
    )
)
"""Names of ``openai/clip-vit-large-patch14`` and its kin; exports use these."""


def _blocks(source: str, target: str) -> tuple[Rule, ...]:
    """Layers as OpenAI wrote them, queries, keys and values in one matrix."""
    parts = [f"{target}layers/self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")]
    block = source + "transformer.resblocks.{i}."
    return (
        *each(norm_rules, block, f"{target}layers/", ("ln_1>layer_norm1", "ln_2>layer_norm2")),
        Rule(block + "attn.in_proj_weight", tuple(f"{part}/kernel" for part in parts), split(3, LINEAR)),
        Rule(block + "attn.in_proj_bias", tuple(f"{part}/bias" for part in parts), split(3)),
        *linear_rules(block + "attn.out_proj", f"{target}layers/self_attn/out_proj"),
        *each(linear_rules, block + "mlp.", f"{target}layers/mlp/", ("c_fc>fc1", "c_proj>fc2")),
    )


OPENAI_TABLE = Table(
    (
        Rule("visual.class_embedding", "vision/class_embedding"),
        Rule("visual.conv1.weight", "vision/patch_embedding/kernel", CONV),
        Rule("visual.positional_embedding", "vision/position_embedding"),
        *each(norm_rules, "visual.", "vision/", ("ln_pre>pre_layernorm", "ln_post>post_layernorm")),
        *_blocks("visual.", "vision/"),
        Rule("visual.proj", "visual_projection/kernel"),
        Rule("token_embedding.weight", "text/token_embedding/embedding"),
        Rule("positional_embedding", "text/position_embedding/embedding"),
        *_blocks("", "text/"),
        *norm_rules("ln_final", "text/final_layer_norm"),
        Rule("text_projection", "text_projection/kernel"),
        Rule("logit_scale", "logit_scale"),
    ),
    ignored={
        "input_resolution|context_length|vocab_size": "a size that OpenAI's files store beside the tensors",
        "attn_mask": "a buffer with the causal mask",
    },
)
"""Names of OpenAI's files and of open_clip's (``open_clip_model.safetensors``)."""


def table_for(keys: Iterable[str]) -> Table:
    """The table that fits a source, by its names."""
    return OPENAI_TABLE if any(key.startswith("visual.") for key in keys) else HF_TABLE


def sizes_of(source: Tensors, hidden_act: str = "quick_gelu") -> ClipConfig:
    """The preset that fits a file without ``config.json``, by the shapes of its image encoder.

    Args:
      source: tensors in any of the three forms of names.
      hidden_act: of both towers, which no file says: ``quick_gelu`` in every CLIP of OpenAI, ``gelu`` in most
        that were trained with open_clip.

    Raises:
      WeightFileError: the file has no image encoder of CLIP, or one of another size.
    """
    for name in ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"):
        if name in source:
            width, _, patch, _ = source[name].shape
            break
    else:
        where = getattr(source, "path", None) or "the file"
        raise WeightFileError(
            f"{where} has no image encoder of CLIP; give the folder of openai/clip-vit-large-patch14, say"
        )
    for preset in TOWER.presets.values():
        vision = preset.vision_config
        if (vision.hidden_size, vision.patch_size) == (width, patch):
            text, vision = (
                dataclasses.replace(c, hidden_act=hidden_act) for c in (preset.text_config, vision)
            )
            return dataclasses.replace(preset, text_config=text, vision_config=vision)
    raise WeightFileError(
        f"CLIP of width {width} and patches of {patch} pixels is none of {', '.join(TOWER.presets)}; give a "
        "folder with config.json in Hugging Face's form, which says its sizes"
    )


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    if any(re.match(r"visual\.(layer1|trunk)\.", key) for key in source):
        return "the image encoder is a ResNet or a network of timm; only ViT is read"
    if any(key.startswith("text.") for key in source):
        return "a CustomTextCLIP of open_clip; only the plain form of CLIP is read"
    return ""


def _describe(config: ClipConfig) -> dict[str, Any]:
    return {"architectures": ["CLIPModel"], "model_type": "clip", **dataclasses.asdict(config)}


TOWER = Tower(
    ClipConfig,
    {"clip_l14": CLIP_L14, "clip_b32": CLIP_B32, "clip_b16": CLIP_B16},
    Clip,
    lambda keys, _: table_for(keys),
    marks=("text_projection", "visual_projection", "visual."),
    cause=_cause,
    describe=_describe,
    library="transformers",
    class_name="CLIPModel",
)
