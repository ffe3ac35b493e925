"""What a configuration leaves to the devices: how many split the language model, and the micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.training.sharding import Layout, ShardingError, make_mesh
from minigpt5_jax.wiring.memory import POLICIES, kept_room, recomputing, resident_bytes, residual_bytes
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
      limit: bytes of a device; None where it is not known.

    Raises:
      ShardingError: sizes that do not multiply to the number of devices, or parameters that do not divide.
    """
    settings, devices = config.mesh, list(jax.devices() if devices is None else devices)
    if settings.tensor is not None:
        return config, make_mesh(settings.data, settings.fsdp, settings.tensor, devices)
    smallest, error = None, None
    for tensor in divisors(1 if limit is None else devices_of_a_host(devices)):
        try:
            mesh = make_mesh(settings.data, settings.fsdp, tensor, devices)
            size = resident_bytes(spec, parameter_layout(config, spec, mesh))
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
    items: int = 1,
    fewest: Callable[[Sequence[int]], int] = min,
) -> ConfigDict:
    """The configuration with a number of micro-batches that the devices divide; the update is the same.

    Where ``data.accumulation`` is open it is the fewest that fit; else it is lowered to what divides.  Where
    no number does, nothing changes: the batch's own error has the numbers.

    Args:
      story: samples of a row that is a tree.
      items: images to draw of such a row.
      fewest: chooses among numbers of micro-batches, ascending, where the number is open.
    """
    data, rows = config.data, mesh.shape["data"] * mesh.shape["fsdp"]
    if data.packing == "tree":
        # Rows lie over data x fsdp, and their items over the whole mesh.
        places = story * math.lcm(rows, mesh.size // math.gcd(mesh.size, items))
    else:
        places = math.lcm(mesh.size, max(1, data.pack) * rows)
    fitting = [n for n in divisors(data.global_batch) if data.global_batch // n % places == 0]
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
    config: ConfigDict,
    spec: ModelSpec,
    batch: Batch,
    layout: Layout,
    limit: int | None = None,
    *,
    extra: int = 0,
) -> Callable[[Sequence[int]], int]:
    """A function that chooses the number of micro-batches for :func:`fit_accumulation`.

    It returns the first number with which a micro-batch fits and nothing is computed again.  Where there is
    none, and ``model.remat`` is ``auto``, as little is computed again as makes some number fit; where nothing
    fits, it is the last one.  Without a known memory (CPU) it is the first.

    Args:
      config: whose ``model.remat`` counts.
      batch: shapes of this process's part of a whole update.
      layout, limit, extra: as of :func:`minigpt5_jax.wiring.memory.fit_memory`.
    """

    def choose(counts: Sequence[int]) -> int:
        if limit is None:
            return counts[0]
        room, shares = kept_room(spec, layout, limit, extra=extra)
        for policy in POLICIES if config.model.remat == "auto" and room > 0 else ("none",):
            kept = residual_bytes(recomputing(config, spec, policy), batch) / shares
            fitting = [n for n in counts if kept / n <= room]
            if fitting:
                return fitting[0]
        return counts[-1]

    return choose


def devices_of_a_host(devices: Sequence[Any]) -> int:
    """How many devices each host has, of a run's or of a topology that is planned for."""
    return len(devices) // len({getattr(device, "process_index", 0) for device in devices})


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
