"""Runs whose frozen towers are quantised: trained, resumed, opened in other storage and exported."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import tiny
from minigpt5_jax.config import ConfigError, get_config, use_int8, validate
from minigpt5_jax.export import export_torch
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.training.provenance import CheckpointError, hash_parameters
from minigpt5_jax.training.sharding import make_mesh, parameter_shardings
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.wiring.features import load_towers
from minigpt5_jax.wiring.memory import resident_bytes
from minigpt5_jax.wiring.model import build, load_frozen, parameter_layout
from minigpt5_jax.wiring.restore import open_run
from minigpt5_jax.wiring.training import make_loop, parameter_table
from minigpt5_jax.wiring.weights_plan import held

STORED = {"llm_quantization": "int8", "vit_quantization": "int8"}
UP = "model.layers.0.mlp.up_proj.weight"
KERNEL = "backbone/llm/layers/mlp/up_proj/kernel"


def configure(root):
    """A tiny model from files in ``root`` that trains for a step on captions of scenes."""
    config = tiny.write_oracle_sources(root)
    data = {"format": "shapes", "shapes_train": 8, "shapes_validation": 8, "global_batch": 8}
    config.data.update(**data, worker_count=0, max_length=64, flip_mode="off")
    config.run.update(num_steps=1, eval_every=0, grid_every=0, save_every=1, log_every=1, compile_cache="")
    config.loss.caption = 0.0
    config.inference.update(sampler="ddim", num_inference_steps=1, max_new_tokens=2, force_image="first")
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration, loop of a run in 8 bits that saved itself as if it had done a step)."""
    folder = tmp_path_factory.mktemp("int8")
    config = configure(folder / "weights")
    config.run.workdir = str(folder / "run")
    config.model.backbone.update(STORED)
    config.model.generator.unet_quantization = "int8"
    loop = make_loop(validate(config))
    loop.checkpoints.save(1, {**vars(loop.state), "step": jnp.int32(1)}, 0, loop.meta)
    loop.checkpoints.close()
    return config, loop


def test_the_hash_of_a_quantised_tower_is_that_of_its_files(trained):
    config, loop = trained
    plain = config.copy_and_resolve_references()
    plain.model.backbone.llm_quantization = plain.model.generator.unet_quantization = "none"
    hashes = hash_parameters(load_frozen(plain, build(plain), only=["llm", "unet"]))
    assert loop.frozen[KERNEL].dtype == np.int8 and len(hashes) == 2
    assert {tower: loop.meta["frozen"][tower] for tower in hashes} == hashes


def test_features_of_a_quantised_tower_are_known_by_its_files_and_its_storage(trained):
    config, _ = trained
    plain = config.copy_and_resolve_references()
    plain.model.backbone.vit_quantization = "none"
    int8, whole = (load_towers(made, build(made), "image")[1] for made in (config, plain))
    other = {name for name in whole if int8[name] != whole[name]}
    assert other and {int8[name] for name in other} == {f"{whole[name]}+int8" for name in other}


def test_it_is_opened_as_it_trained_or_otherwise(trained):
    config, loop = trained
    kept = open_run(config.run.workdir).load()
    assert kept.params[KERNEL].dtype == jnp.int8
    assert kept.params["generator/unet/conv_in/kernel"].dtype == jnp.int8
    np.testing.assert_array_equal(kept.params[KERNEL], loop.frozen[KERNEL])
    whole = open_run(config.run.workdir, inference={"quantization": "none"}).load()
    assert whole.params.keys() == {path for path in kept.params if not path.endswith("kernel_scale")}
    assert whole.params[KERNEL].dtype == whole.spec.template.shapes[KERNEL].dtype == jnp.float32
    four = open_run(config.run.workdir, inference={"quantization": "nf4"})
    assert four.config.model.backbone.llm_quantization == "nf4"
    assert four.config.model.generator.unet_quantization == "int8", "which has no such storage"


