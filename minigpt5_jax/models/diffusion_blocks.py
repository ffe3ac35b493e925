"""Convolutional blocks that the UNet and the autoencoder share (fidelity 1.8, 1.9).

Everything is NHWC.  The residual stream is in the compute ``dtype``; group-norm statistics and
softmax are fp32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.common import Conv, GroupNorm, Linear, conv2d
from minigpt5_jax.models.quantized import product


def run(block: nnx.Module, *args: jax.Array, remat: bool = False) -> jax.Array:
    """``block(*args)``; with ``remat`` its activations are recomputed in the backward pass."""
    if not remat:
        return block(*args)
    graphdef, state = nnx.split(block)
    return jax.checkpoint(lambda state, *args: nnx.merge(graphdef, state)(*args))(state, *args)


class ResnetBlock2D(nnx.Module):
    """Norm-SiLU-conv3x3 twice around an optional time bias, plus the (projected) input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_num_groups: int,
        eps: float,
        temb_channels: int | None = None,
        **kwargs,
    ):
        axes = ("conv_in", "conv_out")
        self.norm1 = GroupNorm(norm_num_groups, in_channels, eps=eps, **kwargs)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1, **kwargs)
        self.time_emb_proj = (
            None if temb_channels is None else Linear(temb_channels, out_channels, axes=axes, **kwargs)
        )
        self.norm2 = GroupNorm(norm_num_groups, out_channels, eps=eps, **kwargs)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1, **kwargs)
        # A 1x1 convolution in the source; as a dense layer it is one matrix product everywhere.
        self.conv_shortcut = (
            None if in_channels == out_channels else Linear(in_channels, out_channels, axes=axes, **kwargs)
        )

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """``x [m, h, w, in]``; ``temb [m, temb_channels]``, SiLU already applied."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb)[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """3x3 convolution of stride 2; ``padding`` as in :class:`~minigpt5_jax.models.common.Conv`."""

    def __init__(self, channels: int, *, padding=1, **kwargs):
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution, without the products that doubling repeats.

    Of each 3x3 window over doubled pixels, two rows and two columns are of the same pixel: with their taps
    added up, the four places inside a pixel are four 2x2 convolutions of the small map, 4/9 of the products.
    """

    def __init__(self, channels: int, **kwargs):
        self.conv = Conv(channels, channels, 3, padding=1, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(_upsampled, x.astype(self.conv.dtype), self.conv.kernel[...])
        return y if self.conv.bias is None else y + self.conv.bias[...].astype(self.conv.dtype)


def _upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x [m h w in]``, doubled, and convolved with ``kernel [3 3 in out]``: [m 2h 2w out]."""
    m, h, w, _ = x.shape
    rows = []
    for i, upper in enumerate(_halves(kernel.astype(jnp.float32), 0)):
        places = [
            conv2d(x, part.astype(x.dtype), 1, ((1 - i, i), (1 - j, j)))
            for j, part in enumerate(_halves(upper, 1))
        ]
        rows.append(jnp.stack(places, axis=3))
    return jnp.stack(rows, axis=2).reshape(m, 2 * h, 2 * w, -1)


def _halves(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Three taps over doubled pixels as two over pixels, for the first and the second half of a pixel."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)
