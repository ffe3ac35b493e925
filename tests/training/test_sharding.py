"""Meshes of eight devices: the losses and gradients of one, and every parameter where it is said to lie."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.config import get_config, use_shapes_backbones, validate
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.planning import hlo
from minigpt5_jax.training import sharding
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.sharding import Layout, batch_shardings, lay_out, make_mesh, state_shardings
from minigpt5_jax.training.state import TrainState, init_state
from minigpt5_jax.training.step import StepOptions, make_train_step, shards_apart
from minigpt5_jax.training.tuning import FROZEN, label_parameters
from minigpt5_jax.wiring.model import build, parameter_layout

MICRO = 2  # micro-batches of an update


class Stage(NamedTuple):
    """A stage's step, and what one device makes of it."""

    name: str
    template: Template
    labels: dict[str, str]
    optimizer: Any
    params: dict[str, jax.Array]
    batch: Batch
    loss: float
    gradients: dict[str, np.ndarray]


def seeing_batch() -> Batch:
    """Rows that read an image, then write one (every fourth writes none)."""
    batch, random = tiny.make_tiny_batch(16), np.random.default_rng(1)
    behind = {"tokens": 3, "labels": -100, "segment_ids": 1}  # what stands before the text: an image
    shifted = {
        name: np.pad(getattr(batch, name), ((0, 0), (5, 0)), constant_values=value)
        for name, value in behind.items()
    }
    return dataclasses.replace(
        batch,
        positions=np.broadcast_to(np.arange(29, dtype=np.int32), (16, 29)),
        label_positions=np.where(batch.label_positions > 0, batch.label_positions + 5, 0),
        voken_start=batch.voken_start + 5,
        images=random.integers(0, 256, (16, 28, 28, 3)).astype(np.uint8),
        image_row=np.arange(16, dtype=np.int32),
        image_start=np.full(16, 1, np.int32),
        image_mask=np.arange(16) % 5 != 0,
        item_mask=np.arange(16) % 4 != 0,
        **shifted,
    )


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """Those of the first step, from AdamW's first moments."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if ".mu" in jax.tree_util.keystr(path):
            found[names[-1]] = np.asarray(leaf) / (1 - 0.9)
    return found


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """Those that were made: a stage's step on one device is compiled once."""
    return {}


@pytest.fixture
def stage(request, stages) -> Stage:
    name = request.param
    if name not in stages:
        stages[name] = make_stage(name)
    return stages[name]


def make_stage(name: str) -> Stage:
    template = tiny.make_tiny_template(sees=name == "stage2")
    labels = label_parameters(template.shapes, tiny.rules(name))
    optimizer = make_optimizer(
        labels, {group: optax.constant_schedule(1e-3) for group in set(labels.values()) - {FROZEN}}
    )
    params = tiny.make_tiny_params(template)
    batch = seeing_batch() if name == "stage2" else tiny.make_tiny_batch(16)
    step = jax.jit(make_train_step(template, labels, optimizer, StepOptions(LossOptions(), cfg_dropout=0.3)))
    trainable, frozen = split(params, labels)
    state, metrics = step(init_state(trainable, labels, optimizer, 0), frozen, batch)
    return Stage(name, template, labels, optimizer, params, batch, float(metrics["loss"]), gradients(state))


def split(params, labels):
    trainable = {path: value for path, value in params.items() if labels[path] != FROZEN}
    return trainable, {path: value for path, value in params.items() if labels[path] == FROZEN}


