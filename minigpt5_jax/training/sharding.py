"""Mesh and shardings: logical axis names -> mesh axes ``data``, ``fsdp``, ``tensor``.

Towers name logical axes only.  A rules table per tower maps them; what does not divide is an error
that carries the numbers, never a silent replication.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.batch import Batch
from minigpt5_jax.models.common import Axis
from minigpt5_jax.models.mesh import LAYOUTS, SHARD_AXES

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = SHARD_AXES
ITEMS = LAYOUTS["items"][0]  # images cost most and need no model axis: spread over all
LARGE = 2**17
"""Elements of a layer from which on a parameter is spread.  It must be a matrix: towers cast those to the
compute dtype anyway, in which they travel, and not scales and biases."""

Rules = Sequence[tuple[str, Mapping[str, str]]]
"""(Start of a path, logical axis -> mesh axis): the first match decides; what none matches is replicated.
The parts of a model say them (``Part.sharding``)."""


class ShardingError(ValueError):
    """A dimension, a batch or a device count does not divide; the message has the numbers."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh of all devices; one of the three sizes may be -1 (what is left).

    Raises:
      ShardingError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known:
        raise ShardingError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not divide {len(devices)} devices"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} has {math.prod(sizes)} places "
            f"for {len(devices)} devices"
        )
    # Auto is said explicitly: make_mesh's default (Explicit) refuses ordinary tensor-parallel matmuls.
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(
    path: str, shape: Sequence[int], axes: Sequence[Axis], mesh: Mesh, tower_rules: Rules
) -> P:
    """Where one parameter's dimensions go.

    Raises:
      ShardingError: if a sharded dimension (or the heads fused in it) does not divide, or two
        dimensions want the same mesh axis.
    """
    rules = next((rules for prefix, rules in tower_rules if path.startswith(prefix)), {})
    spec: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        name, units = axis if isinstance(axis, tuple) else (axis, size)
        target = rules.get(name) if name else None
        if target is not None and mesh.shape[target] == 1:
            target = None
        if target is not None and (size % mesh.shape[target] or units % mesh.shape[target]):
            what = f"{units} {name}" if units != size else f"axis {name!r} of {size}"
            raise ShardingError(
                f"{path}: {what} does not divide over mesh axis {target!r} of {mesh.shape[target]} devices; "
                f"choose mesh.{target} from the divisors of {units}"
            )
        if target is not None and target in spec:
            raise ShardingError(f"{path}: two dimensions of {tuple(shape)} are sharded over {target!r}")
        spec.append(target)
    return P(*spec)


def parameter_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    axes: Mapping[str, Sequence[Axis]],
    mesh: Mesh,
    rules: Rules = (),
) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a template; errors as :func:`partition_spec`."""
    return {
        path: NamedSharding(mesh, partition_spec(path, s.shape, axes[path], mesh, rules))
        for path, s in shapes.items()
    }


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters lie between the steps, and where a step needs the trainable ones.

    Attributes:
      stored: path -> place of a parameter; that of a trainable is its master weights' and moments'.
      used: path -> place of a trainable while a step computes with it.
      dtype: of trainables on their way to the devices, and of their gradients on the way back.
    """

    mesh: Mesh
    stored: dict[str, NamedSharding]
    used: dict[str, NamedSharding]
    dtype: Any = jnp.float32

    @property
    def shards(self) -> int:
        """Places of the mesh that have rows of their own."""
        return math.prod(self.mesh.shape[axis] for axis in ROWS)

    def gather(self, trainable: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Trainables from where they are stored to where they are used."""

        def gathered(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                path: part
                if (dim := self._spread_dim(path)) is None
                else jax.lax.all_gather(part.astype(self.dtype), ROWS, axis=dim, tiled=True).astype(
                    part.dtype
                )
                for path, part in parts.items()
            }

        return self._mapped(
            gathered, {p: self.stored[p].spec for p in trainable}, self._used_specs(trainable)
        )(dict(trainable))

    def reduce(self, gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Gradients ``[shards ...]`` summed over the shards, each part where it is stored."""

        def reduced(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                path: jax.lax.psum(part[0], ROWS)
                if (dim := self._spread_dim(path)) is None
                else jax.lax.psum_scatter(
                    part[0].astype(self.dtype), ROWS, scatter_dimension=dim, tiled=True
                ).astype(part.dtype)
                for path, part in parts.items()
            }

        specs = {path: P(ROWS, *spec) for path, spec in self._used_specs(gradients).items()}
        return self._mapped(reduced, specs, {path: self.stored[path].spec for path in gradients})(
            dict(gradients)
        )

    def _mapped(self, function: Any, inputs: dict[str, P], results: dict[str, P]) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=(inputs,), out_specs=results, check_vma=False)

    def _used_specs(self, paths: Iterable[str]) -> dict[str, P]:
        return {path: self.used[path].spec for path in paths}

    def _spread_dim(self, path: str) -> int | None:
        """The dimension that is spread while a parameter is stored, and whole while it is used."""
        pairs = zip(self.stored[path].spec, self.used[path].spec)
        return next((dim for dim, (stored, used) in enumerate(pairs) if stored != used), None)


