"""Stable Diffusion's UNet, conditioned on a sequence of vectors (fidelity 1.8).

Module names and hyper-parameters are those of diffusers' ``UNet2DConditionModel``.  Activations are
NHWC; the time embedding's sinusoid, group-norm statistics and softmax are fp32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import Conv, GroupNorm, LayerNorm, Linear, PublishedSizes, gelu
from minigpt5_jax.models.diffusion_blocks import Downsample2D, ResnetBlock2D, Upsample2D, run

TRANSFORMER_NORM_EPS = 1e-6  # of Transformer2DModel's group norm; resnets use norm_eps
LAYER_NORM_EPS = 1e-5
MAX_PERIOD = 10_000

_DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")

_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "use_linear_projection": (True,),
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "transformer_layers_per_block": (1,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "attention_type": ("default",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
} | dict.fromkeys(
    """
    center_input_sample only_cross_attention mid_block_only_cross_attention dual_cross_attention
    cross_attention_norm dropout num_attention_heads class_embed_type num_class_embeds class_embeddings_concat
    addition_embed_type encoder_hid_dim encoder_hid_dim_type reverse_transformer_layers_per_block
    resnet_skip_time_act time_embedding_dim time_embedding_act_fn timestep_post_act time_cond_proj_dim
    """.split(),
    (None, False, 0),
)


@dataclasses.dataclass(frozen=True)
class UNetConfig(PublishedSizes):
    """Shape of the UNet, in diffusers' field names and with diffusers' defaults.

    Attributes:
      attention_head_dim: number of heads, per level or for all levels (diffusers' misnomer).

    Raises:
      ValueError: lists of different lengths, unknown block types, or heads that do not divide.
    """

    tower = "UNet"
    implemented = _IMPLEMENTED

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*_DOWN_TYPES[:1] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *_UP_TYPES[:1] * 3)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for field, known in (("down_block_types", _DOWN_TYPES), ("up_block_types", _UP_TYPES)):
            types = getattr(self, field)
            if set(types) - set(known):
                raise ValueError(f"UNet {field}={types!r}: only {known} are implemented")
            if len(types) != levels:
                raise ValueError(f"UNet {field} has {len(types)} entries, block_out_channels {levels}")
        if len(self.heads) != levels:
            raise ValueError(f"UNet attention_head_dim has {len(self.heads)} entries, levels: {levels}")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"UNet attention_head_dim: {width} channels do not divide by {heads} heads")
        if self.block_out_channels[0] % 2:
            raise ValueError(f"UNet block_out_channels[0]={self.block_out_channels[0]} is odd")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level, highest resolution first."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> UNetConfig:
        """:meth:`PublishedSizes.from_hf`; what newer UNets have a list of must be one number."""
        for field in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if not isinstance(config.get(field, 0), int):
                raise ValueError(f"UNet {field}={config[field]!r} is not implemented (only one number)")
        return super().from_hf({"use_linear_projection": False, **config}, **overrides)


SD21_UNET = UNetConfig(sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024)
"""The UNet of ``stabilityai/stable-diffusion-2-1-base``: 865,910,724 parameters."""


def timestep_embedding(
    timesteps: Int[Array, " m"], width: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "m d"]:
    """Sinusoids of ``width // 2`` geometric frequencies, fp32: cosines first if ``flip_sin_to_cos``."""
    half = width // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear on the sinusoid."""

    def __init__(self, in_channels: int, width: int, **kwargs):
        self.linear_1 = Linear(in_channels, width, axes=("conv_in", "conv_out"), **kwargs)
        self.linear_2 = Linear(width, width, axes=("conv_in", "conv_out"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Attention(AttentionModule):
    """Multi-head attention from pixels to ``context_dim`` wide vectors; only the output has a bias."""

    def __init__(self, width: int, heads: int, context_dim: int, **kwargs):
        self.heads, axis = heads, ("heads", heads)
        self.to_q = Linear(width, width, axes=("embed", axis), bias=False, **kwargs)
        self.to_k = Linear(context_dim, width, axes=("embed", axis), bias=False, **kwargs)
        self.to_v = Linear(context_dim, width, axes=("embed", axis), bias=False, **kwargs)
        self.to_out = Linear(width, width, axes=(axis, "embed"), **kwargs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class FeedForward(nnx.Module):
    """GEGLU: ``hidden * gelu(gate)`` of one fused projection, then back to ``width``."""

    def __init__(self, width: int, **kwargs):
        self.proj = Linear(width, 8 * width, axes=("embed", "mlp"), **kwargs)
        self.out = Linear(4 * width, width, axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(hidden * gelu(gate))


class BasicTransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, context_dim: int, **kwargs):
        self.norm1 = LayerNorm(width, eps=LAYER_NORM_EPS, **kwargs)
        self.attn1 = Attention(width, heads, width, **kwargs)
        self.norm2 = LayerNorm(width, eps=LAYER_NORM_EPS, **kwargs)
        self.attn2 = Attention(width, heads, context_dim, **kwargs)
        self.norm3 = LayerNorm(width, eps=LAYER_NORM_EPS, **kwargs)
        self.ff = FeedForward(width, **kwargs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer block over the pixels of ``[m, h, w, width]``, around a residual."""

    def __init__(self, config: UNetConfig, level: int, **kwargs):
        width = config.block_out_channels[level]
        self.norm = GroupNorm(config.norm_num_groups, width, eps=TRANSFORMER_NORM_EPS, **kwargs)
        self.proj_in = Linear(width, width, axes=("conv_in", "embed"), **kwargs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(width, config.heads[level], config.cross_attention_dim, **kwargs)]
        )
        self.proj_out = Linear(width, width, axes=("embed", "conv_out"), **kwargs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        m, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x).reshape(m, h * w, c))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).reshape(x.shape)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, **kwargs) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        norm_num_groups=config.norm_num_groups,
        eps=config.norm_eps,
        temb_channels=4 * config.block_out_channels[0],
        **kwargs,
    )


class Level(nnx.Module):
    """Resnets of one resolution, each followed by a transformer if the level attends.

    A down level hands every activation to the skip stack; an up level takes one back before each
    resnet.  Then comes the step to the next resolution, except at the last level of either side.

    Args:
      inputs: channels that each resnet reads.
      attends, down, up: whether the level has transformers, and which way it leads on.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        inputs: list[int],
        *,
        attends: bool,
        down: bool = False,
        up: bool = False,
        **kwargs,
    ):
        width = config.block_out_channels[level]
        self.resnets = nnx.List(_resnet(config, channels, width, **kwargs) for channels in inputs)
        self.attentions = nnx.List(
            Transformer2DModel(config, level, **kwargs) for _ in range(len(inputs) * attends)
        )
        self.downsamplers = nnx.List(Downsample2D(width, **kwargs) for _ in range(down))
        self.upsamplers = nnx.List(Upsample2D(width, **kwargs) for _ in range(up))

    def layer(self, j: int, x: jax.Array, temb: jax.Array, context: jax.Array, remat: bool) -> jax.Array:
        """Resnet ``j`` and its transformer."""
        x = run(self.resnets[j], x, temb, remat=remat)
        return run(self.attentions[j], x, context, remat=remat) if self.attentions else x


class UNetMidBlock2DCrossAttn(nnx.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig, **kwargs):
        width = config.block_out_channels[-1]
        self.resnets = nnx.List(_resnet(config, width, width, **kwargs) for _ in range(2))
        self.attentions = nnx.List([Transformer2DModel(config, -1, **kwargs)])

    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array, remat: bool) -> jax.Array:
        x = run(self.resnets[0], x, temb, remat=remat)
        x = run(self.attentions[0], x, context, remat=remat)
        return run(self.resnets[1], x, temb, remat=remat)


class UNet2DConditionModel(nnx.Module):
    """The UNet; source names in ``weights.py``.

    ``dtype`` is that of matmuls, convolutions and the residual stream; the result is fp32.
    ``remat`` recomputes each resnet and each transformer in the backward pass.
    """

    def __init__(self, config: UNetConfig, *, remat: bool = False, **kwargs: Any):
        widths, layers = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.config, self.remat = config, remat
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, **kwargs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **kwargs)

        x, skips = widths[0], [widths[0]]  # channels of the running activation and of the skip stack
        self.down_blocks = nnx.List()
        for level, kind in enumerate(config.down_block_types):
            inputs = [x] + [widths[level]] * (layers - 1)
            down = level < last
            attends = kind == "CrossAttnDownBlock2D"
            self.down_blocks.append(Level(config, level, inputs, attends=attends, down=down, **kwargs))
            x = widths[level]
            skips += [x] * (layers + down)
        self.mid_block = UNetMidBlock2DCrossAttn(config, **kwargs)
        self.up_blocks = nnx.List()
        for level, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            inputs = [(widths[level] if j else x) + skips.pop() for j in range(layers + 1)]
            attends = kind == "CrossAttnUpBlock2D"
            self.up_blocks.append(Level(config, level, inputs, attends=attends, up=level > 0, **kwargs))
            x = widths[level]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps, **kwargs)
        self.conv_out = Conv(widths[0], config.out_channels, 3, padding=1, **kwargs)

    def __call__(
        self,
        latents: Float[Array, "m h w c"],
        timesteps: Int[Array, " m"],
        context: Float[Array, "m s d"],
    ) -> Float[Array, "m h w out"]:
        """Prediction for noisy ``latents`` (epsilon, for SD 2.1-base), fp32.

        Args:
          latents: noisy latents, scaled.
          timesteps: 0 to 999, one per item.
          context: condition, ``cross_attention_dim`` wide; every position is attended to.

        Raises:
          ValueError: sides that do not divide by the UNet's downsampling.
        """
        (height, width), factor = latents.shape[1:3], 2 ** (len(self.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(f"latents of {height} x {width} do not divide by the UNet's factor {factor}")
        context = context.astype(self.conv_in.dtype)
        temb = self._time_embedding(timesteps)
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                x = block.layer(j, x, temb, context, self.remat)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        x = self.mid_block(x, temb, context, self.remat)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block.layer(j, x, temb, context, self.remat)
            for upsample in block.upsamplers:
                x = upsample(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def _time_embedding(self, timesteps: jax.Array) -> jax.Array:
        """``SiLU(time embedding) [m, 4 * block_out_channels[0]]``, what every resnet projects."""
        config = self.config
        waves = timestep_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return jax.nn.silu(self.time_embedding(waves))
