"""Every implementation of attention computes what the plain form does, gradients too."""

import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.models import attention as module
from minigpt5_jax.models.attention import BLOCK, attention, choose
from minigpt5_jax.models.mesh import SHARD_AXES, SHARDS
from minigpt5_jax.training.sharding import make_mesh

WORKER = Path(__file__).with_name("fused_worker.py")
SEGMENTS = jnp.asarray([[1] * 60 + [2] * 110 + [0] * 37] * 2)


def random_mask(shape: tuple[int, ...]) -> jax.Array:
    """Half of the keys, and for the eighth query none."""
    mask = np.random.default_rng(1).random(shape) < 0.5
    if shape[2] > 1:
        mask[:, :, 7] = False
    return jnp.asarray(mask)


# Two trees in depth-first order, the second one filled up with padding.
ENDS = np.zeros((2, 207), np.int32)
ENDS[0, :60] = 207
ENDS[0, 60:130], ENDS[0, 130:] = 130, 207
ENDS[1, :20], ENDS[1, 20:150], ENDS[1, 150:180] = 180, 150, 180


CASES = {  # name -> (queries, keys, heads, heads of keys, options)
    "odd length": (207, 207, 1, 1, {"scale": 0.5}),
    "cross": (230, 77, 2, 2, {}),
    "segments, grouped heads": (207, 207, 2, 1, {"is_causal": True, "segment_ids": SEGMENTS}),
    "trees, grouped heads": (207, 207, 2, 1, {"subtree_ends": jnp.asarray(ENDS)}),
    "causal": (207, 207, 1, 1, {"is_causal": True}),
    "mask with an empty row": (260, 80, 2, 2, {"mask": random_mask((2, 1, 260, 80))}),
    "mask of keys": (260, 80, 1, 1, {"mask": random_mask((1, 1, 1, 80))}),
    "mask and causal": (150, 150, 2, 2, {"mask": random_mask((2, 2, 150, 150)), "is_causal": True}),
}
SPLASH = ("odd length", "cross", "segments, grouped heads")


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """The Pallas kernels run on this CPU."""
    monkeypatch.setattr(module, "INTERPRET", True)


@functools.cache
def run(name: str, implementation: str, dtype=jnp.float32):
    """(output, gradients of queries, keys and values) of a case."""
    t, s, heads, kv_heads, options = CASES[name]
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((2, n, h, 16)) for n, h in ((t, heads), (s, kv_heads), (s, kv_heads))]
    weight = random.standard_normal((2, t, heads * 16))
    if "segment_ids" in options:  # what padding attends to means nothing
        weight = weight * (options["segment_ids"] > 0)[..., None]
    if "subtree_ends" in options:
        weight = weight * (options["subtree_ends"] > 0)[..., None]

    def loss(*arrays):
        out = attention(*arrays, implementation=implementation, **options).astype(jnp.float32)
        return (out * weight).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        *(jnp.asarray(x, dtype) for x in arrays)
    )
    return out * (weight != 0), gradients


def worst(got, want) -> float:
    """Largest relative error of arrays, to the largest entry of each."""
    return max(
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )


@pytest.mark.parametrize(
    "name, implementation",
    [(name, "blockwise") for name in CASES] + [(name, "splash") for name in SPLASH],
)
def test_the_plain_form_and_its_gradients(name, implementation):
    got, want = run(name, implementation), run(name, "plain")
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got))
    assert worst(got, want) < 1e-5


def test_half_precision_stays_near_full():
    assert worst(run("odd length", "blockwise", jnp.bfloat16), run("odd length", "plain")) < 0.03


def test_a_tree_is_its_sequences():
    """Each path of a tree attends as it does alone; another implementation than blocks takes the mask."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((1, 207, 2, 8)), jnp.float32) for _ in range(3)]
    whole = attention(*arrays, subtree_ends=jnp.asarray(ENDS[:1]), implementation="splash")
    for path in (np.r_[0:130], np.r_[0:60, 130:207]):
        alone = attention(*(x[:, path] for x in arrays), is_causal=True, implementation="plain")
        np.testing.assert_allclose(whole[:, path], alone, atol=1e-5)


@pytest.mark.parametrize("implementation, layout", [("blockwise", "items"), ("splash", "rows")])
def test_a_mesh_changes_nothing(implementation, layout):
    mesh = make_mesh(data=2, fsdp=1, tensor=4)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((8, 140, 4, 8)), jnp.float32) for _ in range(3)]
    place = P(("data", "fsdp"), None, "tensor") if layout == "rows" else P(("data", "fsdp", "tensor"))

    def loss(*arrays, implementation=implementation):
        return jnp.square(attention(*arrays, implementation=implementation, layout=layout)).sum()

    want = jax.jit(jax.value_and_grad(functools.partial(loss, implementation="plain"), (0, 1, 2)))(*arrays)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, place)) for x in arrays]
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*placed)
        assert worst(got, want) < 1e-5
        if implementation == "splash":  # in each shard of a train step
            apart = [x.reshape(2, 4, *x.shape[1:]) for x in placed]
            shards = jax.vmap(
                jax.value_and_grad(loss, (0, 1, 2)), axis_name=SHARDS, spmd_axis_name=SHARD_AXES
            )
            losses, gradients = jax.jit(shards)(*apart)
            assert worst((losses.sum(), [g.reshape(8, *g.shape[2:]) for g in gradients]), want) < 1e-5


def test_logits_are_never_written_whole():
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)

    def temporaries(implementation: str) -> int:
        step = jax.grad(lambda *x: attention(*x, implementation=implementation).sum(), (0, 1, 2))
        return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 2048**2
    assert temporaries("plain") >= logits
    assert temporaries("blockwise") < logits / 2


def test_the_choice_goes_by_platform_and_shape(monkeypatch):
    def of(t, s, d=64, dtype=jnp.bfloat16, mask=None, implementation="auto"):
        shape = [jax.ShapeDtypeStruct((2, n, 4, d), dtype) for n in (t, s)]
        return choose(*shape, mask, implementation)

    assert of(4096, 4096) == "blockwise"
    assert of(BLOCK, BLOCK) == of(1, 512) == "plain"
    assert of(4096, 4096, implementation="plain") == "plain"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(compute_capability="7.5")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert of(4096, 4096) == "blockwise"  # too old for cuDNN's kernels
    device.compute_capability = "9.0"
    assert of(4096, 4096) == of(4096, 77) == "cudnn"
    assert of(4096, 4096, dtype=jnp.float32) == of(4096, 4096, d=512) == "blockwise"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert of(4096, 4096) == "splash"
    assert of(4096, 4096, mask=jnp.ones((1, 1, 1, 4096), bool)) == "blockwise"
    with pytest.raises(ValueError, match="attention 'flash' is not one of auto, cudnn"):
        of(64, 64, implementation="flash")


@pytest.mark.slow
@pytest.mark.parametrize(
    "platform, module_name, package, calls",
    [
        ("cuda", "jax_cuda13_plugin", "jax[cuda13]", ("fmhaSoftmax", "fmhaSoftmaxBackward")),
        ("tpu", "libtpu", "jax[tpu]", ("tpu_custom_call",)),
    ],
)
def test_a_step_compiled_for_an_accelerator_holds_fused_calls(platform, module_name, package, calls):
    pytest.importorskip(module_name, reason=f"{module_name} is not installed; pip install '{package}'")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, str(WORKER), platform], capture_output=True, text=True, env=environment, timeout=580
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(call in done.stdout for call in calls), done.stdout
