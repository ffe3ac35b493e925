"""Inception v3 as FID uses it: the 2015 TensorFlow network, in the form of pytorch-fid and torch-fidelity.

It differs from torchvision's: average pools do not count their padding, the last block takes a maximum pool,
there are 1008 classes, and no auxiliary head (``docs/evaluation.md``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minigpt5_jax.models.common import Linear, PublishedSizes, lecun_normal, ones, param, zeros

EPS = 1e-3
"""Of every batch normalisation."""


@dataclasses.dataclass(frozen=True)
class InceptionConfig(PublishedSizes):
    """The one size that there is: the number of classes."""

    num_classes: int = 1008


FID_INCEPTION = InceptionConfig()
"""The network of FID, IS and KID: 23,850,960 parameters and 34,432 running statistics."""


class InceptionFeatures(NamedTuple):
    """Where the network is tapped; the first three are spatial means.

    Attributes:
      pool1, pool2: after the first and second maximum pool, 64 and 192 channels.
      mixed6: after the last block at 17 x 17, 768 channels.
      pool3: the features of FID and KID, 2048.
      logits: without the bias of the classifier, as the Inception Score takes them.
    """

    pool1: Float[Array, "n 64"]
    pool2: Float[Array, "n 192"]
    mixed6: Float[Array, "n 768"]
    pool3: Float[Array, "n 2048"]
    logits: Float[Array, "n classes"]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any = 1, *, stride: int = 1, rngs, pad: Any = 0):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        top, left = (pad, pad) if isinstance(pad, int) else pad
        self.stride, self.padding = stride, ((top, top), (left, left))
        shape, axes = (height, width, inputs, outputs), (None, None, "conv_in", "conv_out")
        self.kernel = param(rngs, lecun_normal, shape, axes)
        self.scale, self.var = (param(rngs, ones, (outputs,), ("conv_out",)) for _ in range(2))
        self.bias, self.mean = (param(rngs, zeros, (outputs,), ("conv_out",)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPS)
        return jax.nn.relu((y - self.mean[...]) * factor + self.bias[...])


def _pool(x: jax.Array, start: float, reduce: Any, stride: int, pad: int) -> jax.Array:
    padding = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return jax.lax.reduce_window(x, start, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def max_pool(x: Float[Array, "n h w c"], stride: int = 2, pad: int = 0) -> Float[Array, "n h2 w2 c"]:
    """Maxima of 3 x 3 pixels."""
    return _pool(x, -jnp.inf, jax.lax.max, stride, pad)


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Means of 3 x 3 pixels at stride 1, over those inside the image only."""
    counts = _pool(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add, 1, 1)
    return _pool(x, 0.0, jax.lax.add, 1, 1) / counts


