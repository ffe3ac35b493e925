"""Multi-head attention of every tower; its logits are never written whole.

One function, :func:`attention`, with four implementations of the same mathematics:

* ``cudnn``: the fused kernels of cuDNN (NVIDIA GPUs, 16-bit inputs);
* ``splash``: the Pallas kernels of JAX for TPUs;
* ``blockwise``: a loop over blocks of queries whose backward pass computes the blocks again, on anything;
* ``plain``: all logits at once, for short sequences and as the reference of the others.

``auto`` takes the first that suits platform, dtype and shape (:func:`choose`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from minigpt5_jax.models.mesh import LAYOUTS, batch_axes

IMPLEMENTATIONS = ("auto", "cudnn", "splash", "blockwise", "plain")
BLOCK = 128
"""Queries of a block: their logits over all keys stay in a core's cache."""

MAX_TILE = 512  # queries and keys of a splash tile
LANES = 128  # of a TPU's vector unit: splash takes lengths in multiples of them
MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: a row without any allowed key stays finite
INTERPRET = False  # tests run the Pallas kernels on a CPU


class AttentionModule(nnx.Module):
    """Base of every module that attends.

    Attributes:
      implementation: one of :data:`IMPLEMENTATIONS`; ``Template.of(..., implementation=...)`` sets it in
        every module of a model.
      layout: key of :data:`minigpt5_jax.models.mesh.LAYOUTS`.
    """

    implementation, layout = "auto", "items"

    def attend(
        self,
        query: Float[Array, "b t w"],
        key: Float[Array, "b s w"],
        value: Float[Array, "b s w"],
        num_heads: int,
        **kwargs: Any,
    ) -> Float[Array, "b t w"]:
        """:func:`attention` of projections ``[b, t, heads * d]``."""
        heads = (split_heads(x, num_heads) for x in (query, key, value))
        return self.attention(*heads, **kwargs)

    def attention(self, query: jax.Array, key: jax.Array, value: jax.Array, **kwargs: Any) -> jax.Array:
        """:func:`attention` of heads, with this module's implementation and layout."""
        return attention(query, key, value, implementation=self.implementation, layout=self.layout, **kwargs)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """``[b, t, heads * d] -> [b, t, heads, d]``."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    *,
    mask: Bool[Array, "#b #h #t s"] | None = None,
    is_causal: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    subtree_ends: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    layout: str = "items",
) -> Float[Array, "b t w"]:
    """Multi-head attention, ``[b, t, heads, d]`` in, ``[b, t, heads * d]`` out.

    Softmax runs in fp32 whatever the input dtype.  Keys and values may have fewer heads than queries
    (grouped-query attention).  A query that may attend to nothing gets a finite value that means nothing.

    Args:
      mask: True where attention is allowed.
      is_causal: query i sees keys 0 to i only.
      segment_ids: of queries and keys alike (self-attention): attention stays inside a segment, and nothing
        attends to segment 0 (padding).
      subtree_ends: of keys, in rows that hold a tree with its nodes in depth-first order (self-attention):
        the place after each node's last descendant.  Query i sees key j where j <= i < subtree_ends[j], its
        ancestors and itself; 0 hides a key (padding).  ``blockwise`` makes the mask of a block when it gets
        there, ``plain`` and ``cudnn`` make it whole, as a bias of logits (2 bytes a pair, once for all
        layers); ``splash`` knows no masks that come with the data, and ``blockwise`` stands in for it.
      scale: of the logits; ``d ** -0.5`` by default.
      implementation: one of :data:`IMPLEMENTATIONS`.
      layout: key of :data:`minigpt5_jax.models.mesh.LAYOUTS`; where a kernel must be told what a device has.

    Raises:
      ValueError: an unknown implementation.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(query, key, mask if subtree_ends is None else subtree_ends, implementation)
    if chosen in ("splash", "blockwise") and key.shape[2] != query.shape[2]:
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    if chosen == "splash":
        out = _splash(query, key, value, is_causal, segment_ids, scale, layout)
    else:
        if segment_ids is not None:
            mask = _both(mask, inside_segments(segment_ids))
        if subtree_ends is not None and chosen != "blockwise":
            mask = _both(mask, inside_subtrees(subtree_ends))
        if chosen == "blockwise":
            out = _blockwise(query, key, value, mask, subtree_ends, is_causal, scale)
        elif chosen == "cudnn":
            out = _cudnn(query, key, value, mask, is_causal, scale)
        else:
            out = jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=is_causal, scale=scale, implementation="xla"
            )
    return out.reshape(*out.shape[:-2], -1)


