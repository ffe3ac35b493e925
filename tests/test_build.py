"""From a configuration to a model: sizes, trainables, missing sources, and weights read from files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from ml_collections import ConfigDict

import original
import tiny
from minigpt5_jax.config import ConfigError, choose, get_config
from minigpt5_jax.training.sharding import make_mesh, parameter_shardings
from minigpt5_jax.training.tuning import FROZEN
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.foreign.rewrite import SCHEDULER
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.formats.save import save_safetensors
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.wiring import inputs
from minigpt5_jax.wiring import model as building
from minigpt5_jax.wiring.model import ModelSpec, build, initial_trainable, load_frozen
from minigpt5_jax.wiring.run_settings import check_new_parameters
from minigpt5_jax.wiring.session import decoder_layers
from minigpt5_jax.wiring.weight_paths import check_sources, uses_of
from minigpt5_jax.wiring.weights_plan import make_plan, source_status

ROOT = Path(__file__).parents[1]

# Fidelity 1.12; the language model with 9 new rows in both tables.
TOWERS = {
    "backbone/vit": 985_894_528,
    "backbone/ln_vision": 2_816,
    "backbone/qformer": 105_137_664 + 24_576,
    "backbone/llama_proj": 3_149_824,
    "backbone/llm": 6_738_489_344,
    "mapper/fc": 5_244_928,
    "mapper/queries": 78_848,
    "generator/unet": 865_910_724,
    "generator/vae": 83_653_863,
    "generator/text_encoder": 340_387_840,
}
MAPPING, LORA = 117_575_680, 4_194_304


def test_a_session_takes_the_layers_of_the_language_model_apart():
    shapes = build(tiny.run_file("stage2_vist").get_config()).template
    layers = {path for path in shapes.shapes if path.startswith("backbone/llm/layers/")}
    assert set(decoder_layers(shapes)) == layers and len(layers) >= 9


def count(spec: ModelSpec, prefix: str, without: str = "/lora_") -> int:
    return sum(
        math.prod(shape.shape)
        for path, shape in spec.template.shapes.items()
        if path.startswith(prefix) and without not in path
    )


@pytest.mark.parametrize(
    "name, lora, trainable",
    [("stage1", 0, 122_973_184), ("stage2_vist", LORA, 121_843_712), ("stage2_mmdialog", LORA, 121_843_712)],
)
def test_full_size_totals_are_the_references(name, lora, trainable):
    before = jax.live_arrays()  # held, so that none of another test's goes meanwhile
    config = tiny.run_file(name).get_config()
    spec = build(config)
    check_new_parameters(config, spec)  # a second stage's LoRA has its pattern
    made = {id(array) for array in jax.live_arrays()} - {id(array) for array in before}
    assert not made, "building a description must not allocate"
    assert {tower: count(spec, tower + "/") or count(spec, tower) for tower in TOWERS} == TOWERS
    assert count(spec, "mapper/encoder/") + count(spec, "mapper/decoder/") == MAPPING
    total = sum(math.prod(shape.shape) for shape in spec.template.shapes.values())
    assert total == sum(TOWERS.values()) + MAPPING + lora
    shapes = {path: spec.template.shapes[path] for path in tiny.trainable_paths(spec.labels)}
    assert sum(math.prod(shape.shape) for shape in shapes.values()) == trainable
    assert {shape.dtype for shape in shapes.values()} == {jnp.dtype("float32")}
    frozen = {
        shape.dtype
        for path, shape in spec.template.shapes.items()
        if spec.labels[path] == FROZEN and not path.startswith("mapper/")
    }
    assert frozen == {jnp.dtype("bfloat16")}


def test_options_of_the_step_come_from_the_configuration():
    configs = (tiny.run_file(name).get_config() for name in ("stage1", "stage2_vist"))
    stage1, stage2 = (building.build(config).options for config in configs)
    assert stage1.loss.weights == {"text": 0.01, "image": 1.0, "caption": 0.1}
    assert stage2.loss.weights == {"text": 0.01, "image": 1.0}
    assert (stage1.lora_dropout, stage2.lora_dropout) == (False, True)
    assert (stage1.accumulation, stage1.cfg_dropout) == (1, 0.1)


def test_every_missing_source_is_named_with_how_to_get_it(tmp_path):
    config = tiny.run_file("stage1").get_config()
    config.weights.vit = str(tmp_path / "no_such.safetensors")
    with pytest.raises(ConfigError) as error:
        check_sources(config)
    for name, (_, use) in uses_of(config).items():
        assert f"weights.{name}: " in str(error.value) and use.get in str(error.value)
    assert "no_such.safetensors does not exist" in str(error.value) and "--dry_run" in str(error.value)
    config.model.backbone.update(vit="none", qformer="none")  # what cannot see needs no eyes
    config.weights.update(llm=str(tmp_path), tokenizer=str(tmp_path))
    with pytest.raises(ConfigError) as error:
        check_sources(config)
    assert not any(f"weights.{name}:" in str(error.value) for name in ("vit", "qformer", "llama_proj", "llm"))


def test_hugging_face_ids_lie_in_the_local_cache(tmp_path, monkeypatch):
    """The plan says that they are there; so must the run."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    for name, folders in {"org/llm": ("",), "org/sd": parts}.items():
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40)
        for folder in folders:
            (repository / "snapshots" / ("0" * 40) / folder).mkdir(parents=True)
    config = tiny.run_file("stage1").get_config()
    config.model.backbone.update(vit="none", qformer="none")
    config.weights.update(llm="org/llm", stable_diffusion="org/sd")
    snapshot = "snapshots/" + "0" * 40
    paths = check_sources(config)
    assert paths["llm"] == tmp_path / "models--org--llm" / snapshot
    assert paths["unet"] == tmp_path / "models--org--sd" / snapshot / "unet"
    config.weights.llm = "org/other"
    with pytest.raises(ConfigError, match=r"weights.llm: org/other does not exist(.|\n)*hf download"):
        check_sources(config)
    (tmp_path / "models--org--llm/refs/main").unlink()
    config.weights.llm = "org/llm"
    folder = tmp_path / "models--org--llm" / snapshot
    with pytest.raises(ConfigError, match=rf"weights.llm: org/llm .*give the path of one: {folder}\."):
        check_sources(config)
    config.weights.llm = str(folder)
    assert check_sources(config)["llm"] == folder, "as the message says"
    (tmp_path / "link").symlink_to("nowhere")
    config.weights.llm = str(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"weights.llm: .*link is a link to nowhere, where nothing is"):
        check_sources(config)


