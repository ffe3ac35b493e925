"""What trainables and their gradients put on the wire, compiled for chips that are not here, in seconds.

    python -m benchmarks.exchange --config configs/stage1.py:int8 --topology v5e:4x4

compiles the two exchanges of a train step alone, at full size: matrices gathered before it, gradients summed
after it.  Where nothing is split over ``mesh.tensor``, a step has no other collectives but sums of numbers.
Prints a JSON line; ``--config.mesh.exchange=float32`` is the other dtype.  Needs the compiler of the
platform, as ``minigpt5_jax.plan`` does.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.planning import hlo
from minigpt5_jax.planning.step import bytes_per_chip, compile_for
from minigpt5_jax.planning.topology import Topology, open_topology
from minigpt5_jax.training.sharding import ROWS
from minigpt5_jax.wiring.memory import resident_bytes
from minigpt5_jax.wiring.model import build, parameter_layout
from minigpt5_jax.wiring.placement import open_mesh
from minigpt5_jax.wiring.used_towers import unused_towers

TOPOLOGY = cli.define_path("topology", "v5e:4x4", "Chips, as those of `plan`.")


def measure(config: ConfigDict, topology: Topology) -> dict[str, Any]:
    """Bytes of the exchange on each chip, and of what lies there."""
    spec = build(config)
    spec = spec.without(unused_towers(config, spec, watched=False))
    config, mesh = open_mesh(config, spec, topology.devices, topology.chip.memory)
    layout, shapes = parameter_layout(config, spec, mesh), spec.template.shapes
    paths = [path for path, group in spec.labels.items() if group != FROZEN]
    own = NamedSharding(mesh, P(ROWS))
    stored = {
        path: jax.ShapeDtypeStruct(shapes[path].shape, shapes[path].dtype, sharding=layout.stored[path])
        for path in paths
    }
    gradients = {
        path: jax.ShapeDtypeStruct((layout.shards, *shapes[path].shape), shapes[path].dtype, sharding=own)
        for path in paths
    }

    def exchange(stored: Any, gradients: Any) -> Any:
        used = {path: value.astype(layout.dtype) for path, value in layout.gather(stored).items()}
        return used, layout.reduce(gradients)

    with jax.set_mesh(mesh):
        compiled = compile_for(topology, jax.jit(exchange), stored, gradients)
    traffic = hlo.collectives(compiled.program(), mesh.size)
    return {
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "dtype": jnp.dtype(layout.dtype).name,
        "collectives": {kind: dataclasses.asdict(moved) for kind, moved in traffic.items()},
        "wire_gb": sum(moved.wire for moved in traffic.values()) / 1e9,
        "stored_gb": bytes_per_chip(stored) / 1e9,
        "resident_gb": resident_bytes(spec, layout) / 1e9,
        "compile_seconds": compiled.seconds,
    }


def main(config: ConfigDict) -> None:
    """The command."""
    print(json.dumps(measure(config, open_topology(TOPOLOGY.value))))


if __name__ == "__main__":
    cli.run(main)
