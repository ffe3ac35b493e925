"""From weight files straight into (sharded) jax arrays, never a tower in memory twice.

A tensor of a file is a view of it, and the operations of the weight tables only transpose and cut views, so a
device's part of a parameter is read from disk without the rest.  A large stacked parameter is allocated once
and filled layer by layer in place (its buffer is donated to each update); what is in memory besides the
parameters is one layer.  A kernel that is stored in fewer bits (:mod:`minigpt5_jax.weights.quantization`) is
quantised on the device layer by layer, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.weights.formats.load import count_non_finite, is_floating
from minigpt5_jax.weights.quantization import SCALE, Quantization
from minigpt5_jax.weights.table import Assignment, Table, WeightTableError

IN_PLACE = 64 * 2**20
"""Bytes from which a stacked parameter is filled in place; a smaller one is stacked on the host, which
compiles nothing."""

Index = tuple[slice, ...]


def stream_tower(
    table: Table,
    source: Mapping[str, np.ndarray],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    *,
    quantized: Mapping[str, Quantization] | None = None,
    in_place: int = IN_PLACE,
) -> dict[str, jax.Array]:
    """Parameters of one tower from foreign tensors, on their devices.

    Args:
      table: rules from the source's names to the tower's paths.
      source: tensors by name; every one must be consumed or ignored by the table.
      targets: path -> shape, dtype (floating values are cast to it) and sharding; without a sharding a
        parameter goes to the first local device.  A process reads what its devices hold.
      quantized: path -> how a kernel is stored; ``targets`` has its values there and its scales at ``SCALE``
        behind it.
      in_place: bytes from which a stacked parameter is filled layer by layer.

    Raises:
      WeightTableError: naming the source and every tensor that is missing, unexpected or misshapen, before
        any is read; or one that holds NaN or infinite values.
    """
    where = getattr(source, "path", None)
    try:
        leaves = _leaves(source, targets, quantized or {})
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        for item in table.plan(list(source), shapes):
            value = source[item.key]
            item.apply(value, shapes)
            for part, path in enumerate(item.targets):
                leaves[path].add(item, part, value.dtype)
        return {path: array for leaf in leaves.values() for path, array in leaf.load(in_place).items()}
    except WeightTableError as error:
        raise WeightTableError(f"{where}: {error}" if where else str(error)) from None


def _leaves(
    source: Mapping[str, np.ndarray],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    quantized: Mapping[str, Quantization],
) -> dict[str, _Leaf]:
    """Path -> how it is made, of every parameter that files have."""
    leaves, scales = {}, {path + SCALE for path in quantized}
    for path in targets:
        if path in scales:
            continue
        names = (path, path + SCALE) if path in quantized else (path,)
        leaves[path] = _Leaf(path, source, {name: targets[name] for name in names}, quantized.get(path))
    return leaves


class _Leaf:
    """One parameter, the tensors that it is made of, and the arrays in which it is kept."""

    def __init__(
        self,
        path: str,
        source: Mapping[str, np.ndarray],
        targets: Mapping[str, jax.ShapeDtypeStruct],
        how: Quantization | None,
    ):
        self.path, self.source, self.targets, self.how = path, source, targets, how
        kernel = targets[path] if how is None else how.kernel
        self.shape, self.dtype = tuple(kernel.shape), np.dtype(kernel.dtype)
        here = SingleDeviceSharding(jax.local_devices()[0])
        self.shardings: tuple[Sharding, ...] = tuple(t.sharding or here for t in targets.values())
        # A kernel and its values are cut alike, for the axes of both have the same names.
        self.sharding = self.shardings[0]
        self.layers: dict[int | None, tuple[Assignment, int]] = {}

    def add(self, item: Assignment, part: int, dtype: np.dtype) -> None:
        """Take output ``part`` of the operation on a tensor of ``dtype``.

        Raises:
          WeightTableError: it is no floating tensor where the parameter is one.
        """
        if is_floating(self.dtype) and not is_floating(dtype):
            raise WeightTableError(
                f"{item.key!r} is {dtype}, {self.path!r} is {self.dtype}: "
                "it is quantised already; give it in 16 or 32 bits, to be quantised when it is loaded "
                "(docs/weights.md)"
            )
        self.layers[item.index] = (item, part)

    def load(self, in_place: int) -> dict[str, jax.Array]:
        """Its arrays by path, on their devices."""
        large = self.dtype.itemsize * np.prod(self.shape) >= in_place
        if None in self.layers or not large:
            whole = jax.make_array_from_callback(self.shape, self.sharding, _once_per_part(self.read))
            arrays = (whole,) if self.how is None else _encoder(self.how, self.shardings)(whole)
            return dict(zip(self.targets, arrays, strict=True))
        rows, write = _row_sharding(self.sharding), _writer(self.how, self.shardings)
        arrays = tuple(
            jnp.zeros(target.shape, target.dtype, device=place)
            for target, place in zip(self.targets.values(), self.shardings, strict=True)
        )
        for i in range(self.shape[0]):
            read = _once_per_part(lambda index, i=i: self.read((slice(i, i + 1), *index[1:])))
            row = jax.make_array_from_callback((1, *self.shape[1:]), rows, read)
            arrays = write(arrays, row, i)
            jax.block_until_ready(arrays)  # rows must not pile up behind updates that have yet to run
        return dict(zip(self.targets, arrays, strict=True))

    def read(self, index: Index) -> np.ndarray:
        """The values at ``index``, in the parameter's dtype."""
        if None in self.layers:
            return self._tensor(None, index)
        layers = range(self.shape[0])[index[0]]
        if len(layers) == 1:
            return self._tensor(layers[0], index[1:])[None]
        sizes = [len(range(size)[part]) for size, part in zip(self.shape, index, strict=True)]
        stacked = np.empty(sizes, self.dtype)
        for row, layer in enumerate(layers):
            stacked[row] = self._tensor(layer, index[1:])
        return stacked

    def _tensor(self, layer: int | None, index: Index) -> np.ndarray:
        """A part of one tensor: a copy, since arrays on a CPU may be views of what they are made from."""
        item, part = self.layers[layer]
        view = item.op.forward(self.source[item.key])[part][index]
        value = np.array(view, self.dtype, order="K")  # in the order of the file; the device transposes
        if bad := count_non_finite(value):
            raise WeightTableError(f"{item.key!r} holds values that are NaN or infinite, {bad} of them read")
        return value