def micro_batches(batch: Batch) -> Batch:
    """The rows in micro-batches; indices count from each one's first row."""
    count = batch.tokens.shape[0] // MICRO
    stacked = jax.tree.map(lambda x: x.reshape(MICRO, x.shape[0] // MICRO, *x.shape[1:]), batch)
    return dataclasses.replace(
        stacked, voken_row=stacked.voken_row % count, image_row=stacked.image_row % count
    )


class Mesh(NamedTuple):
    """A mesh and how parameters lie on it: what is expected, in figures."""

    shape: tuple[int, int, int]
    frozen: str
    query: P  # of the language model's query kernels [layers, in, heads x width]
    convolution: P  # of the generator's first kernel [3, 3, in, out]
    mlp: P  # of the mapper's MLP kernels [layers, in, out], which train
    frozen_bytes: dict[str, int]  # on a device
    trainable_bytes: dict[str, int]  # the same; each of AdamW's two moments has as many


WHOLE = P(None, None, None)
MESHES = {
    "data": Mesh(
        (8, 1, 1),
        "tensor",
        WHOLE,
        P(None, None, None, None),
        P(None, None, "data"),
        {"stage1": 415_404, "stage2": 992_412},
        {"stage1": 19_456, "stage2": 18_688},
    ),
    "fsdp": Mesh(
        (4, 2, 1),
        "fsdp",
        P(None, "fsdp", None),
        P(None, None, None, "fsdp"),
        P(None, None, ("data", "fsdp")),
        {"stage1": 220_716, "stage2": 517_468},
        {"stage1": 19_456, "stage2": 18_688},
    ),
    "tensor": Mesh(
        (2, 2, 2),
        "tensor",
        P(None, None, "tensor"),
        P(None, None, None, None),
        P(None, None, ("data", "fsdp")),
        {"stage1": 372_396, "stage2": 949_404},
        {"stage1": 30_720, "stage2": 28_416},
    ),
    "replicated": Mesh(
        (2, 2, 2),
        "replicated",
        WHOLE,
        P(None, None, None, None),
        P(None, None, ("data", "fsdp")),
        {"stage1": 415_404, "stage2": 992_412},
        {"stage1": 30_720, "stage2": 28_928},
    ),
    "tensor alone": Mesh(
        (1, 1, 8),
        "tensor",
        P(None, None, "tensor"),
        P(None, None, None, None),
        WHOLE,
        {"stage1": 340_140, "stage2": 917_148},
        {"stage1": 98_304, "stage2": 89_472},
    ),
}
QUERY = "backbone/llm/layers/self_attn/q_proj/kernel"
CONVOLUTION = "generator/unet/conv_in/kernel"
MLP = "mapper/decoder/layers/feed_forward/linear1/kernel"
SLOW = [
    pytest.param(stage, mesh, marks=pytest.mark.slow)
    for stage in ("stage1", "stage2")
    for mesh in MESHES
    if (stage, mesh) not in (("stage1", "data"), ("stage2", "tensor"))
]


@pytest.mark.parametrize("stage, mesh", [("stage1", "data"), ("stage2", "tensor"), *SLOW], indirect=["stage"])
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(stage, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 512)
    expected = MESHES[mesh]
    mesh, template = make_mesh(*expected.shape), stage.template
    layout = lay_out(
        template.shapes,
        template.axes,
        tiny.trainable_paths(stage.labels),
        mesh,
        tiny.sharding(),
        frozen=expected.frozen,
    )
    trainable, frozen = split(jax.device_put(stage.params, layout.stored), stage.labels)
    state = init_state(trainable, stage.labels, stage.optimizer, 0)
    places = state_shardings(state, layout.stored, mesh)
    state, batch = jax.device_put(state, places), micro_batches(stage.batch)
    batch = jax.device_put(batch, batch_shardings(batch, mesh, MICRO))
    options = StepOptions(LossOptions(), cfg_dropout=0.3, accumulation=MICRO)
    step = make_train_step(template, stage.labels, stage.optimizer, options, layout=layout)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, out_shardings=(places, None)).lower(state, frozen, batch).compile()
        after, metrics = compiled(state, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], stage.loss, rtol=1e-5)
    assert_close(gradients(after), stage.gradients)

    taken = compiled.input_shardings[0][1]
    assert (taken[QUERY].spec, taken[CONVOLUTION].spec) == (expected.query, expected.convolution)
    assert bytes_on_a_device(frozen) == expected.frozen_bytes[stage.name]
    assert after.trainable[MLP].sharding.spec == expected.mlp
    size = expected.trainable_bytes[stage.name]
    assert bytes_on_a_device(after.trainable) == size
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert bytes_on_a_device(moments) == 2 * size
    # Eight items, and images that are read, of a micro-batch: a device has one in every convolution.
    rows = re.findall(r"= f32\[(\d+),\d+,\d+,\d+\]\S* convolution\(", compiled.as_text())
    assert rows and (expected.frozen == "fsdp" or set(rows) == {"1"})
    check_collectives(hlo.collectives(hlo.read(compiled.as_text()), 8), layout, after.trainable)