def choose(query: Any, key: Any, mask: Any, implementation: str) -> str:
    """The implementation that attends: the one asked for where it takes these inputs, else ``blockwise``.

    ``auto`` asks for that of the platform JAX runs on; who compiles for another platform names its own.
    Small logits (``BLOCK`` squared) are ``plain`` whatever is asked for.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = _of_platform()
    if query.shape[1] * key.shape[1] <= BLOCK**2:
        return "plain"
    if implementation == "cudnn":
        narrow = query.dtype in (jnp.bfloat16, jnp.float16)
        return "cudnn" if narrow and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 else "blockwise"
    return "blockwise" if implementation == "splash" and mask is not None else implementation


def _of_platform() -> str:
    """The implementation of the platform JAX runs on; cuDNN's needs an NVIDIA GPU of 2020 (8.0) or newer."""
    if jax.default_backend() == "tpu":
        return "splash"
    if jax.default_backend() == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
        major = capability.partition(".")[0]
        if major.isdigit() and int(major) >= 8:
            return "cudnn"
    return "blockwise"


def inside_segments(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b 1 t t"]:
    """The mask that keeps attention inside a segment and off segment 0."""
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
    return same[:, None]


def inside_subtrees(ends: Int[Array, "b t"]) -> Bool[Array, "b 1 t t"]:
    """The mask that lets a node of a tree in depth-first order see its ancestors and itself."""
    places = jnp.arange(ends.shape[1])
    return (_descendants(places[:, None], ends) & (places <= places[:, None]))[:, None]


def _descendants(places: jax.Array, ends: jax.Array) -> jax.Array:
    """``[b q s]``: query at ``places`` ``[q 1]`` stands before the end of a key's subtree."""
    return places < ends[:, None, :]


def _both(mask: Any, other: jax.Array) -> jax.Array:
    return other if mask is None else mask & other


# ---------------------------------------------------------------------------------------------
# Blocks of queries


FP32 = {"preferred_element_type": jnp.float32}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(
    query: Any, key: Any, value: Any, mask: Any, ends: Any, is_causal: bool, scale: float
) -> jax.Array:
    """Attention block by block, ``[b, t, h, d]`` throughout; the backward pass computes blocks again."""
    return _blockwise_forward(query, key, value, mask, ends, is_causal, scale)[0]


def _blockwise_forward(
    query: Any, key: Any, value: Any, mask: Any, ends: Any, is_causal: bool, scale: float
) -> tuple[jax.Array, Any]:
    keys, values = _heads_first(key), _heads_first(value)

    def block(_: None, inputs: Any) -> tuple[None, Any]:
        q, mask, first = inputs
        allowed = _allowed(mask, ends, first, (q.shape[2], keys.shape[2]), is_causal)
        logits = _logits(q, keys, allowed)
        highest = logits.max(-1, keepdims=True)
        weights = jnp.exp((logits - highest) * scale)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(values.dtype), values, **FP32) / total
        return None, (out.astype(values.dtype), highest, total)

    inputs = _blocks(_heads_first(query)), *_mask_blocks(mask, query.shape[1])
    out, highest, total = (_unblock(x, query.shape[1]) for x in jax.lax.scan(block, None, inputs)[1])
    return _heads_last(out), (query, key, value, mask, ends, out, highest, total)