@pytest.mark.slow
def test_it_answers_and_is_exported(trained, tmp_path):
    config, loop = trained
    session = open_run(config.run.workdir, inference={"layers": "apart"}).session(batch_size=1)
    [answer] = session.generate([Prompt("a red circle")])
    assert answer.images and np.isfinite(answer.images[0]).all()
    export_torch(config.run.workdir, tmp_path / "llm", to="transformers")
    exported = load_file(tmp_path / "llm" / "model.safetensors")
    source = load_file(f"{config.weights.llm}/model.safetensors")
    np.testing.assert_array_equal(exported[UP], source[UP], "the files' weights, not rounded ones")
    voken = loop.state.trainable["backbone/llm/embed_tokens/voken"]
    np.testing.assert_allclose(exported["model.embed_tokens.weight"][-len(voken) :], voken, rtol=1e-6)


@pytest.mark.slow
def test_it_goes_on_in_the_same_storage_only(trained):
    config = trained[0].copy_and_resolve_references()
    config.run.num_steps = 2
    loop = make_loop(validate(config))
    assert loop.first_step == 1
    loop.checkpoints.close()
    config.model.backbone.llm_quantization = "none"
    with pytest.raises(CheckpointError, match="llm_quantization: checkpoint 'int8', this run 'none'"):
        make_loop(validate(config))


def test_bytes_are_those_of_the_storage(trained):
    config = trained[0].copy_and_resolve_references()
    config.run.workdir = ""
    spec, mesh = build(config), make_mesh(devices=jax.devices()[:1])
    config.model.backbone.update(dict.fromkeys(STORED, "none"))
    config.model.generator.unet_quantization = "none"
    plain = build(config)
    saved = sum(
        3 * how.kernel.size - 4 * spec.template.shapes[path + "_scale"].size
        for path, how in spec.template.quantized.items()
    )
    totals, residents = [], []
    for made in (plain, spec):
        totals.append(parameter_table(made).splitlines()[-1].replace(",", "").split())
        residents.append(resident_bytes(made, parameter_layout(config, made, mesh)))
    assert totals[0][1:4] == totals[1][1:4], "as many parameters"
    assert int(totals[0][4]) - int(totals[1][4]) == residents[0] - residents[1] == saved > 0
    assert "llm (float32)" in held(config)
    assert "llm (int8)" in held(use_int8(config))


def test_what_trains_is_not_quantised(trained):
    config = trained[0].copy_and_resolve_references()
    config.tuning.rules = ((r"backbone/llm/layers/mlp/.*", "llm"),)
    spec = build(validate(config))
    assert KERNEL not in spec.template.quantized
    assert spec.template.shapes[KERNEL].dtype == jnp.float32
    assert "backbone/llm/layers/self_attn/q_proj/kernel" in spec.template.quantized


def test_scales_are_sharded_as_their_kernels(trained):
    spec = build(trained[0])
    mesh = make_mesh(data=4, tensor=2)
    places = parameter_shardings(spec.template.shapes, spec.template.axes, mesh, spec.sharding)
    for path in ("mlp/up_proj", "mlp/down_proj"):
        kernel, scale = (places[f"backbone/llm/layers/{path}/kernel{end}"].spec for end in ("", "_scale"))
        assert "tensor" in kernel and scale == P(kernel[0], kernel[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {UP: tensors[UP].astype(np.int8)}, "is int8"),
        (lambda tensors: {f"{UP}.absmax": np.ones(1, np.float32)}, "is consumed by no rule"),
    ],
    ids=["integers", "names"],
)
def test_files_that_are_quantised_already_are_refused(tmp_path, change, message):
    config = use_int8(configure(tmp_path))
    file = f"{config.weights.llm}/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | change(tensors), file)
    spec = build(validate(config))
    said = rf"(?s){message}.*quantised already.*give (it|them) in 16 or 32 bits"
    with pytest.raises(WeightTableError, match=said):
        load_frozen(config, spec, only=["llm"])


def test_a_config_that_says_so_is_refused_too(tmp_path):
    config = use_int8(configure(tmp_path))
    file = Path(config.weights.llm) / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(WeightFileError, match=r"config.json: these weights are quantised already \(gptq\)"):
        load_frozen(config, build(validate(config)), only=["llm"])


def test_unknown_storage_and_backbones_without_any():
    config = get_config()
    config.model.generator.unet_quantization = "nf4"
    with pytest.raises(ConfigError, match="unet_quantization='nf4' is not one of 'none', 'int8'"):
        validate(config)