def test_the_plan_does_not_call_fitting_what_it_did_not_compare(tmp_path):
    config = tiny.run_file("stage1").get_config()
    config.model.backbone.update(llm="source", vit="none", qformer="none")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    config.weights.update(dict.fromkeys(("llm", "stable_diffusion"), str(tmp_path)))
    plan = make_plan(config)
    assert "weights.unet: " in plan and plan.count("there, not compared") == 4
    assert plan.splitlines()[-1].startswith("Everything is on disk, but nothing was compared")
    assert f"no config.json in {tmp_path}" in plan and "and fits" not in plan


@pytest.mark.parametrize("name", ["vit", "qformer"])
def test_the_plan_gives_a_command_for_what_lies_in_blip2(name):
    plan = make_plan(tiny.run_file("stage1").get_config())
    block = next(text for text in plan.split("\n\n") if f"weights.{name}: not given" in text)
    assert "or: hf download Salesforce/blip2-flan-t5-xxl" in block


def test_the_768_pixel_model_is_refused_by_its_schedule(tmp_path):
    """Its tensors have the names and shapes of 2.1-base; the preset of the schedule must not hide it."""
    config = tiny.run_file("stage1").get_config()
    config.model.backbone.update(vit="none", qformer="none")
    config.weights.update(dict.fromkeys(("llm", "tokenizer", "stable_diffusion"), str(tmp_path)))
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).mkdir()
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER))
    assert check_sources(config)["scheduler"] == file.parent
    file.write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(WeightFileError, match=r"scheduler_config\.json: .*768-pixel.*predicts v"):
        check_sources(config)
    there, why = source_status(config, "scheduler", str(file.parent), None)
    assert not there and "predicts v" in why


@pytest.mark.parametrize(
    "name, file, values, told",
    [
        ("llm", "config.json", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, not 1e-06"),
        ("llm", "config.json", {"_name_or_path": "lmsys/vicuna-7b-v1.5"}, r"Vicuna v1\.5"),
        ("llm", "config.json", {"max_position_embeddings": 4096}, "max_position_embeddings is 4096"),
        ("vae", "config.json", {"layers_per_block": 1}, "layers_per_block is 1, not 2"),
        ("scheduler", "scheduler_config.json", SCHEDULER | {"beta_end": 0.02}, r"beta_end is 0\.02"),
    ],
)
def test_a_preset_is_compared_with_the_file_beside_the_source(tmp_path, name, file, values, told):
    """Such weights have the preset's names and shapes: nothing but this file tells them apart."""
    config = tiny.run_file("stage1").get_config()
    config.model.backbone.update(vit="none", qformer="none")
    config.weights.update(dict.fromkeys(("llm", "tokenizer"), str(tmp_path)), stable_diffusion=str(tmp_path))
    for folder in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / folder).mkdir()
    place = (tmp_path if name == "llm" else tmp_path / name) / file
    if name != "vae":
        place.write_text(json.dumps(SCHEDULER if name == "scheduler" else {}))
        check_sources(config)
    place.write_text(json.dumps(values))
    part, tower = uses_of(config)[name][0], name
    with pytest.raises(ConfigError, match=f"{file} does not fit(.|\n)*{told}(.|\n)*{part}.{tower}=source"):
        check_sources(config)
    with pytest.raises(ConfigError, match="does not fit(.|\n)*--weights NAME=PATH") as refused:
        check_sources(config, remedy="Say where they are: --weights NAME=PATH")  # of generate
    assert "--config" not in str(refused.value), "which has no such flag"
    assert not source_status(config, name, str(place.parent), None)[0]
    config.model[part][tower] = "source"
    check_sources(config)