def _through(x: jax.Array, *layers: Any) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _joined(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class MixedA(nnx.Module):
    """Block at 35 x 35."""

    def __init__(self, inputs: int, pool: int, *, rngs: nnx.Rngs):
        self.branch1x1 = ConvNorm(inputs, 64, rngs=rngs)
        self.branch5x5_1 = ConvNorm(inputs, 48, rngs=rngs)
        self.branch5x5_2 = ConvNorm(48, 64, 5, pad=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, pad=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, pad=1, rngs=rngs)
        self.branch_pool = ConvNorm(inputs, pool, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        five = _through(x, self.branch5x5_1, self.branch5x5_2)
        double = _through(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return _joined(self.branch1x1(x), five, double, self.branch_pool(average_pool(x)))


class MixedB(nnx.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, pad=1, rngs=rngs)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = _through(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return _joined(self.branch3x3(x), double, max_pool(x))


class MixedC(nnx.Module):
    """Block at 17 x 17, with ``inner`` channels in its 7 x 7 branches."""

    def __init__(self, inputs: int, inner: int, *, rngs: nnx.Rngs):
        row, column = dict(kernel=(1, 7), pad=(0, 3), rngs=rngs), dict(kernel=(7, 1), pad=(3, 0), rngs=rngs)
        self.branch1x1 = ConvNorm(inputs, 192, rngs=rngs)
        self.branch7x7_1 = ConvNorm(inputs, inner, rngs=rngs)
        self.branch7x7_2 = ConvNorm(inner, inner, **row)
        self.branch7x7_3 = ConvNorm(inner, 192, **column)
        self.branch7x7dbl_1 = ConvNorm(inputs, inner, rngs=rngs)
        self.branch7x7dbl_2 = ConvNorm(inner, inner, **column)
        self.branch7x7dbl_3 = ConvNorm(inner, inner, **row)
        self.branch7x7dbl_4 = ConvNorm(inner, inner, **column)
        self.branch7x7dbl_5 = ConvNorm(inner, 192, **row)
        self.branch_pool = ConvNorm(inputs, 192, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = _through(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _through(x, *(getattr(self, f"branch7x7dbl_{i}") for i in range(1, 6)))
        return _joined(self.branch1x1(x), seven, double, self.branch_pool(average_pool(x)))


class MixedD(nnx.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = ConvNorm(inputs, 192, rngs=rngs)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = ConvNorm(inputs, 192, rngs=rngs)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), pad=(0, 3), rngs=rngs)
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), pad=(3, 0), rngs=rngs)
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = _through(x, self.branch3x3_1, self.branch3x3_2)
        seven = _through(x, *(getattr(self, f"branch7x7x3_{i}") for i in range(1, 5)))
        return _joined(three, seven, max_pool(x))


class MixedE(nnx.Module):
    """Block at 8 x 8; ``maximum`` is the last one's pool, where the other takes the average."""

    def __init__(self, inputs: int, *, maximum: bool, rngs: nnx.Rngs):
        self.maximum = maximum
        row, column = dict(kernel=(1, 3), pad=(0, 1), rngs=rngs), dict(kernel=(3, 1), pad=(1, 0), rngs=rngs)
        self.branch1x1 = ConvNorm(inputs, 320, rngs=rngs)
        self.branch3x3_1 = ConvNorm(inputs, 384, rngs=rngs)
        self.branch3x3_2a = ConvNorm(384, 384, **row)
        self.branch3x3_2b = ConvNorm(384, 384, **column)
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, rngs=rngs)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, pad=1, rngs=rngs)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **row)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **column)
        self.branch_pool = ConvNorm(inputs, 192, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three, double = self.branch3x3_1(x), _through(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = max_pool(x, stride=1, pad=1) if self.maximum else average_pool(x)
        return _joined(
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )


class InceptionV3(nnx.Module):
    """The whole network, always in evaluation mode and in float32; source names in ``weights.py``."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, rngs=rngs)
        self.conv2d_2a_3x3 = ConvNorm(32, 32, 3, rngs=rngs)
        self.conv2d_2b_3x3 = ConvNorm(32, 64, 3, pad=1, rngs=rngs)
        self.conv2d_3b_1x1 = ConvNorm(64, 80, rngs=rngs)
        self.conv2d_4a_3x3 = ConvNorm(80, 192, 3, rngs=rngs)
        self.mixed_5b = MixedA(192, 32, rngs=rngs)
        self.mixed_5c = MixedA(256, 64, rngs=rngs)
        self.mixed_5d = MixedA(288, 64, rngs=rngs)
        self.mixed_6a = MixedB(288, rngs=rngs)
        self.mixed_6b = MixedC(768, 128, rngs=rngs)
        self.mixed_6c = MixedC(768, 160, rngs=rngs)
        self.mixed_6d = MixedC(768, 160, rngs=rngs)
        self.mixed_6e = MixedC(768, 192, rngs=rngs)
        self.mixed_7a = MixedD(768, rngs=rngs)
        self.mixed_7b = MixedE(1280, maximum=False, rngs=rngs)
        self.mixed_7c = MixedE(2048, maximum=True, rngs=rngs)
        self.fc = Linear(2048, config.num_classes, axes=("embed", None), rngs=rngs)

    def __call__(self, pixels: Float[Array, "n height width 3"]) -> InceptionFeatures:
        """Every feature of normalised images (about -1 to 1), 299 x 299 in all published scores."""
        x = _through(pixels, self.conv2d_1a_3x3, self.conv2d_2a_3x3, self.conv2d_2b_3x3)
        first = max_pool(x)
        second = max_pool(_through(first, self.conv2d_3b_1x1, self.conv2d_4a_3x3))
        x = _through(second, self.mixed_5b, self.mixed_5c, self.mixed_5d, self.mixed_6a)
        third = _through(x, self.mixed_6b, self.mixed_6c, self.mixed_6d, self.mixed_6e)
        last = _through(third, self.mixed_7a, self.mixed_7b, self.mixed_7c)
        means = [x.mean((1, 2)) for x in (first, second, third, last)]
        return InceptionFeatures(*means, logits=means[-1] @ self.fc.kernel[...])