def _blockwise_backward(is_causal: bool, scale: float, residuals: Any, gradient: jax.Array) -> Any:
    query, key, value, mask, ends, out, highest, total = residuals
    keys, values, gradient = (_heads_first(x) for x in (key, value, gradient))
    gradient = gradient.astype(jnp.float32) / total
    slope = (gradient * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def block(sums: Any, inputs: Any) -> tuple[Any, jax.Array]:
        q, g, peak, slope, (mask, first) = inputs
        allowed = _allowed(mask, ends, first, (q.shape[2], keys.shape[2]), is_causal)
        weights = jnp.exp((_logits(q, keys, allowed) - peak) * scale)
        narrow = g.astype(values.dtype)
        inner = jnp.einsum("bhqd,bhkd->bhqk", narrow, values, **FP32)
        d_logits = (weights * (inner - slope)).astype(keys.dtype)  # of scaled logits
        if allowed is not None:  # matters where a query may attend to nothing
            d_logits = jnp.where(allowed, d_logits, 0)
        # [d, k]: only the small operand is transposed, which halves the time of this pass on a CPU.
        d_key = jnp.einsum("bhqd,bhqk->bhdk", q, d_logits, **FP32)
        d_value = jnp.einsum("bhqd,bhqk->bhdk", narrow, weights.astype(values.dtype), **FP32)
        d_query = jnp.einsum("bhqk,bhkd->bhqd", d_logits, keys, **FP32) * scale
        return (sums[0] + d_key, sums[1] + d_value), d_query.astype(query.dtype)

    zeros = jnp.zeros((*keys.shape[:2], keys.shape[3], keys.shape[2]), jnp.float32)
    per_query = (_blocks(x) for x in (_heads_first(query), gradient, highest, slope))
    inputs = *per_query, _mask_blocks(mask, query.shape[1])
    (d_key, d_value), d_query = jax.lax.scan(block, (zeros, zeros), inputs)
    d_key, d_value = (
        x.transpose(0, 3, 1, 2).astype(like.dtype) for x, like in ((d_key * scale, key), (d_value, value))
    )
    return _heads_last(_unblock(d_query, query.shape[1])), d_key, d_value, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _logits(query: Any, keys: Any, allowed: Any) -> jax.Array:
    """fp32 logits ``[b h q s]`` of one block, without their scale: it costs nothing where exp is taken."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, keys, **FP32)
    return logits if allowed is None else jnp.where(allowed, logits, MASKED)


def _allowed(
    mask: Any, ends: Any, first: jax.Array, shape: tuple[int, int], is_causal: bool
) -> jax.Array | None:
    """What a block of ``shape`` (queries, keys) whose first query is number ``first`` may attend to."""
    if not is_causal and ends is None:
        return mask
    rows = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    seen = jax.lax.broadcasted_iota(jnp.int32, shape, 1) <= rows
    if ends is not None:
        seen = (seen & _descendants(rows, ends))[:, None]
    return _both(mask, seen)


def _heads_first(x: jax.Array) -> jax.Array:
    """``[b, t, h, d] -> [b, h, t, d]``."""
    return x.transpose(0, 2, 1, 3)


_heads_last = _heads_first  # the same permutation, back


def _blocks(x: jax.Array) -> jax.Array:
    """``[b, h, t, d] -> [n, b, h, BLOCK, d]``, the last block filled with zeros."""
    b, h, t, d = x.shape
    size = min(BLOCK, t)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % size), (0, 0)))
    return jnp.moveaxis(x.reshape(b, h, -1, size, d), 2, 0)


def _unblock(x: jax.Array, length: int) -> jax.Array:
    """``[n, b, h, BLOCK, d] -> [b, h, length, d]``."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :length]


def _mask_blocks(mask: jax.Array | None, length: int) -> tuple[jax.Array | None, jax.Array]:
    """(rows of the mask, number of the first query) of every block."""
    size = min(BLOCK, length)
    firsts = jnp.arange(math.ceil(length / size), dtype=jnp.int32) * size
    if mask is None:
        return None, firsts
    return _blocks(jnp.broadcast_to(mask, (*mask.shape[:2], length, mask.shape[3]))), firsts


# ---------------------------------------------------------------------------------------------
# cuDNN


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Any, is_causal: bool, scale: float
) -> jax.Array:
    """cuDNN's fused attention, ``[b, t, h, d]`` throughout; odd lengths, which it refuses, are filled up."""
    length, total = query.shape[1], key.shape[1]
    lengths = None
    if total % 2:
        if mask is None:
            lengths = jnp.full(query.shape[:1], total, jnp.int32)
        else:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)))
    if length % 2 and mask is not None and mask.shape[2] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=True)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
    )
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :length]


# ---------------------------------------------------------------------------------------------
# Pallas kernels of TPUs


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_causal: bool,
    segment_ids: jax.Array | None,
    scale: float,
    layout: str,
) -> jax.Array:
    """Splash attention, ``[b, t, h, d]`` throughout, over lengths filled up to whole lanes.

    Under a mesh (``jax.set_mesh``) each device runs the kernel on its part: the compiler cannot split it.
    """
    length = query.shape[1]
    if segment_ids is None:  # what fills the last lanes becomes segment 0, which no other attends to
        segments = [jnp.ones(x.shape[:2], jnp.int32) for x in (query, key)]
    else:
        segments = [segment_ids, segment_ids]
    arrays = [_heads_first(_whole_lanes(x)) for x in (query * scale, key, value)]
    run, segments = functools.partial(_splash_rows, is_causal), [_whole_lanes(x) for x in segments]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        heads, rows = _shard_specs(query.shape[0], query.shape[2], dict(mesh.shape), layout)
        specs = (heads, heads, heads, rows, rows)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return _heads_last(run(*arrays, *segments))[:, :length]


def _splash_rows(
    is_causal: bool, query: jax.Array, key: jax.Array, value: jax.Array, own: jax.Array, other: jax.Array
) -> jax.Array:
    """The kernel on each row: ``[b, h, t, d]`` and ``[b, t]`` in, ``[b, h, t, d]`` out."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = query.shape[2], key.shape[2]
    mask = splash.CausalMask(shape) if is_causal else splash.FullMask(shape)
    size = math.gcd(*shape, MAX_TILE)
    tiles = splash.BlockSizes(*(size,) * 8)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=tiles,
        interpret=jax.default_backend() == "cpu" and INTERPRET,
    )
    return jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=splash.SegmentIds(*ids)))(
        query, key, value, own, other
    )


def _whole_lanes(x: jax.Array) -> jax.Array:
    """``[b, t, ...]`` with zeros up to a multiple of :data:`LANES`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *((0, 0),) * (x.ndim - 2)))


def _shard_specs(batch: int, heads: int, mesh: dict[str, int], layout: str) -> tuple[P, P]:
    """How ``[b, h, ...]`` and ``[b, ...]`` lie on a mesh; what does not divide is on every device."""
    axes, head_axis = batch_axes(layout), LAYOUTS[layout][1]
    rows = axes if axes and batch % math.prod(mesh[axis] for axis in axes) == 0 else None
    split = head_axis is not None and heads % mesh[head_axis] == 0
    return P(rows, head_axis if split else None), P(rows)
