"""Exact count of the matrix, convolution and attention FLOPs that a function asks for, read off its jaxpr.

XLA's own cost analysis counts a loop body once and depends on the backend.  Here loops are
multiplied out, and what no output needs is removed first, so that counts answer questions such as
"does the train step compute gradients of frozen weights?" on any machine, without compiling.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

# Higher-order primitives that run their body exactly once.
_CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "checkpoint",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_lin",
    }
)


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Floating-point operations, two per multiply-add.

    Attributes:
      total: sum over primitives.
      by_primitive: ``dot_general``, ``conv_general_dilated`` and cuDNN's ``dot_product_attention_fwd`` and
        ``_bwd``, where they occur.
      counted_once: loops of unknown length (``while``) and other bodies with FLOPs whose number of
        runs the jaxpr does not tell; if not empty, ``total`` is a lower bound.
    """

    total: int
    by_primitive: dict[str, int]
    counted_once: tuple[str, ...] = ()


def count_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
    """FLOPs of ``fn(*args)``; arguments may be arrays or ``jax.ShapeDtypeStruct``s, nothing is run.

    Counted are dot products and convolutions after dead-code elimination, with scans multiplied by
    their length, the dearest branch of a ``cond``, and ``shard_map`` bodies by the number of devices.
    A convolution over a dilated input (the gradient of a strided one) is counted without the zeros;
    taps that fall on padding are counted.  Fused attention is counted as what its kernels compute: a Pallas
    kernel's body times its grid, cuDNN's calls by their shapes, and both recompute the logits in the
    backward pass.  Pairs of query and key that a mask excludes are counted; a kernel may skip some.
    """
    counts, counted_once = _count(_live(fn, *args))
    return FlopCount(sum(counts.values()), dict(counts), tuple(sorted(counted_once)))


def product_shapes(fn: Callable[..., Any], *args: Any) -> Counter[tuple[int, ...]]:
    """Shape of the result -> how many dot products and convolutions of ``fn(*args)`` give one of it.

    Loop bodies are looked into once.  It tells whether a gradient of some weight is made: that has its shape.
    """
    return _product_shapes(_live(fn, *args))


def _product_shapes(jaxpr: Jaxpr) -> Counter[tuple[int, ...]]:
    shapes: Counter[tuple[int, ...]] = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PRODUCT_PRIMITIVES:
            shapes[tuple(eqn.outvars[0].aval.shape)] += 1
        for body in jaxprs_in_params(eqn.params):
            shapes += _product_shapes(_open(body))
    return shapes


def _live(fn: Callable[..., Any], *args: Any) -> Jaxpr:
    """The jaxpr of ``fn(*args)`` without what no output needs."""
    return dce_jaxpr(_open(jax.make_jaxpr(fn)(*args)), True)[0]


def _open(jaxpr: Any) -> Jaxpr:
    """The jaxpr inside a closed one (newer versions of JAX do not tell them apart)."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _count(jaxpr: Jaxpr) -> tuple[Counter[str], set[str]]:
    """FLOPs by primitive, and the names of bodies whose number of runs is unknown."""
    counts: Counter[str] = Counter()
    counted_once: set[str] = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _LEAVES:
            counts[name.removesuffix(_WRAPPER)] += _LEAVES[name](eqn)
            continue
        bodies = [_count(_open(body)) for body in jaxprs_in_params(eqn.params)]
        if name == "cond":
            bodies = [max(bodies, key=lambda body: sum(body[0].values()))]
        runs = _runs(eqn)
        for body, inner in bodies:
            counts.update({key: value * (runs or 1) for key, value in body.items()})
            counted_once |= inner
            if runs is None and body:
                counted_once.add(name)
    return counts, counted_once


def _runs(eqn: JaxprEqn) -> int | None:
    """How often the bodies of a higher-order primitive run; None if the jaxpr does not tell."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        return math.prod(grid) if all(isinstance(size, int) for size in grid) else None
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1 if name == "cond" or name in _CALLS else None


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _conv_general_dilated(eqn: JaxprEqn) -> int:
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = kernel.size // out_features
    return 2 * eqn.outvars[0].aval.size * taps // math.prod(eqn.params["lhs_dilation"])


_PRODUCTS = {"fwd": 2, "bwd": 5}
"""Matrix products of fused attention: QK and PV; QK once more, then those of dP, dQ, dK and dV."""
_WRAPPER = "_wrapper"  # the primitive that cuDNN's call is bound as, which lowers to the bare one


def _cudnn_attention(eqn: JaxprEqn) -> int:
    query, key = (variable.aval.shape for variable in eqn.invars[:2])
    length = key[1 if eqn.params["layout"] == 0 else 2]  # 0: [b t h d], 1: [b h t d]
    direction = eqn.primitive.name.removesuffix(_WRAPPER)[-3:]
    return 2 * _PRODUCTS[direction] * math.prod(query) * length


_PRODUCT_PRIMITIVES = ("dot_general", "conv_general_dilated")
_LEAVES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    **{
        f"dot_product_attention_{direction}{end}": _cudnn_attention
        for direction in _PRODUCTS
        for end in ("", _WRAPPER)
    },
}