def lay_out(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    axes: Mapping[str, Sequence[Axis]],
    trainable: Collection[str],
    mesh: Mesh,
    rules: Rules = (),
    *,
    frozen: str = "tensor",
    dtype: Any = jnp.float32,
) -> Layout:
    """The layout of a template's parameters.

    Trainables are spread over all devices with rows of their own (ZeRO): each keeps and updates its part of
    the master weights and moments.  A parameter none of whose dimensions divides stays whole.

    Args:
      trainable: paths that train.
      frozen: ``tensor``: towers by ``rules``; ``replicated``: whole on every device; ``fsdp``: by ``rules``,
        and frozen ones spread over ``fsdp`` besides, so that they are gathered whenever they are used.
      dtype: as of :class:`Layout`.

    Raises:
      ShardingError: as :func:`partition_spec`.
    """
    stored, used = {}, {}
    rules = () if frozen == "replicated" else rules
    for path, place in parameter_shardings(shapes, axes, mesh, rules).items():
        over: tuple[str, ...] = ("fsdp",) if frozen == "fsdp" else ()
        if path in trainable:
            place = used[path] = NamedSharding(mesh, P(*(None if a in ROWS else a for a in place.spec)))
            over = ROWS
        stored[path] = _spread(place, shapes[path].shape, axes[path], over)
    return Layout(mesh, stored, used, dtype)


def _spread(
    place: NamedSharding, shape: Sequence[int], axes: Sequence[Axis], over: tuple[str, ...]
) -> NamedSharding:
    """``place`` with its largest free dimension spread over mesh axes; the layers of a scan stay together."""
    over = tuple(axis for axis in over if place.mesh.shape[axis] > 1)
    count = math.prod(place.mesh.shape[axis] for axis in over)
    spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    free = [
        dim
        for dim, size in enumerate(shape)
        if spec[dim] is None and axes[dim] != "layers" and size % count == 0
    ]
    sizes = [size for dim, size in enumerate(shape) if axes[dim] != "layers"]
    if count == 1 or not free or len(sizes) < 2 or math.prod(sizes) < LARGE:
        return place
    spec[max(free, key=lambda dim: shape[dim])] = over if len(over) > 1 else over[0]
    return NamedSharding(place.mesh, P(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def state_shardings(state, parameters: Mapping[str, NamedSharding], mesh: Mesh):
    """Shardings of a TrainState: optimizer moments follow the parameter they belong to."""

    def of(path, _):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        owner = next((key for key in reversed(keys) if key in parameters), None)
        return replicated(mesh) if owner is None else parameters[owner]

    return jax.tree_util.tree_map_with_path(of, state)


def batch_shardings(batch: Batch, mesh: Mesh, accumulation: int = 1) -> Batch:
    """Sharding of every batch field: rows over data x fsdp, target images over the whole mesh.

    Raises:
      ShardingError: naming the field, its size and the devices that do not divide it.
    """
    row_fields = {"tokens", "labels", "label_positions", "positions", "segment_ids", "row_id", "prompt_end"}
    row_fields |= {"subtree_end", "before"}
    image_fields = {"images", "image_row", "image_start", "image_mask", "image_states", "image_index"}
    lead = (None,) if accumulation > 1 else ()

    def of(name: str, value) -> NamedSharding:
        # Input images are scattered into rows; like rows they stay off the tensor axis.
        axes = ROWS if name in row_fields | image_fields else ITEMS
        size, places = np.shape(value)[len(lead)], math.prod(mesh.shape[a] for a in axes)
        if size % places:
            if batch.subtree_end is not None:
                rows = np.shape(batch.tokens)[len(lead)]
                raise ShardingError(
                    f"batch.{name} has {size} entries for the {rows} stories of a micro-batch, which "
                    f"{places} devices do not divide; make the stories of a micro-batch (data.global_batch / "
                    "data.accumulation / samples of a story) a multiple of "
                    f"{places // math.gcd(places, max(1, size // rows))}"
                )
            samples = np.shape(batch.item_id)[len(lead)]
            pack = max(1, samples // size) if name in row_fields else 1
            raise ShardingError(
                f"batch.{name} has {size} entries per micro-batch, which {places} devices "
                f"(mesh {'x'.join(axes)} = {'x'.join(str(mesh.shape[a]) for a in axes)}) do not divide; "
                f"make data.global_batch / data.accumulation a multiple of {places * pack}"
                + (f", or lower data.pack={pack}" if pack > 1 else "")
            )
        return NamedSharding(mesh, P(*lead, axes))

    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return Batch(**{name: None if value is None else of(name, value) for name, value in values.items()})