def test_parts_and_sizes_that_do_not_fit_are_refused(tmp_path):
    config = get_config()
    with pytest.raises(ConfigError, match="unknown part 'decoder'; known: backbone, mapper, generator"):
        choose(config, "decoder", "x")
    config.model.backbone.name = "minigpt6"
    with pytest.raises(ValueError, match="minigpt6.*minigpt4"):
        build(config)
    config = get_config()
    config.model.mapper.d_model = 512
    with pytest.raises(ConfigError, match="d_model=512.*width 1024"):
        build(config)
    config = get_config()
    config.tuning.stage = "stage2"  # without LoRA these would freeze in silence
    with pytest.raises(ValueError, match="match no parameter.*lora"):
        build(config)
    config = get_config()
    config.model.backbone.llm = "source"
    with pytest.raises(ConfigError, match=r"weights\.llm is not given"):
        build(config)
    config.weights.llm = str(tmp_path)
    with pytest.raises(ConfigError, match=r"weights\.llm: no config\.json"):
        build(config)
    config = get_config()
    config.data.max_images = 2
    config.model.backbone.update(vit="none", qformer="none")
    with pytest.raises(ConfigError, match="max_images=2.*cannot see"):
        inputs.batch_spec(config, building.build(config), 2)


# ---------------------------------------------------------------------------------------------
# Weights from files: the oracle's model, written as a user has it


@pytest.fixture(scope="module")
def sources(tmp_path_factory, oracle_dir, oracle_configs, oracle_weights) -> ConfigDict:
    """A configuration whose every size and weight comes from files in the layouts of the real sources."""
    root, c = tmp_path_factory.mktemp("sources"), oracle_configs

    def write(folder: str, file: str, prefixes: dict[str, str], config: dict, extra=lambda tensors: tensors):
        tensors = {
            new + name.removeprefix(old): value
            for old, new in prefixes.items()
            for name, value in oracle_weights.items()
            if name.startswith(old)
        }
        save_safetensors(root / folder / file, extra(tensors))
        (root / folder / "config.json").write_text(json.dumps(config))

    def old_rows(tensors):
        return {name: v for name, v in original.split_tables(tensors, 9).items() if not name.endswith(".new")}

    vit = original.eva_config(c["eva_vit"])
    write("llm", "model.safetensors", {"model.llama_model.": ""}, c["llama"], old_rows)
    write("vit", "eva.safetensors", {"model.visual_encoder.": ""}, vars(vit))
    write(
        "qformer",
        "blip2.safetensors",
        {"model.Qformer.": "Qformer.", "model.query_tokens": "query_tokens", "model.ln_vision": "ln_vision"},
        c["qformer_bert"] | {"encoder_hidden_size": vit.hidden_size, "cross_attention_frequency": 2},
    )
    write("proj", "proj.safetensors", {"model.llama_proj.": "llama_proj."}, {})
    write("sd/unet", "diffusion_pytorch_model.safetensors", {"unet.": ""}, c["unet"])
    write("sd/vae", "diffusion_pytorch_model.safetensors", {"vae.": ""}, c["vae"])
    write("sd/text_encoder", "model.safetensors", {"sd_text_encoder.": ""}, c["sd_text_encoder"])
    shutil.copytree(oracle_dir / "tokenizer_clip", root / "sd/tokenizer")
    (root / "sd/scheduler").mkdir()
    (root / "sd/scheduler/scheduler_config.json").write_text(json.dumps(c["scheduler"]))
    shutil.copy(oracle_dir / "tokenizer_llama/tokenizer.model", root / "llm")

    config = get_config()
    config.model.backbone.update(llm="source", vit="source", qformer="source")
    config.model.generator.update(
        unet="source", vae="source", text_encoder="source", scheduler="source", image_size=64
    )
    config.model.mapper.update(d_model=32, nhead=8, dim_feedforward=128)
    config.model.update(dtype="float32", param_dtype="float32")
    config.weights.update(
        llm=str(root / "llm"),
        stable_diffusion=str(root / "sd"),
        vit=str(root / "vit/eva.safetensors"),
        qformer=str(root / "qformer/blip2.safetensors"),
        llama_proj=str(root / "proj/proj.safetensors"),
    )
    return config


