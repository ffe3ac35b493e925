"""Layers are computed again only where a step would not fit otherwise."""

import dataclasses

import jax
import pytest

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.config import ConfigError, get_config, use_shapes_backbones, validate
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.training.tuning import label_parameters
from minigpt5_jax.wiring import memory
from minigpt5_jax.wiring.model import ModelSpec, build, parameter_layout


@pytest.fixture(scope="module")
def run():
    """(configuration, model, layout on one device) of the small world."""
    config = use_shapes_backbones(get_config())
    config.model.remat = "auto"
    spec = build(validate(config))
    return config, spec, parameter_layout(config, spec, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def batch():
    """Shapes of a micro-batch of the tiny model."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.make_tiny_batch(rows=32))


def tiny_spec(spec: ModelSpec, policy: str) -> ModelSpec:
    """The tiny model, whose backward pass is traced in a third of the time."""
    template = tiny.make_tiny_template(remat=policy)
    labels = label_parameters(template.shapes, tiny.rules("stage1"))
    return dataclasses.replace(spec, template=template, labels=labels)


@pytest.fixture(scope="module")
def kept(run, batch):
    """Policy -> bytes that the backward pass reads."""
    return {policy: memory.residual_bytes(tiny_spec(run[1], policy), batch) for policy in memory.POLICIES}


def test_what_the_backward_pass_reads_is_counted(run, batch, kept):
    assert kept["none"] > kept["generator"] > kept["all"] > 0
    assert kept["none"] > kept["backbone"]
    twice = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), batch)
    assert 1.8 < memory.residual_bytes(tiny_spec(run[1], "none"), twice) / kept["none"] <= 2.0


def test_as_little_as_the_device_allows_is_computed_again(run, batch, kept, monkeypatch):
    config, spec, layout = run
    resident = memory.resident_bytes(spec, layout)
    policies = {(False, False): "none", (True, False): "backbone", (False, True): "generator"}

    def counted(tried: ModelSpec, batch: Batch) -> int:
        return kept[policies[tried.made["backbone"]["remat"], tried.made["generator"]["remat"]]]

    monkeypatch.setattr(memory, "residual_bytes", counted)

    def policy(room: float) -> str:
        limit = int((resident + room) / memory.USABLE) + 1
        return memory.fit_memory(config, spec, batch, layout, limit)[1]

    assert policy(kept["none"]) == "none"
    assert policy(0.999 * kept["none"]) in ("backbone", "generator")
    assert policy(0) == "all"
    limit = int((resident + kept["none"]) / memory.USABLE) + 1
    extra = int(0.001 * kept["none"]) + 2
    assert memory.fit_memory(config, spec, batch, layout, limit, extra=extra)[1] != "none"
    assert memory.fit_memory(config, spec, batch, layout) == (spec, "none")  # a CPU tells no limit


def test_a_policy_that_is_said_stays(run, batch):
    config, spec, layout = run
    with config.unlocked():
        said = config.copy_and_resolve_references()
    said.model.remat = "generator"
    assert memory.fit_memory(said, spec, batch, layout, limit=1)[1] == "generator"
    said.model.remat = "some"
    with pytest.raises(ConfigError, match="model.remat='some' is not one of 'auto', 'none', 'backbone'"):
        validate(said)


def test_what_trains_is_counted_where_it_is_used(run, monkeypatch):
    """A tensor axis splits gradients too, and only what is spread besides is gathered."""
    config, spec, _ = run
    monkeypatch.setattr("minigpt5_jax.training.sharding.LARGE", 10**9)
    path = "backbone/llm/layers/self_attn/q_proj/kernel"
    labels = {**dict.fromkeys(spec.labels, "frozen"), path: "llm"}
    tuned, frozen = (dataclasses.replace(spec, labels=labels | {path: group}) for group in ("llm", "frozen"))

    def copies(*shape: int) -> float:
        """Of the matrix, besides itself, on a device."""
        mesh, size = make_mesh(*shape, devices=jax.devices()[:2]), spec.template.shapes[path]
        with_it, without = (
            memory.resident_bytes(s, parameter_layout(config, s, mesh)) for s in (tuned, frozen)
        )
        return (with_it - without) / (size.size * size.dtype.itemsize)

    assert copies(1, 1, 2) == 3 / 2, "two moments and the gradient of a half"
    assert copies(2, 1, 1) == 3
    monkeypatch.setattr("minigpt5_jax.training.sharding.LARGE", 1)
    assert copies(2, 1, 1) == 3 / 2 + 2 - 1, "three parts stored; gradient and gathered copy whole"
