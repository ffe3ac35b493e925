"""Kernels stored in fewer bits: what is kept of one, and back.

* ``int8``: symmetric, one scale per output channel, ``kernel = values * scale``; a byte a weight.
* ``nf4``: NormalFloat 4 (QLoRA, arXiv:2305.14314; bitsandbytes without double quantisation).  64 inputs of an
  output channel share the largest magnitude among them, and a weight is the nearest of sixteen quantiles of
  a normal distribution times it; 4.5 bits a weight.

Everything here is arithmetic that every platform has.  qwix 0.1.8 has the same forms, but no
gradient of its own for products with stored weights; ours is in :mod:`minigpt5_jax.models.quantized`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SCALE = "_scale"
"""Behind the path of a quantised kernel: the path of its scales."""
BLOCK = 64
"""Inputs that share a scale under ``nf4``."""
METHODS = ("int8", "nf4")
NORMAL_FLOAT = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of ``nf4``, of which the largest magnitude is 1 (QLoRA, appendix E)."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How one kernel is stored.

    Attributes:
      method: one of :data:`METHODS`.
      kernel: shape and dtype of the kernel as its file fills it, inputs before outputs: ``[in, out]``, HWIO
        for a convolution, with a leading axis of layers if ``stacked``.

    Raises:
      ValueError: a method that does not exist, or a kernel that it cannot store.
    """

    method: str
    kernel: jax.ShapeDtypeStruct
    stacked: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"quantization {self.method!r} is not one of {', '.join(METHODS)}")
        if self.method == "nf4" and (self.kernel.ndim != 2 + self.stacked or self.kernel.shape[-2] % 2):
            raise ValueError(
                f"nf4 stores matrices of an even number of inputs, not {self.kernel.shape}; use int8"
            )

    @property
    def scale_dims(self) -> tuple[int, ...]:
        """Dimensions of the kernel that its scales have too."""
        if self.method == "nf4":
            return tuple(range(self.kernel.ndim))
        return (0, self.kernel.ndim - 1) if self.stacked else (self.kernel.ndim - 1,)

    @property
    def stored(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of (values, scale)."""
        return jax.eval_shape(self.encode, self.kernel)

    def encode(self, kernel: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
        """(values, scale) of a kernel, or of some layers of a stacked one."""
        if self.method == "nf4":
            return _encode_nf4(kernel.astype(jnp.float32))
        inputs = tuple(dim for dim in range(kernel.ndim) if dim not in self.scale_dims)
        kernel = kernel.astype(jnp.float32)
        scale = _positive(jnp.abs(kernel).max(inputs, keepdims=True) / 127)
        values = jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8)
        return values, scale.squeeze(inputs)


def _positive(scale: jax.Array) -> jax.Array:
    """1 in the place of 0, the scale of weights that are all 0."""
    return jnp.where(scale > 0, scale, 1.0)


def block_size(inputs: int) -> int:
    """Inputs of a block: :data:`BLOCK`, or the largest number below it that divides them."""
    return next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0)


def _encode_nf4(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    *layers, inputs, outputs = kernel.shape
    blocks = kernel.reshape(*layers, -1, block_size(inputs), outputs)
    scale = _positive(jnp.abs(blocks).max(-2))
    levels = np.array(NORMAL_FLOAT, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    share = blocks / scale[..., None, :]
    codes = functools.reduce(jnp.add, [(share > middle).astype(jnp.uint8) for middle in middles])
    pairs = codes.reshape(*layers, inputs // 2, 2, outputs)
    return pairs[..., 0, :] << 4 | pairs[..., 1, :], scale


def decode_nf4(values: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The matrix ``[in, out]`` of packed codes ``u8[in/2, out]`` and scales ``f32[in/block, out]``."""
    codes = jnp.stack([values >> 4, values & 15], axis=1).reshape(2 * values.shape[0], -1)
    # Selecting by one bit after the other is fused into what reads the result; a gather from a table is not.
    level: list = list(NORMAL_FLOAT)
    for bit in range(4):
        upper = (codes >> bit & 1).astype(bool)
        level = [jnp.where(upper, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    blocks = level[0].astype(jnp.float32).reshape(scale.shape[0], -1, scale.shape[1])
    return (blocks * scale[:, None]).reshape(codes.shape).astype(dtype)