def _once_per_part(read: Callable[[Index], np.ndarray]) -> Callable[[Index], np.ndarray]:
    """``read`` for ``make_array_from_callback``: devices that hold the same part share one reading."""
    seen: dict[tuple, np.ndarray] = {}

    def callback(index: Index) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in seen:
            seen[key] = read(index)
        return seen[key]

    return callback


def _row_sharding(sharding: Sharding) -> Sharding:
    """Of one layer ``[1, ...]`` of a stacked parameter."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
    return sharding


def _stored(how: Quantization | None, value: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in which ``value`` is kept."""
    return (value,) if how is None else how.encode(value)


@functools.cache
def _encoder(how: Quantization, shardings: tuple[Sharding, ...]) -> Callable[..., Any]:
    """Compiled ``kernel -> arrays``; it runs once for each kernel, so compiling is most of what it costs."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(_stored, how), out_shardings=shardings, compiler_options=options)


@functools.cache
def _writer(how: Quantization | None, shardings: tuple[Sharding, ...]) -> Callable[..., Any]:
    """Compiled ``(arrays, row, i) -> arrays`` with the row written in place."""

    def write(arrays: tuple[jax.Array, ...], row: jax.Array, i: jax.Array) -> tuple[jax.Array, ...]:
        parts = zip(arrays, _stored(how, row), strict=True)
        return tuple(jax.lax.dynamic_update_slice_in_dim(array, part, i, axis=0) for array, part in parts)

    return jax.jit(write, donate_argnums=0, out_shardings=shardings)
