"""Checksums of arrays, computed where they lie: the same on any mesh, and one flipped bit changes them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Name -> 32-bit checksum over an array's bits and their places; none for what has 64 bits an element.

    Only sums of whole numbers cross devices and processes, so the order in which they are added does not
    matter.  All processes that hold parts of an array must call this together.
    """
    # 64-bit values do not reach the devices unchanged; no part of a training state has any.
    known = {name: value for name, value in arrays.items() if np.dtype(value.dtype).itemsize <= 4}
    if jax.default_backend() == "cpu":
        # One by one: there, programs with collectives that run at once wait for each other's threads.
        return {name: int(_checksum(value)) for name, value in jax.block_until_ready(known).items()}
    sums = jax.device_get({name: _checksum(value) for name, value in known.items()})
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _checksum(value: jax.Array) -> jax.Array:
    """u32[]: the sum over elements of their bits, mixed with where they stand."""
    if value.dtype == jnp.bool_:
        value = value.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, unsigned).astype(jnp.uint32)
    place = jnp.zeros(value.shape, jnp.uint32)
    for axis, size in enumerate(value.shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis)
    # MurmurHash3's last step.  It is one to one, so another value at one place is always another sum.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
