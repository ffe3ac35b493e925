"""The bridge between NNX modules and flat parameter dicts: templates, which hold no arrays.

Outside its own file a tower is seen as two things: a *template* (graph definition, paths, shapes and logical
axes, made without allocating anything) and a flat dict ``{"layers/self_attn/q_proj/kernel": array}``.  JAX
transformations work on the dict; ``Template.bind`` turns it back into a callable module while tracing, so no
NNX bookkeeping is left on the hot path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import jax
from flax import nnx

from minigpt5_jax.models.attention import AttentionModule
from minigpt5_jax.models.common import Axis, Conv, Linear, Params, ShapesOnly, constructor_rngs
from minigpt5_jax.models.quantized import QuantizedKernel
from minigpt5_jax.weights.quantization import SCALE, Quantization


class AbsentParameterError(RuntimeError):
    """A computation reads a parameter that was not loaded; the message has its path."""


class AbsentParameter:
    """The place of a parameter that was not loaded: its shape is known, and reading a value is an error.

    It is no array of zeros or of anything else, so that what a run does not load cannot be computed with.
    """

    def __init__(self, path: str, like: jax.ShapeDtypeStruct):
        self.path, self.shape, self.dtype = path, like.shape, like.dtype

    def _refuse(self) -> NoReturn:
        raise AbsentParameterError(
            f"parameter {self.path!r} is read, but it was not loaded: no step, validation or image grid of "
            "this run was found to need its tower (minigpt5_jax/wiring/used_towers.py)"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:  # whatever JAX or an operator asks of an array
        self._refuse()


@dataclasses.dataclass(frozen=True)
class Template:
    """A module without its arrays: what JAX code needs to know about a tower or the whole model.

    Attributes:
      shapes: path -> ``jax.ShapeDtypeStruct`` of every parameter.
      axes: path -> logical axes of every parameter, one entry per dimension.
      absent: paths that :meth:`bind` may be called without.
      quantized: path -> how a kernel is stored whose scales are a parameter of their own (``SCALE``).
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    paths: tuple[tuple[Any, ...], ...]
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[Axis, ...]]
    absent: frozenset[str] = frozenset()
    quantized: Mapping[str, Quantization] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs], nnx.Module], attention: str = "auto") -> Template:
        """Build the template of ``make(rngs)`` abstractly (nothing is allocated).

        ``attention`` is how its modules attend (:mod:`minigpt5_jax.models.attention`).
        """
        module = make(ShapesOnly())
        module.set_attributes(AttentionModule, implementation=attention, raise_if_not_found=False)
        graphdef, state = nnx.split(module)
        flat = nnx.to_flat_state(state)
        names = {path: "/".join(map(str, path)) for path, _ in flat}
        shapes = {names[p]: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in flat}
        axes = {names[p]: v.get_metadata("axes") for p, v in flat}
        return cls(make, graphdef, tuple(names), shapes, axes)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, initialised in one compiled call."""

        def init(key):
            params = to_flat(self.make(constructor_rngs(key)))
            for path, how in self.quantized.items():
                params[path], params[path + SCALE] = how.encode(params[path])
            return params

        if isinstance(key, jax.core.Tracer):  # inside the caller's jit, whose options then hold
            return init(key)
        # It runs once, so compiling is all it costs: unoptimised code is ready four times sooner.
        return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(key)

    def without(self, paths: Collection[str]) -> Template:
        """The same template, to be bound without the parameters at ``paths``."""
        return dataclasses.replace(self, absent=frozenset(paths))

    def kernels(self) -> frozenset[str]:
        """Paths of the kernels that may be stored in fewer bits: those of dense layers and convolutions."""
        found = nnx.iter_modules(self.bind(self.shapes))
        return frozenset(
            "/".join(map(str, (*path, "kernel")))
            for path, module in found
            if isinstance(module, Linear | Conv)
        )

    def quantize(self, methods: Mapping[str, str]) -> Template:
        """The same template with kernels (path -> method) stored in fewer bits.

        Raises:
          ValueError: a kernel that its method cannot store; the message has path and shape.
        """
        shapes, axes, quantized = dict(self.shapes), dict(self.axes), {}
        for path, method in methods.items():
            try:
                how = Quantization(method, shapes[path], stacked=axes[path][0] == "layers")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            shapes[path], shapes[path + SCALE] = how.stored
            axes[path + SCALE] = tuple(axes[path][dim] for dim in how.scale_dims)
            quantized[path] = how
        return dataclasses.replace(self, shapes=shapes, axes=axes, quantized=quantized)

    @property
    def file_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every parameter as files fill it, before any is quantised."""
        scales = {path + SCALE for path in self.quantized}
        return {
            path: self.quantized[path].kernel if path in self.quantized else shape
            for path, shape in self.shapes.items()
            if path not in scales
        }

    def bind(self, params: Mapping[str, Any]) -> nnx.Module:
        """The callable module over ``params``; cheap while tracing.

        Raises:
          KeyError: a path is missing that is not in ``absent``; for one that is, AbsentParameterError as soon
            as the module reads it.
        """
        leaves = [(path, self._leaf(params, "/".join(map(str, path)))) for path in self.paths]
        return nnx.merge(self.graphdef, nnx.from_flat_state(leaves))

    def _leaf(self, params: Mapping[str, Any], path: str) -> Any:
        if path in self.absent and path not in params:
            return AbsentParameter(path, self.shapes[path])
        if path not in self.quantized:
            return params[path]
        method, values, scale = self.quantized[path].method, params[path], params[path + SCALE]
        if not isinstance(values, tuple):
            return QuantizedKernel(values, scale, method)
        return tuple(QuantizedKernel(*layer, method) for layer in zip(values, scale, strict=True))


def take_layers_apart(params: dict[str, Any], paths: Collection[str]) -> None:
    """Replaces the stacked arrays at ``paths`` by tuples with an array for each layer, one by one.

    A scan over stacked arrays copies the matrices of a layer before it multiplies with them, which is most
    of the time where one token is all that they are multiplied with.  Apart they are read in place, and the
    program grows with the number of layers.
    """
    take = jax.jit(lambda stacked: tuple(stacked[number] for number in range(stacked.shape[0])))
    for path in paths:
        if not isinstance(params[path], tuple):
            params[path] = take(params[path])


def to_flat(module: nnx.Module) -> Params:
    """Parameters of a live module as a flat dict."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}
