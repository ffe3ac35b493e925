"""Weight table of the UNet (diffusers ``UNet2DConditionModel``; SD 2.1 ``unet``), 686 tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from minigpt5_jax.models.tower import DIFFUSERS_FILE, Tower
from minigpt5_jax.models.unet.model import SD21_UNET, UNet2DConditionModel, UNetConfig
from minigpt5_jax.models.vae.weights import conv_rules, resnet_rules
from minigpt5_jax.weights.table import LINEAR, Rule, Table, each, linear_rules, norm_rules
from minigpt5_jax.weights.view import Tensors


def _attention_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *(Rule(f"{source}.{n}.weight", f"{target}/{n}/kernel", LINEAR) for n in ("to_q", "to_k", "to_v")),
        *linear_rules(f"{source}.to_out.0", f"{target}/to_out"),
    )


def _transformer_rules(source: str, target: str) -> tuple[Rule, ...]:
    block = (f"{source}.transformer_blocks.0.", f"{target}/transformer_blocks/0/")
    return (
        *norm_rules(f"{source}.norm", f"{target}/norm"),
        *each(linear_rules, f"{source}.", f"{target}/", ("proj_in", "proj_out")),
        *each(norm_rules, *block, ("norm1", "norm2", "norm3")),
        *each(_attention_rules, *block, ("attn1", "attn2")),
        *each(linear_rules, *block, ("ff.net.0.proj>ff/proj", "ff.net.2>ff/out")),
    )


def _level_rules(blocks: str, resample: str) -> tuple[Rule, ...]:
    source, target = f"{blocks}.{{i}}", f"{blocks}/{{i}}"
    return (
        *resnet_rules(f"{source}.resnets.{{j}}", f"{target}/resnets/{{j}}"),
        *_transformer_rules(f"{source}.attentions.{{j}}", f"{target}/attentions/{{j}}"),
        *conv_rules(f"{source}.{resample}.0.conv", f"{target}/{resample}/0/conv"),
    )


TABLE = Table(
    (
        *conv_rules("conv_in", "conv_in"),
        *each(linear_rules, "time_embedding.", "time_embedding/", ("linear_1", "linear_2")),
        *_level_rules("down_blocks", "downsamplers"),
        *resnet_rules("mid_block.resnets.{j}", "mid_block/resnets/{j}"),
        *_transformer_rules("mid_block.attentions.{j}", "mid_block/attentions/{j}"),
        *_level_rules("up_blocks", "upsamplers"),
        *norm_rules("conv_norm_out", "conv_norm_out"),
        *conv_rules("conv_out", "conv_out"),
    )
)


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    if shape("conv_in.weight")[1:2] == (9,):
        return "nine input channels: an inpainting model; take stable-diffusion-2-1-base"
    context = next((shape(k)[1] for k in source if k.endswith("attn2.to_k.weight")), 1024)
    if context in (768, 2048):
        which = "1.x" if context == 768 else "XL"
        return f"cross-attention of width {context}: Stable Diffusion {which}; take 2.1-base (1024)"
    return ""


TOWER = Tower(
    UNetConfig,
    {"sd21_base": SD21_UNET},
    UNet2DConditionModel,
    lambda *_: TABLE,
    marks=("down_blocks.", "up_blocks."),
    cause=_cause,
    describe=lambda sizes: {**dataclasses.asdict(sizes), "use_linear_projection": True},
    library="diffusers",
    class_name="UNet2DConditionModel",
    file=DIFFUSERS_FILE,
)