def bytes_on_a_device(tree: Any) -> int:
    """Of arrays, on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def check_collectives(traffic: dict[str, hlo.Traffic], layout: Layout, trainable: Any) -> None:
    """What is stored in parts is gathered once, its gradients summed once, with two micro-batches too."""
    spread = [path for path in trainable if layout.stored[path] != layout.used[path]]
    parts = bytes_on_a_device([trainable[path] for path in spread])
    assert traffic.get("reduce-scatter", hlo.Traffic()).result == parts
    if layout.mesh.size == layout.shards and layout.mesh.shape["fsdp"] == 1:
        assert traffic["all-gather"].result == parts * layout.shards
        whole = sum(value.nbytes for path, value in trainable.items() if path not in spread)
        # The rest of the gradients, and a few numbers.
        assert whole <= traffic["all-reduce"].result <= whole + 400


def test_trainables_travel_in_the_dtype_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 64)
    mesh, names = make_mesh(4, 2, 1), ("matrix", "row")
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in zip(names, ((16, 8), (8,)))}
    layout = lay_out(shapes, {"matrix": (None, None), "row": (None,)}, names, mesh, dtype=jnp.bfloat16)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape.shape).astype(np.float32) for name, shape in shapes.items()}
    gathered = jax.jit(layout.gather)(jax.device_put(values, layout.stored))
    rounded = np.asarray(jnp.asarray(values["matrix"], jnp.bfloat16), np.float32)
    assert (np.asarray(gathered["matrix"]) == rounded).all() and (gathered["row"] == values["row"]).all()
    parts = {
        name: random.standard_normal((8, *shape.shape)).astype(np.float32) for name, shape in shapes.items()
    }
    reduced = jax.jit(layout.reduce)(parts)
    assert reduced["matrix"].sharding.is_equivalent_to(layout.stored["matrix"], 2)
    assert layout.stored["matrix"].spec == P(("data", "fsdp"), None)
    np.testing.assert_allclose(reduced["row"], parts["row"].sum(0), rtol=1e-5)
    np.testing.assert_allclose(reduced["matrix"], parts["matrix"].sum(0), atol=0.1)
    traced = str(jax.make_jaxpr(layout.gather)(values)), str(jax.make_jaxpr(layout.reduce)(parts))
    assert "bf16[16,8] = all_gather" in traced[0] and "bf16[2,8] = reduce_scatter" in traced[1]
    assert "f32[8] = psum" in traced[1]


def test_stacked_vectors_are_no_matrices(monkeypatch):
    """However many layers have one: scales stay whole, and in fp32 on their way."""
    monkeypatch.setattr(sharding, "LARGE", 64)
    axes = {"scale": ("layers", None), "small": ("layers", None, None), "kernel": ("layers", None, None)}
    sizes = {"scale": (8, 128), "small": (8, 4, 8), "kernel": (8, 8, 8)}
    shapes = {name: jax.ShapeDtypeStruct(size, np.float32) for name, size in sizes.items()}
    layout = lay_out(shapes, axes, axes, make_mesh(8, 1, 1))
    assert {name for name in axes if layout.stored[name] != layout.used[name]} == {"kernel"}


@pytest.mark.parametrize(
    "key, value, stored, dtype",
    [
        ("exchange", "model", None, jnp.bfloat16),
        ("exchange", "float32", None, jnp.float32),
        ("frozen", "tensor", P(None, None, "tensor"), jnp.bfloat16),
        ("frozen", "replicated", P(None, None, None), jnp.bfloat16),
        ("frozen", "fsdp", P(None, "fsdp", "tensor"), jnp.bfloat16),
    ],
)
def test_the_layout_is_as_the_configuration_says(small_world, monkeypatch, key, value, stored, dtype):
    monkeypatch.setattr(sharding, "LARGE", 64)
    config = small_world[0].copy_and_resolve_references()
    config.model.dtype = "bfloat16"
    config.mesh.update({key: value})
    layout = parameter_layout(config, small_world[1], make_mesh(2, 2, 2))
    assert layout.dtype == dtype and stored in (None, layout.stored[QUERY].spec)


@pytest.fixture(scope="module")
def small_world():
    """(configuration, model) of the small world."""
    config = use_shapes_backbones(get_config())
    return config, build(validate(config))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1"], indirect=True)
def test_one_device_rounds_nothing(stage, monkeypatch):
    """Nothing travels there, whatever the dtype for it: bit by bit the step without a layout."""
    monkeypatch.setattr(sharding, "LARGE", 64)
    mesh, template, paths = (
        make_mesh(devices=jax.devices()[:1]),
        stage.template,
        tiny.trainable_paths(stage.labels),
    )
    layout = lay_out(template.shapes, template.axes, paths, mesh, tiny.sharding(), dtype=jnp.bfloat16)
    trainable, frozen = split(stage.params, stage.labels)
    options = StepOptions(LossOptions(), cfg_dropout=0.3)
    step = make_train_step(template, stage.labels, stage.optimizer, options, layout=layout)
    with jax.set_mesh(mesh):
        state, metrics = jax.jit(step)(
            init_state(trainable, stage.labels, stage.optimizer, 0), frozen, stage.batch
        )
    assert float(metrics["loss"]) == stage.loss
    for path, value in gradients(state).items():
        assert (value == stage.gradients[path]).all(), path


def test_indices_of_a_shard_count_from_its_first_row():
    batch = dataclasses.replace(
        seeing_batch(), image_index=np.arange(16)[::-1].copy(), before=None, subtree_end=None
    )
    draws = StepRandomness(*(np.arange(16),) * 4)
    apart, own = shards_apart(batch, draws, 4, 0)
    assert apart.tokens.shape == (4, 4, 29) and (own.noise == np.arange(16).reshape(4, 4)).all()
    assert (apart.voken_row == np.arange(4)).all() and (apart.image_row == np.arange(4)).all()
    assert (apart.image_index == np.arange(4)[::-1]).all()
    lines = dataclasses.replace(batch, prompt_end=np.ones(16, np.int32), tokens=batch.tokens[:8])
    assert (shards_apart(lines, draws, 4, 0)[0].voken_row == np.arange(4)).all()


def assert_close(got, want, tolerance=1e-5):
    largest = max(np.abs(value).max() for value in want.values())
    assert got.keys() == want.keys()
    for path in want:
        # A key's bias has no gradient (softmax ignores a shift of all keys): what is there is rounding.
        scale = largest if path.endswith("k_proj/bias") else np.abs(want[path]).max()
        error = np.abs(got[path] - want[path]).max()
        assert error <= tolerance * scale, f"{path}: {error / scale:.1e}"