@pytest.fixture(scope="module")
def spec(sources) -> ModelSpec:
    return build(sources)


@pytest.fixture(scope="module")
def frozen(sources, spec) -> dict[str, jax.Array]:
    return load_frozen(sources, spec)


def test_frozen_weights_are_read_from_their_sources(sources, spec, frozen, oracle_weights):
    trained = set(tiny.trainable_paths(spec.labels))
    assert frozen.keys() == spec.template.shapes.keys() - trained
    assert {path: value.shape for path, value in frozen.items()} == {
        path: spec.template.shapes[path].shape for path in frozen
    }
    for path, name, change in (
        (
            "backbone/llm/embed_tokens/embedding",
            "model.llama_model.model.embed_tokens.weight",
            lambda w: w[:-9],
        ),
        ("backbone/vit/blocks/mlp/fc1/bias", "model.visual_encoder.blocks.0.mlp.fc1.bias", lambda w: w),
        ("backbone/ln_vision/scale", "model.ln_vision.weight", lambda w: w),
        ("backbone/llama_proj/kernel", "model.llama_proj.weight", lambda w: w.T),
        ("generator/unet/conv_in/bias", "unet.conv_in.bias", lambda w: w),
        ("generator/vae/quant_conv/bias", "vae.quant_conv.bias", lambda w: w),
    ):
        read = frozen[path][0] if "/blocks/" in path else frozen[path]
        np.testing.assert_array_equal(read, change(oracle_weights[name]), err_msg=path)

    fresh = initial_trainable(sources, spec, frozen)
    assert fresh.keys() == trained
    old = frozen["backbone/llm/embed_tokens/embedding"]
    np.testing.assert_allclose(
        fresh["backbone/llm/embed_tokens/voken"], np.broadcast_to(old.mean(0), (9, 48)), atol=1e-7
    )
    head = frozen["backbone/llm/lm_head/kernel"]
    np.testing.assert_allclose(
        fresh["backbone/llm/lm_head/voken"], np.broadcast_to(head.mean(1), (9, 48)), atol=1e-7
    )
    assert spec.template.bind(spec.template.shapes).generator.empty_caption_ids[:3] == (526, 527, 0)


def test_files_of_pytorch_are_read_as_they_are_published(sources, spec, frozen, tmp_path):
    """``eva_vit_g.pth`` plain, BLIP-2's and MiniGPT-4's files under 'model', Vicuna and the VAE in .bin."""
    config = ConfigDict(sources.to_dict())

    def rewrite(source: str, target: Path, wrap=lambda tensors: tensors) -> str:
        tensors = {name: torch.from_numpy(value.copy()) for name, value in open_weights(source).items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(wrap(tensors), target)
        return str(target)

    w = config.weights
    for name in ("llm", "stable_diffusion"):
        w[name] = str(shutil.copytree(w[name], tmp_path / name))
    for folder, stem in (("llm", "pytorch_model"), ("stable_diffusion/vae", "diffusion_pytorch_model")):
        rewrite(tmp_path / folder, tmp_path / folder / f"{stem}.bin")
        next((tmp_path / folder).glob("*.safetensors")).unlink()
    for name, wrap in (
        ("vit", lambda tensors: tensors),
        ("qformer", lambda tensors: {"model": tensors, "epoch": 1}),
        ("llama_proj", lambda tensors: {"model": tensors, "optimizer": {"state": {}}}),
    ):
        w[name] = rewrite(w[name], tmp_path / name / "file.pth", wrap)
    same = load_frozen(config, spec)
    assert same.keys() == frozen.keys()
    for path, value in frozen.items():
        np.testing.assert_array_equal(same[path], value, err_msg=path)


def test_weights_arrive_sharded(sources, spec):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = parameter_shardings(spec.template.shapes, spec.template.axes, mesh, spec.sharding)
    for path, value in load_frozen(sources, spec, shardings).items():
        assert value.sharding == shardings[path], path
    path = "backbone/llm/layers/mlp/gate_proj/kernel"
    assert shardings[path].spec[-1] == "tensor"


def test_a_source_of_another_size_names_file_and_tensor(sources, spec):
    config = ConfigDict(sources.to_dict())
    config.weights.vit = sources.weights.llama_proj
    with pytest.raises(WeightTableError, match=r"proj\.safetensors.*\n.*llama_proj"):
        load_frozen(config, spec)
