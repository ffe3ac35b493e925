"""Layers every tower is built from.

A tower is an ``nnx.Module`` that holds nothing but ``nnx.Param``s; :mod:`minigpt5_jax.models.abstract` is how
the rest of the program sees it.

Layout conventions (those of Flax): dense kernels ``[in, out]``, convolution kernels HWIO,
activations NHWC / ``[batch, length, width]``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.quantized import product

Axis = str | tuple[str, int] | None
"""Logical axis of one dimension: a name, or ``(name, units)`` when the dimension fuses ``units``
indivisible pieces (a projection to 32 heads of 128 is ``("heads", 32)``), or None."""

Initializer = jax.nn.initializers.Initializer
Params = dict[str, jax.Array]

lecun_normal = jax.nn.initializers.lecun_normal()
xavier_uniform = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def normal(std: float) -> Initializer:
    """Normal initialiser with standard deviation ``std`` (Hugging Face ``initializer_range``)."""
    return jax.nn.initializers.normal(std)


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for Linear weights and biases."""
    return uniform(1.0 / math.sqrt(fan_in))


def param(
    rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Sequence[Axis], dtype=jnp.float32
) -> nnx.Param:
    """A parameter with one logical axis per dimension; every parameter is made through this."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {tuple(shape)} was given axes {tuple(axes)}")
    if isinstance(rngs, ShapesOnly):
        return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), dtype), axes=tuple(axes))
    return nnx.Param(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))


class ShapesOnly(nnx.Rngs):
    """In the place of random keys: a module is made with the shapes of its parameters, and nothing is traced.

    Under ``nnx.eval_shape`` every initialiser is traced, which takes four fifths of the time.
    """


class _CountedStream(nnx.RngStream):
    """The keys of ``nnx.RngStream``, counted by a Python integer.

    nnx counts in an array.  While tracing, every update of that tracer searches the jaxpr so far,
    which makes building a tower quadratic in its parameters (seconds for the UNet's 686).
    """

    def __init__(self, key: jax.Array):
        super().__init__(key, tag="params")
        self.draws = 0

    def __call__(self) -> jax.Array:
        self.draws += 1
        return jax.random.fold_in(self.key[...], self.draws - 1)


def constructor_rngs(key: jax.Array) -> nnx.Rngs:
    """``nnx.Rngs(params=key)``, same draws, fast to trace; good for building modules only."""
    rngs = nnx.Rngs(params=key)
    rngs.params = _CountedStream(key)
    return rngs


class Linear(nnx.Module):
    """``x @ kernel + bias`` computed in ``dtype``; kernel ``[in_features, out_features]``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[Axis, Axis],
        bias: bool = True,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = param(rngs, kernel_init, (in_features, out_features), axes, param_dtype)
        self.bias = param(rngs, bias_init, (out_features,), (axes[1],), param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(jnp.matmul, x.astype(self.dtype), self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def torch_linear(in_features: int, out_features: int, **kwargs: Any) -> Linear:
    """A dense layer with torch's default initialisation."""
    init = uniform_fan_in(in_features)
    return Linear(in_features, out_features, kernel_init=init, bias_init=init, **kwargs)


def conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """2-D convolution of ``x [m h w in]`` with ``kernel [kh kw in out]``."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nnx.Module):
    """2-D convolution on NHWC; ``padding`` is symmetric, or explicit ``((top, bottom), (left, right))``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
        bias: bool = True,
        axes: tuple[Axis, Axis] = ("conv_in", "conv_out"),
        kernel_init: Initializer = lecun_normal,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        self.padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = param(rngs, kernel_init, shape, (None, None, *axes), param_dtype)
        self.bias = param(rngs, zeros, (out_channels,), (axes[1],), param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        convolve = functools.partial(conv2d, stride=self.stride, padding=self.padding)
        y = product(convolve, x.astype(self.dtype), self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """LLaMA's RMSNorm: variance in fp32, normalised value cast to ``dtype`` before the scale."""

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        axis: Axis = "embed",
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps, self.dtype = eps, dtype
        self.scale = param(rngs, ones, (width,), (axis,), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * self.scale[...].astype(self.dtype)


class LayerNorm(RMSNorm):
    """LayerNorm over the last axis, statistics in fp32, result in ``dtype``."""

    def __init__(self, width: int, *, axis: Axis = "embed", rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(width, axis=axis, rngs=rngs, **kwargs)
        self.bias = param(rngs, zeros, (width,), (axis,), self.scale.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class GroupNorm(LayerNorm):
    """GroupNorm over (spatial axes, channels of a group) of a channels-last tensor, fp32 statistics."""

    def __init__(self, num_groups: int, channels: int, **kwargs: Any):
        if channels % num_groups:
            raise ValueError(f"{channels} channels do not divide into norm_num_groups={num_groups}")
        super().__init__(channels, axis="conv_out", **kwargs)
        self.num_groups = num_groups

    def __call__(self, x: jax.Array) -> jax.Array:
        pixels = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        centred = pixels - self._group_mean(pixels)
        variance = self._group_mean(jnp.square(centred))
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        y = centred * factor + self.bias[...].astype(jnp.float32)
        return y.reshape(x.shape).astype(self.dtype)

    def _group_mean(self, pixels: jax.Array) -> jax.Array:
        """``[b, n, c] -> [b, 1, c]``, each channel with the mean of its group.

        Pixels first, then the few channels of a group: the big reduction keeps channels contiguous
        (two to six times faster on CPU, forward and backward, than one over both axes).
        """
        batch, _, channels = pixels.shape
        groups = pixels.mean(1).reshape(batch, self.num_groups, channels // self.num_groups)
        return jnp.repeat(groups.mean(-1), channels // self.num_groups, axis=-1)[:, None]


class Embedding(nnx.Module):
    """Look-up table ``embedding [num, width]``."""

    def __init__(
        self,
        num: int,
        width: int,
        *,
        axes: tuple[Axis, Axis] = ("vocab", "embed"),
        init: Initializer | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.embedding = param(rngs, init or normal(0.02), (num, width), axes, param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...].astype(self.dtype)[ids]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """``x`` times the normal distribution's share below it, computed in fp32 as PyTorch does.

    The backward pass keeps the slope alone, in the dtype of ``x``.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    share = _normal_cdf(wide)
    slope = share + wide * jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return (wide * share).astype(x.dtype), slope.astype(x.dtype) * tangent


def _normal_cdf(x: jax.Array) -> jax.Array:
    # By erf, as PyTorch: erfc, which JAX takes, computes two series and costs twice the time on a CPU.
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations by their Hugging Face names (``gelu`` is the exact erf form)."""


class Mlp(nnx.Module):
    """``fc2(activation(fc1(x)))``; ``inits`` are those of the two kernels."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        inits: tuple[Initializer, Initializer],
        **kwargs: Any,
    ):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = Linear(width, hidden, axes=("embed", "mlp"), kernel_init=inits[0], **kwargs)
        self.fc2 = Linear(hidden, width, axes=("mlp", "embed"), kernel_init=inits[1], **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


# ---------------------------------------------------------------------------------------------
# Sizes


class PublishedSizes:
    """Base of dataclasses of sizes, whose fields have the names of a published ``config.json``.

    Attributes:
      tower: what starts the messages.
      implemented: field of the file -> values it may have; a field that is not there may be anything.
      reasons: field -> how the message ends for other values; by default the value that it should have.
    """

    tower: ClassVar[str] = ""
    implemented: ClassVar[Mapping[str, Sequence[Any]]] = {}
    reasons: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> Any:
        """Sizes from a published ``config.json``, lists as tuples.

        Args:
          config: its values; fields that it leaves out take the defaults of the library it is of.
          overrides: values that win.

        Raises:
          ValueError: naming a field whose value is not implemented.
        """
        for field, values in cls.implemented.items():
            if field in config and config[field] not in values:
                reason = cls.reasons.get(field, f" (only {values[0]!r})")
                start = f"{cls.tower} {field}".lstrip()
                raise ValueError(f"{start}={config[field]!r} is not implemented{reason}")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        return cls(**values | overrides)


def check_transformer(config: Any) -> None:
    """Refuse sizes of a transformer that do not fit.

    Raises:
      ValueError: a head count that does not divide the width, or an unknown activation.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} does not divide into "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")


def check_patches(config: Any) -> None:
    """ValueError where the patches of a vision transformer do not fill its image."""
    if config.image_size % config.patch_size:
        raise ValueError(
            f"image_size={config.image_size} does not divide into patch_size={config.patch_size}"
        )


# ---------------------------------------------------------------------------------------------
# Repeated layers


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """``count`` independently initialised copies of a block, parameters stacked on axis 0.

    The result is an ordinary module whose leaves carry a leading ``layers`` axis; run it with
    :func:`scan_layers`.  One traced block instead of ``count`` keeps compile time flat in depth.
    """
    graphdef, state = nnx.split(make_block(ShapesOnly()))
    if isinstance(rngs, ShapesOnly):
        state = jax.tree.map(lambda one: jax.ShapeDtypeStruct((count, *one.shape), one.dtype), state)
    else:
        keys = jax.random.split(rngs.params(), count)
        state = jax.vmap(lambda key: nnx.state(make_block(constructor_rngs(key))))(keys)
    block = nnx.merge(graphdef, state)
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return block


def scan_layers(
    layers: nnx.Module,
    x: Any,
    call: Callable[..., Any],
    *,
    per_layer: Any = None,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Run stacked ``layers`` over the carry ``x`` with ``jax.lax.scan``.

    ``call(block, x, layer_input) -> (x, layer_output)``; ``per_layer`` is a pytree with a leading
    layer axis (KV caches, dropout keys) whose slices arrive as ``layer_input``.  Returns the final
    carry and the stacked layer outputs.  ``remat`` recomputes each block in the backward pass.

    Where the leaves are tuples with an array for each layer
    (:func:`~minigpt5_jax.models.abstract.take_layers_apart`), the layers are written out one after another.
    """
    graphdef, state = nnx.split(layers)
    apart = _apart(state)

    def body(carry, inputs):
        block_state, layer_input = inputs
        return call(nnx.merge(graphdef, block_state), carry, layer_input)

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    if not apart:
        return jax.lax.scan(body, x, (state, per_layer))
    outputs = []
    for number in range(len(apart[0])):
        take = operator.itemgetter(number)
        own = jax.tree.map(take, state, is_leaf=_is_apart), jax.tree.map(take, per_layer)
        x, output = body(x, own)
        outputs.append(output)
    return x, jax.tree.map(lambda *values: jnp.stack(values), *outputs)


def layers_are_apart(layers: nnx.Module) -> bool:
    """Whether the leaves of ``layers`` are tuples with an array for each layer."""
    return bool(_apart(nnx.state(layers)))


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _apart(state: Any) -> list[tuple[Any, ...]]:
    """The leaves that are tuples with an array for each layer."""
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_apart) if _is_apart(leaf)]


def run_layers(layers: nnx.Module, x: jax.Array, *context: Any, remat: bool) -> jax.Array:
    """``x = layer(x, *context)`` for each of stacked ``layers``."""
    return scan_layers(layers, x, lambda layer, x, _: (layer(x, *context), None), remat=remat)[0]
