"""Rates at which bytes and samples move: between devices, from the host, to the disk, out of the loader.

Each takes a second or two.  They are for finding what is wrong by an order of magnitude, no benchmarks.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.data.batches.pipeline import Loader

MIB = 2**20
BYTES = 64 * MIB
REPEATS = 3


def best_seconds(work: Callable[[], object]) -> float:
    """Time of the fastest of some calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def transfers() -> dict[str, float]:
    """``host_to_device`` and ``device_to_host``: GB/s with the first device of this process."""
    device, values = jax.local_devices()[0], np.random.default_rng(0).integers(0, 255, BYTES, np.uint8)
    to_device = best_seconds(lambda: jax.block_until_ready(jax.device_put(values, device, may_alias=False)))
    # A new array each time: one that was read once is kept on the host.
    arrays = iter([jax.device_put(values, device, may_alias=False) + np.uint8(i) for i in range(REPEATS)])
    to_host = best_seconds(lambda: np.array(next(arrays)))
    return {"host_to_device": BYTES / to_device / 1e9, "device_to_host": BYTES / to_host / 1e9}


def collectives(mesh: jax.sharding.Mesh, size: int = 16 * MIB) -> dict[str, float]:
    """Mesh axis -> GB/s that a ring puts on each device's wire, summing ``size`` bytes a device over it.

    Axes of one device have none.  All processes must call it together.
    """
    return {axis: _collective(mesh, axis, size) for axis, count in mesh.shape.items() if count > 1}


def _collective(mesh: jax.sharding.Mesh, axis: str, size: int) -> float:
    devices, count = mesh.size, mesh.shape[axis]
    whole = NamedSharding(mesh, P(mesh.axis_names))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names), check_vma=False
    )
    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, axis) / count

    values = jax.jit(lambda: jnp.ones((devices, size // 4), jnp.float32), out_shardings=whole)()
    compiled = jax.jit(summed).lower(values).compile()
    jax.block_until_ready(compiled(values))
    seconds = best_seconds(lambda: jax.block_until_ready(compiled(values)))
    return 2 * (count - 1) / count * size / seconds / 1e9


def storage(folder: Path) -> dict[str, float]:
    """``write`` and ``read``: MB/s of a file in ``folder``, which must be there, past the page cache.

    Raises:
      OSError: it cannot be written.
    """
    data = np.random.default_rng(0).bytes(BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):  # macOS reads from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(4 * MIB):
            pass
        read = time.perf_counter() - start
    return {"write": BYTES / write / 1e6, "read": BYTES / read / 1e6}


def samples(loader: Loader, seconds: float = 5.0) -> float:
    """Samples a second of all processes' loaders together, as this one goes, after its first batches.

    Raises:
      DataError: as the loader.
    """
    for _ in range(2):  # starting processes is no part of it
        next(loader)
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        count += len(loader.samples(loader.state))
        next(loader)
    loader.close()
    return count / took
