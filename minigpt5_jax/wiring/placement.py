"""What a configuration leaves to the devices: how many split the language model, and the micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.training.sharding import ShardingError, make_mesh
from minigpt5_jax.wiring.memory import device_bytes, kept_room, resident_bytes, residual_bytes
from minigpt5_jax.wiring.model import ModelSpec, parameter_layout

RESIDENT = 0.75
"""Share of a device that weights, gradients and moments may take before the language model is split."""


def open_mesh(
    config: ConfigDict,
    spec: ModelSpec,
    devices: Sequence[jax.Device] | None = None,
    limit: int | None = None,
) -> tuple[ConfigDict, jax.sharding.Mesh]:
    """(configuration with its mesh settled, mesh): ``mesh.tensor``, where open, as small as memory allows.

    Splitting costs collectives in each layer, so that whole copies are better wherever they fit.  Without a
    known memory (CPU) nothing is split.

    Args:
      spec: without the towers that the run does not load.
      devices: of the run; all that JAX has by default.
      limit: bytes of a device; what JAX tells by default.

    Raises:
      ShardingError: sizes that do not multiply to the number of devices, or parameters that do not divide.
    """
    settings, devices = config.mesh, list(jax.devices() if devices is None else devices)
    if settings.tensor is not None:
        return config, make_mesh(settings.data, settings.fsdp, settings.tensor, devices)
    limit = device_bytes() if limit is None else limit
    smallest, error = None, None
    for tensor in _divisors(1 if limit is None else len(devices) // jax.process_count()):
        try:
            mesh = make_mesh(settings.data, settings.fsdp, tensor, devices)
            size = resident_bytes(spec, parameter_layout(config, spec, mesh).stored)
        except ShardingError as found:
            error = error or found
            continue
        if smallest is None or size < smallest[0]:
            smallest = size, tensor, mesh
        if limit is None or size <= RESIDENT * limit:
            break
    if smallest is None:
        raise error or ShardingError("there is no device")
    config = config.copy_and_resolve_references()
    config.mesh.tensor = smallest[1]
    return config, smallest[2]


def fit_accumulation(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    story: int = 1,
    fewest: Callable[[Sequence[int]], int] = min,
) -> ConfigDict:
    """The configuration with a number of micro-batches that the devices divide; the update is the same.

    Where ``data.accumulation`` is open it is the fewest that fit; else it is lowered to what divides.  Where
    no number does, nothing changes: the batch's own error has the numbers.

    Args:
      story: samples of a row that is a tree.
      fewest: chooses among numbers of micro-batches, ascending, where the number is open.
    """
    data, rows = config.data, mesh.shape["data"] * mesh.shape["fsdp"]
    if data.packing == "tree":
        places = story * rows
    else:
        places = math.lcm(mesh.size, max(1, data.pack) * rows)
    fitting = [n for n in _divisors(data.global_batch) if data.global_batch // n % places == 0]
    if data.accumulation is None:
        chosen = fewest(fitting) if fitting else 1
    else:
        chosen = max((n for n in fitting if n <= data.accumulation), default=data.accumulation)
    return config if chosen == data.accumulation else with_accumulation(config, chosen)


def with_accumulation(config: ConfigDict, count: int) -> ConfigDict:
    """The configuration with ``count`` micro-batches."""
    config = config.copy_and_resolve_references()
    config.data.accumulation = count
    return config


def fewest_that_fit(
    spec: ModelSpec, batch: Batch, layout: dict, limit: int | None = None, *, extra: int = 0
) -> Callable[[Sequence[int]], int]:
    """Chooser of :func:`fit_accumulation`: the first number whose micro-batch fits, nothing computed again.

    Where none does, the last one.  Without a known memory (CPU) the first.

    Args:
      batch: shapes of this process's part of a whole update.
      layout, limit, extra: as of :func:`minigpt5_jax.wiring.memory.fit_memory`.
    """

    def choose(counts: Sequence[int]) -> int:
        bytes_of_device = device_bytes() if limit is None else limit
        if bytes_of_device is None:
            return counts[0]
        room, shares = kept_room(spec, layout, bytes_of_device, extra=extra)
        kept = residual_bytes(spec, batch) / shares
        return next((n for n in counts if kept / n <= room), counts[-1])

    return choose


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
