"""Weight table of the autoencoder (diffusers ``AutoencoderKL``; SD 2.1 ``vae``), 248 tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from minigpt5_jax.models.tower import DIFFUSERS_FILE, Tower
from minigpt5_jax.models.vae.model import SD21_VAE, AutoencoderKL, VaeConfig
from minigpt5_jax.weights.table import CONV, SQUEEZED_LINEAR, Rule, Table, each, linear_rules, norm_rules
from minigpt5_jax.weights.view import Tensors, View


def conv_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """A torch ``Conv2d`` with bias <-> :class:`~minigpt5_jax.models.common.Conv`."""
    return Rule(f"{source}.weight", f"{target}/kernel", CONV), Rule(f"{source}.bias", f"{target}/bias")


def conv1x1_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """A 1x1 torch ``Conv2d`` with bias <-> :class:`~minigpt5_jax.models.common.Linear`."""
    return (
        Rule(f"{source}.weight", f"{target}/kernel", SQUEEZED_LINEAR),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


def resnet_rules(source: str, target: str) -> tuple[Rule, ...]:
    """``ResnetBlock2D``, with or without a time embedding and a shortcut projection."""
    return (
        *each(norm_rules, f"{source}.", f"{target}/", ("norm1", "norm2")),
        *each(conv_rules, f"{source}.", f"{target}/", ("conv1", "conv2")),
        *conv1x1_rules(f"{source}.conv_shortcut", f"{target}/conv_shortcut"),
        *linear_rules(f"{source}.time_emb_proj", f"{target}/time_emb_proj"),
    )


def _half(side: str, blocks: str, resample: str) -> tuple[Rule, ...]:
    attention = (f"{side}.mid_block.attentions.0.", f"{side}/mid_block/attentions/0/")
    return (
        *each(conv_rules, f"{side}.", f"{side}/", ("conv_in", "conv_out")),
        *resnet_rules(f"{side}.{blocks}.{{i}}.resnets.{{j}}", f"{side}/{blocks}/{{i}}/resnets/{{j}}"),
        *conv_rules(f"{side}.{blocks}.{{i}}.{resample}.0.conv", f"{side}/{blocks}/{{i}}/{resample}/0/conv"),
        *resnet_rules(f"{side}.mid_block.resnets.{{i}}", f"{side}/mid_block/resnets/{{i}}"),
        *each(norm_rules, *attention, ("group_norm",)),
        *each(linear_rules, *attention, ("to_q", "to_k", "to_v", "to_out.0>to_out")),
        *norm_rules(f"{side}.conv_norm_out", f"{side}/conv_norm_out"),
    )


TABLE = Table(
    (
        *_half("encoder", "down_blocks", "downsamplers"),
        *_half("decoder", "up_blocks", "upsamplers"),
        *each(conv1x1_rules, "", "", ("quant_conv", "post_quant_conv")),
    )
)
"""Names that diffusers writes today; sources with older names go through :func:`rename_legacy`."""

_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_KEY = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.weight|\.bias)")


def rename_legacy(source: Tensors) -> View:
    """The source with the old attention names (``query``, ``proj_attn``, ...) replaced by today's.

    Weights of the old names may be 1x1 convolutions, ``[c, c, 1, 1]``; they become ``[c, c]``.
    Keys that are up to date pass unchanged.
    """

    def reader(key: str) -> tuple[str, Callable[[], np.ndarray]]:
        found = _LEGACY_KEY.fullmatch(key)
        if found is None:
            return key, lambda: source[key]
        return found[1] + _LEGACY[found[2]] + found[3], lambda: _squeezed(source[key])

    return View(source, dict(map(reader, source)))


def _squeezed(value: np.ndarray) -> np.ndarray:
    return value[:, :, 0, 0] if value.ndim == 4 else value


def _describe(config: VaeConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        **dataclasses.asdict(config),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


TOWER = Tower(
    VaeConfig,
    {"sd21_base": SD21_VAE},
    AutoencoderKL,
    lambda *_: TABLE,
    lambda source, _: rename_legacy(source),
    marks=("encoder.down_blocks", "quant_conv"),
    describe=_describe,
    library="diffusers",
    class_name="AutoencoderKL",
    file=DIFFUSERS_FILE,
)
