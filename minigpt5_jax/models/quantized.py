"""Products with frozen kernels that are stored in fewer bits (:mod:`minigpt5_jax.weights.quantization`).

A quantised kernel stands in the place of an array in a module; :func:`product` is the one place where a
kernel is multiplied with, whatever it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp

from minigpt5_jax.weights.quantization import decode_nf4

Product = Callable[[jax.Array, jax.Array], jax.Array]
"""``(x, kernel) -> y``, linear in both, outputs on the last axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """The stored form of a kernel.

    Attributes:
      values, scale: its arrays (:attr:`minigpt5_jax.weights.quantization.Quantization.stored`).
      method: how they are to be read.
    """

    values: Any
    scale: Any
    method: str = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: EllipsisType) -> QuantizedKernel:
        """Itself: modules read their parameters by ``parameter[...]``."""
        return self

    def multiply(self, product: Product, x: jax.Array) -> jax.Array:
        """``product(x, kernel)`` in the dtype of ``x``.

        Integers up to 127 are exact in every compute dtype, so the scales of output channels are left to the
        result, where there are fewer numbers to multiply, in fp32.
        """
        if self.method == "nf4":
            return product(x, decode_nf4(self.values, self.scale, x.dtype))
        y = product(x, self.values.astype(x.dtype))
        return (y.astype(jnp.float32) * self.scale).astype(x.dtype)


def product(multiply: Product, x: jax.Array, kernel: jax.Array | QuantizedKernel) -> jax.Array:
    """``multiply(x, kernel)`` in the dtype of ``x``.

    The gradient of a quantised kernel is zero, and what is kept for the backward pass is the kernel as it is
    stored: JAX by itself keeps the weights in the compute dtype, of all layers of a scan at once.
    """
    if not isinstance(kernel, QuantizedKernel):
        return multiply(x, kernel.astype(x.dtype))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    @jax.custom_vjp
    def run(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
        return kernel.multiply(multiply, x)

    def forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
        return kernel.multiply(multiply, x), kernel

    def backward(kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
        [gradient] = jax.linear_transpose(lambda x: kernel.multiply(multiply, x), like)(gradient)
        return gradient, None

    run.defvjp(forward, backward)
    return run(x, kernel)
