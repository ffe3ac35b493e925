"""The FLOP counter on functions whose count is known by hand."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from minigpt5_jax.models.attention import attention
from minigpt5_jax.training.flops import FlopCount, count_flops, product_shapes


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = spec(3, 5), spec(5, 5)
MATMUL = 2 * 3 * 5 * 5


def test_matmul_and_batched_contraction():
    assert count_flops(jnp.dot, X, W) == FlopCount(MATMUL, {"dot_general": MATMUL})
    attention = count_flops(
        lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k), spec(2, 7, 4, 8), spec(2, 9, 4, 8)
    )
    assert attention.total == 2 * 2 * 4 * 7 * 9 * 8
    assert count_flops(jnp.sin, X) == FlopCount(0, {})


def conv(x, w, stride=2, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        ((1, 1), (1, 1)),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_convolution_and_both_its_gradients():
    x, w = spec(2, 8, 8, 6), spec(3, 3, 6, 10)
    forward = 2 * (2 * 4 * 4 * 10) * (3 * 3 * 6)
    assert count_flops(conv, x, w).by_primitive == {"conv_general_dilated": forward}
    assert count_flops(lambda x, w: conv(x, w, groups=3), x, spec(3, 3, 2, 9)).total == forward * 9 // 30

    # Every tap of the forward pass is one of each backward pass; zeros of the dilation do not count.
    def loss(x, w):
        return conv(x, w).sum()

    assert count_flops(jax.grad(loss, argnums=0), x, w).total == forward
    assert count_flops(jax.grad(loss, argnums=1), x, w).total == forward


def test_loops_multiply_and_unknown_ones_are_named():
    def scanned(x, ws):
        def outer(x, w):
            return jax.lax.scan(lambda y, _: (y @ w, None), x, None, 4)[0], None

        return jax.lax.scan(outer, x, ws)

    assert count_flops(scanned, X, spec(7, 5, 5)).total == 7 * 4 * MATMUL

    def looped(x, w):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ w), (0, x))

    count = count_flops(looped, X, W)
    assert count.total == MATMUL and count.counted_once == ("while",)
    harmless = count_flops(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.sin, x), X)
    assert harmless == FlopCount(0, {})


def test_the_dearest_branch_counts():
    def branched(i, x, w):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w], x)

    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert count_flops(branched, index, X, W) == FlopCount(2 * MATMUL, {"dot_general": 2 * MATMUL})


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, jnp.zeros_like(w)))


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))],
    ids=["jit", "remat", "nested"],
)
def test_calls_are_looked_into(wrap):
    assert count_flops(wrap(lambda x, w: custom(x @ w, w)), X, W).total == 2 * MATMUL


def test_dead_code_is_not_counted_even_inside_calls_and_scans():
    @jax.jit
    def two(x, w):
        return x @ w, x @ w @ w

    assert count_flops(lambda x, w: two(x, w)[0], X, W).total == MATMUL

    def body(carry, w):
        live, dead = carry
        return (live @ w, dead @ w), dead @ w

    def scanned(x, ws):
        return jax.lax.scan(body, (x, x), ws)[0][0]

    assert count_flops(scanned, X, spec(6, 5, 5)).total == 6 * MATMUL


def test_backward_through_frozen_weights_costs_activations_only():
    def loss(trained, frozen, x):
        return jnp.sum((x @ trained) @ frozen @ frozen)

    forward = count_flops(loss, W, W, X).total
    assert forward == 3 * MATMUL
    # Linear in x: only the products needed for the gradient stay after dead-code elimination.
    assert count_flops(jax.grad(loss), W, W, X).total == 3 * MATMUL
    assert count_flops(jax.value_and_grad(loss), W, W, X).total == 6 * MATMUL
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), W, W, X).total == 8 * MATMUL


def test_shapes_of_products_tell_which_gradients_are_made():
    def loss(trained, frozen, x):
        return jax.lax.scan(lambda y, w: (jnp.sin(y @ w), None), x @ trained, frozen)[0].sum()

    trained, frozen = spec(5, 7), spec(4, 7, 7)
    assert product_shapes(loss, trained, frozen, X) == {(3, 7): 2}
    made = product_shapes(jax.grad(loss, (0, 1)), trained, frozen, X)
    assert (made[5, 7] + made[7, 5], made[7, 7]) == (1, 1)  # the way it lies is JAX's choice
    assert product_shapes(jax.grad(loss), trained, frozen, X)[7, 7] == 0


def test_remat_recomputes():
    def loss(w, x, wrap):
        def block(x):
            return jnp.sin(x @ w)

        return jnp.sum(wrap(block)(x))

    plain = count_flops(jax.value_and_grad(lambda w, x: loss(w, x, lambda f: f)), W, X).total
    rematted = count_flops(jax.value_and_grad(lambda w, x: loss(w, x, jax.checkpoint)), W, X).total
    assert (plain, rematted) == (2 * MATMUL, 3 * MATMUL)


def test_sharded_bodies_count_on_every_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = spec(8, 6), spec(6, 10)
    split = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(P("data"), P(None, "tensor")), out_specs=P("data", "tensor")
    )
    assert count_flops(split, x, w).total == count_flops(jnp.dot, x, w).total
    repeated = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count_flops(repeated, x, w).total == 2 * count_flops(jnp.dot, x, w).total


# ------------------------------------------------------------------------------------ fused attention

B, T, H, D = 2, 512, 4, 64
PRODUCT = 2 * B * H * T * T * D  # one matrix product over all pairs of query and key


def attend(implementation):
    heads = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)

    def forward(q, k, v):
        return attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

    both = jax.value_and_grad(forward, (0, 1, 2))
    return count_flops(forward, heads, heads, heads), count_flops(both, heads, heads, heads)


@pytest.fixture
def cudnn_traces(monkeypatch):
    """Let cuDNN's attention be traced on a machine without it, as if for a recent GPU."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)


def test_cudnns_attention_counts_and_its_backward_recomputes(cudnn_traces):
    forward, both = attend("cudnn")
    assert forward == FlopCount(2 * PRODUCT, {"dot_product_attention_fwd": 2 * PRODUCT})
    assert both.by_primitive == {
        "dot_product_attention_fwd": 2 * PRODUCT,
        "dot_product_attention_bwd": 5 * PRODUCT,
    }
    # The same work as the blocks that run where there is no such kernel.
    assert [count.total for count in attend("blockwise")] == [forward.total, both.total]


def test_cudnns_other_layout_and_fewer_keys(cudnn_traces):
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    query, key = (jax.ShapeDtypeStruct((B, H, n, D), jnp.bfloat16) for n in (T, 128))
    count = count_flops(
        lambda q, k, v: fused.dot_product_attention(q, k, v, qkv_layout="BNTH"), query, key, key
    )
    assert count.total == 2 * PRODUCT * 128 // T


def test_pallas_kernels_count_their_grid():
    forward, both = attend("splash")
    assert forward == FlopCount(2 * PRODUCT, {"dot_general": 2 * PRODUCT})
    # Two kernels, for keys and values and for queries, each of which makes QK and dP; and <dO, O>.
    assert (
        both.by_primitive == {"dot_general": (2 + 4 + 3) * PRODUCT + PRODUCT // T} and not both.counted_once
    )


def test_a_pallas_grid_known_only_when_it_runs_is_named():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def call(n, x, w):
        return pl.pallas_call(kernel, out_shape=spec(3, 5), grid=(n,))(x, w)

    count = count_flops(call, jax.ShapeDtypeStruct((), jnp.int32), X, W)
    assert count.total == MATMUL and count.counted_once == ("pallas_call",)
