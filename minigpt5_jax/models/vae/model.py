"""AutoencoderKL of Stable Diffusion (fidelity 1.9): images to latent moments and back.

Module names are those of diffusers.  Scaling by ``scaling_factor`` belongs to the caller: the
moments are those of the unscaled posterior, and ``decode`` takes unscaled latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import Conv, GroupNorm, Linear, PublishedSizes
from minigpt5_jax.models.diffusion_blocks import Downsample2D, ResnetBlock2D, Upsample2D, run

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)

_IMPLEMENTED = {
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None,),
}


@dataclasses.dataclass(frozen=True)
class VaeConfig(PublishedSizes):
    """Shape of the autoencoder, in diffusers' field names and with diffusers' defaults.

    Attributes:
      block_out_channels: width of each level, full resolution first.
      layers_per_block: resnets per encoder level; the decoder has one more.
      scaling_factor: what callers multiply latents by; the tower itself never does.
    """

    tower = "VAE"
    implemented = _IMPLEMENTED

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    act_fn: str = "silu"
    sample_size: int = 32

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> VaeConfig:
        """:meth:`PublishedSizes.from_hf` of a file whose blocks are those of this tower."""
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for field, kind in kinds.items():
            if set(config.get(field, ())) - {kind}:
                raise ValueError(f"VAE {field}={config[field]!r} is not implemented (only {kind})")
        return super().from_hf(config, **overrides)


SD21_VAE = VaeConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=768)
"""The autoencoder of Stable Diffusion 2.1-base: 83,653,863 parameters."""


class SpatialAttention(AttentionModule):
    """Self-attention over all pixels: one head of the full width, biases on all projections."""

    def __init__(self, channels: int, norm_num_groups: int, **kwargs):
        inner, outer = ("conv_in", ("heads", 1)), (("heads", 1), "conv_out")
        self.group_norm = GroupNorm(norm_num_groups, channels, eps=NORM_EPS, **kwargs)
        self.to_q = Linear(channels, channels, axes=inner, **kwargs)
        self.to_k = Linear(channels, channels, axes=inner, **kwargs)
        self.to_v = Linear(channels, channels, axes=inner, **kwargs)
        self.to_out = Linear(channels, channels, axes=outer, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        m, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(m, h * w, c)
        attended = self.attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), 1)
        return x + self.to_out(attended).reshape(x.shape)


class Level(nnx.Module):
    """Resnets at one resolution and, but for the last level, the step to the next one."""

    def __init__(
        self, config: VaeConfig, channels: tuple[int, int], layers: int, *, down=False, up=False, **kwargs
    ):
        first, width = channels
        self.resnets = nnx.List(
            ResnetBlock2D(
                width if j else first, width, norm_num_groups=config.norm_num_groups, eps=NORM_EPS, **kwargs
            )
            for j in range(layers)
        )
        # The encoder pads by one below and to the right only.
        self.downsamplers = nnx.List(
            Downsample2D(width, padding=((0, 1), (0, 1)), **kwargs) for _ in range(down)
        )
        self.upsamplers = nnx.List(Upsample2D(width, **kwargs) for _ in range(up))

    def __call__(self, x: jax.Array, remat: bool) -> jax.Array:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = run(block, x, remat=remat)
        return x


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: VaeConfig, **kwargs):
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List(
            ResnetBlock2D(width, width, norm_num_groups=groups, eps=NORM_EPS, **kwargs) for _ in range(2)
        )
        self.attentions = nnx.List([SpatialAttention(width, groups, **kwargs)])

    def __call__(self, x: jax.Array, remat: bool) -> jax.Array:
        for block in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = run(block, x, remat=remat)
        return x


class Encoder(nnx.Module):
    """``[m, H, W, in_channels] -> [m, h, w, 2 * latent_channels]``."""

    def __init__(self, config: VaeConfig, *, remat: bool, **kwargs):
        self.remat = remat
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, **kwargs)
        pairs = zip((widths[0], *widths), widths)
        self.down_blocks = nnx.List(
            Level(config, pair, config.layers_per_block, down=i < len(widths) - 1, **kwargs)
            for i, pair in enumerate(pairs)
        )
        self.mid_block = MidBlock(config, **kwargs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS, **kwargs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, padding=1, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, self.remat)
        x = self.mid_block(x, self.remat)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """``[m, h, w, latent_channels] -> [m, H, W, out_channels]``."""

    def __init__(self, config: VaeConfig, *, remat: bool, **kwargs):
        self.remat = remat
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1, **kwargs)
        self.mid_block = MidBlock(config, **kwargs)
        pairs = zip((widths[0], *widths), widths)
        self.up_blocks = nnx.List(
            Level(config, pair, config.layers_per_block + 1, up=i < len(widths) - 1, **kwargs)
            for i, pair in enumerate(pairs)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS, **kwargs)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, padding=1, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x), self.remat)
        for block in self.up_blocks:
            x = block(x, self.remat)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder; source names in ``weights.py``.

    ``dtype`` is that of convolutions and the residual stream; moments and pixels come out fp32.
    ``remat`` recomputes each resnet and the attention in the backward pass.
    """

    def __init__(self, config: VaeConfig, *, remat: bool = False, **kwargs: Any):
        latents = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, remat=remat, **kwargs)
        self.decoder = Decoder(config, remat=remat, **kwargs)
        self.quant_conv = Linear(2 * latents, 2 * latents, axes=(None, None), **kwargs)
        self.post_quant_conv = Linear(latents, latents, axes=(None, None), **kwargs)

    def encode(self, pixels: Float[Array, "m H W 3"]) -> Float[Array, "m h w c2"]:
        """Posterior moments ``mean | logvar`` on the last axis, fp32, not scaled.

        Args:
          pixels: values in [-1, 1].

        Raises:
          ValueError: sides that do not divide by ``config.downsampling``.
        """
        (height, width), factor = pixels.shape[1:3], self.config.downsampling
        if height % factor or width % factor:
            raise ValueError(f"images of {height} x {width} do not divide by the VAE's factor {factor}")
        mean, logvar = jnp.split(self.quant_conv(self.encoder(pixels)).astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=-1)

    def decode(self, latents: Float[Array, "m h w c"]) -> Float[Array, "m H W 3"]:
        """Pixels, about [-1, 1] but not clipped, fp32, of latents already divided by ``scaling_factor``."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


def sample_posterior(
    moments: Float[Array, "m h w c2"], noise: Float[Array, "m h w c"]
) -> Float[Array, "m h w c"]:
    """``mean + exp(logvar / 2) * noise`` in fp32 from what ``encode`` returns (not scaled)."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * logvar) * noise
