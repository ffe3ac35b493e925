"""Which towers a run reads is found from its data and losses; the others' files may be missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

import tiny
from minigpt5_jax.config import ConfigError, use_stage2, validate
from minigpt5_jax.models.abstract import AbsentParameter, AbsentParameterError
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import NOT_LOADED, CheckpointError
from minigpt5_jax.wiring import training
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.restore import earlier_hashes, load_run
from minigpt5_jax.wiring.training import make_loop, parameter_table
from minigpt5_jax.wiring.used_towers import unused_towers
from minigpt5_jax.wiring.weight_paths import check_sources

EYES = {"vit", "qformer", "llama_proj"}
FILES = {name: name for name in EYES} | {name: f"sd/{name}" for name in ("vae", "unet", "text_encoder")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with the files of a tiny model, and its configuration: captions of scenes, two steps."""
    root = tmp_path_factory.mktemp("weights")
    config = tiny.write_oracle_sources(root)
    config.data.update(
        format="shapes",
        shapes_train=16,
        shapes_validation=8,
        global_batch=8,
        worker_count=0,
        max_length=64,
        flip_mode="off",
    )
    config.run.update(num_steps=2, eval_every=2, grid_every=2, save_every=2, log_every=1, compile_cache="")
    config.optimizer.warmup_steps = 1
    return root, config


@pytest.fixture
def config(sources, tmp_path):
    made = sources[1].copy_and_resolve_references()
    made.run.workdir = str(tmp_path / "run")
    return made


# -- what is found ----------------------------------------------------------------------------------


def captions(config):
    """Stage 1 as it is."""


def no_caption_loss(config):
    config.loss.caption = 0.0
    only_trained(config)


def away_from_the_empty_prompt(config):
    """The text encoder makes the negative condition of the grid."""
    no_caption_loss(config)
    config.run.grid_every = 1
    config.inference.cfg_negative = "empty_prompt"


def only_trained(config):
    config.run.update(eval_every=0, grid_every=0)


def no_held_out_samples(config):
    config.data.update(format="cc3m", validation="", features="moments")


def moments(config):
    config.data.features = "moments"
    only_trained(config)


def moments_and_validation(config):
    """The small world's images are drawn and judged at each validation."""
    moments(config)
    config.run.eval_every = 1


def moments_and_validation_of_captions(config):
    """Nothing is drawn, but held-out images are encoded."""
    moments_and_validation(config)
    config.data.update(format="cc3m", validation="held_out.tsv")


def no_image_loss(config):
    config.loss.image = 0.0
    only_trained(config)


def stories(config):
    use_stage2(config)
    only_trained(config)
    config.data.update(max_images=2, global_batch=8, accumulation=1, max_length=128)


def stories_with_features(config):
    stories(config)
    config.data.features = "features"


def vision_that_trains(config):
    only_trained(config)
    config.tuning.rules = ((r"backbone/vit/.*", "llm"),)


@pytest.mark.parametrize(
    "change, unused",
    [
        (captions, EYES),
        (no_caption_loss, EYES | {"text_encoder"}),
        (away_from_the_empty_prompt, EYES),
        (no_held_out_samples, EYES | {"vae"}),
        (moments, EYES | {"vae"}),
        (moments_and_validation, EYES),
        (moments_and_validation_of_captions, EYES),
        (no_image_loss, EYES | {"vae", "unet"}),
        (stories, {"text_encoder"}),
        (stories_with_features, {"vit", "qformer", "text_encoder", "vae"}),
        (vision_that_trains, {"qformer", "llama_proj"}),
    ],
)
def test_a_run_uses_what_its_data_and_losses_read(change, unused, config):
    change(config)
    spec = build(validate(config))
    assert unused_towers(config, spec, watched=True) == unused


def test_nothing_is_drawn_for_a_run_that_nobody_watches(config):
    no_image_loss(config)
    config.run.grid_every = 1
    spec = build(validate(config))
    assert unused_towers(config, spec, watched=False) == EYES | {"vae", "unet"}
    assert unused_towers(config, spec, watched=True) == EYES


def test_the_table_says_what_is_not_loaded(config):
    spec = build(config)
    table = parameter_table(spec.without(EYES | {"text_encoder"})).splitlines()
    columns = {line.split()[0]: line.replace(",", "").split()[-2:] for line in table[1:]}
    for tower, (size, absent) in columns.items():
        left_out = tower in ("generator/text_encoder", "backbone/ln_vision") or tower[9:] in EYES
        assert int(absent) == (int(size) if left_out else 0) or tower == "total", tower
    assert int(columns["total"][1]) == sum(int(absent) for _, absent in list(columns.values())[:-1]) > 0
    assert table[0].split()[-2:] == ["not", "loaded"]


# -- a model without them ---------------------------------------------------------------------------


def test_an_absent_parameter_cannot_be_computed_with(sources):
    spec = build(sources[1])
    params = {path: jnp.zeros(x.shape, x.dtype) for path, x in spec.template.shapes.items()}
    template = spec.without({"vit"}).template
    eyes = {path for path in params if path.startswith("backbone/vit/")}
    some = {path: value for path, value in params.items() if path not in eyes}
    assert template.absent == eyes and template.shapes.keys() == params.keys()
    images = jnp.zeros((1, spec.backbone.image_size, spec.backbone.image_size, 3), jnp.uint8)
    see = jax.jit(lambda params: template.bind(params).backbone.image_states(images))
    with pytest.raises(AbsentParameterError, match=r"'backbone/vit/\w+.*' is read, but it was not loaded"):
        see(some)
    draw = jax.eval_shape(lambda params: template.bind(params).unconditional(), some)
    assert draw.shape[1:] == spec.generator.condition_shape
    with pytest.raises(KeyError, match="backbone/vit"):
        spec.template.bind(some)
    with pytest.raises(KeyError, match="mapper/queries"):
        template.bind({path: value for path, value in some.items() if path != "mapper/queries"})


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[...],
        lambda x: nnx.Param(x) + 1.0,
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jnp.sum(x),
        lambda x: jax.jit(lambda y: y)(x),
        lambda x: jax.lax.scan(lambda c, y: (c, y), jnp.zeros(()), x),
    ],
)
def test_whatever_is_done_with_it_names_it(use):
    absent = AbsentParameter("backbone/vit/x", jax.ShapeDtypeStruct((3, 2), jnp.float32))
    assert absent.shape == (3, 2) and absent.dtype == jnp.float32
    with pytest.raises(AbsentParameterError, match="'backbone/vit/x'"):
        use(absent)


# -- files ------------------------------------------------------------------------------------------


def take_away(root: Path, names) -> None:
    """Leave of these towers nothing but their sizes."""
    for name in names:
        (root / FILES[name] / "model.safetensors").unlink()


@pytest.fixture
def files(sources, tmp_path, config):
    """A copy of the model's files that may be damaged; ``config`` is of it."""
    root = shutil.copytree(sources[0], tmp_path / "weights")
    for name, value in config.weights.items():
        if value:
            config.weights[name] = value.replace(str(sources[0]), str(root))
    return root


def test_what_is_needed_must_be_there(config, files):
    config.weights.vit = str(files / "nowhere")
    config.model.backbone.update(vit="eva_vit_g", qformer="qformer_blip2")  # sizes without their files
    config.data.max_images = 1
    with pytest.raises(ConfigError, match=r"(?s)weights are missing:.*weights.vit: .*nowhere does not exist"):
        make_loop(validate(config))
    config.weights.update(llama_proj="", clip_tokenizer=str(files / "nowhere"))
    with pytest.raises(ConfigError, match=r"(?s)weights are missing:.*weights.clip_tokenizer") as error:
        check_sources(config, EYES)
    assert not any(f"weights.{name}" in str(error.value) for name in EYES)


AWAY = (
    "backbone/vit",
    "backbone/ln_vision",
    "backbone/qformer",
    "backbone/llama_proj",
    "generator/text_encoder",
)
"""What a run on captions without caption loss does not use, by the names of its hashes."""


@pytest.fixture
def whole(config, files, tmp_path, monkeypatch):
    """Such a run before its first step that loads everything; then the unused files are taken away."""
    no_caption_loss(config)
    made = config.copy_and_resolve_references()
    made.run.workdir = str(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "unused_towers", lambda *_, **__: frozenset())
        loop = make_loop(validate(made))
    shutil.copytree(files, tmp_path / "kept")
    take_away(files, [*EYES, "text_encoder"])
    return loop


def save(loop) -> None:
    """A checkpoint of the state as it is."""
    loop.checkpoints.save(2, vars(loop.state), 0, loop.meta)
    loop.checkpoints.close()


@pytest.mark.slow
def test_a_run_without_its_unused_files_is_resumed_and_generated_from(config, files, whole, tmp_path):
    known = whole.meta["frozen"]
    assert NOT_LOADED not in known.values() and any(path.startswith(AWAY) for path in whole.frozen)
    loop = make_loop(validate(config))
    assert not any(path.startswith(AWAY) for path in loop.frozen)
    assert loop.meta["frozen"] == {**known, **dict.fromkeys(AWAY, NOT_LOADED)}
    for path, value in loop.state.trainable.items():
        np.testing.assert_array_equal(value, whole.state.trainable[path], err_msg=path)
    save(loop), save(whole)

    # A run that knew of more goes on without losing what it knew, and so does one that starts from it.
    former = config.copy_and_resolve_references()
    former.run.workdir = str(tmp_path / "whole")
    again = make_loop(validate(former))
    assert again.meta["frozen"] == known and not any(path.startswith(AWAY) for path in again.frozen)
    config.run.init_from = former.run.workdir
    assert earlier_hashes(config, Checkpoints(tmp_path / "none")) == known
    config.run.init_from = ""
    assert earlier_hashes(config, Checkpoints(tmp_path / "none")) == {}

    # Generation reads every tower itself, and compares those that the run had.
    with pytest.raises(FileNotFoundError, match=r"weights/vit holds config.json, but none of model"):
        load_run(config.run.workdir)
    shutil.copytree(tmp_path / "kept", files, dirs_exist_ok=True)
    alter(files / FILES["vit"])
    assert load_run(config.run.workdir).params.keys() == whole.frozen.keys() | whole.state.trainable.keys()
    with pytest.raises(CheckpointError, match="frozen.backbone/vit: checkpoint '[0-9a-f]{64}', this run"):
        load_run(former.run.workdir)

    # A tower that is used from now on is known from now on.
    config.loss.caption = 0.1
    loop = make_loop(validate(config))
    assert loop.meta["frozen"]["generator/text_encoder"] == known["generator/text_encoder"]
    assert loop.meta["frozen"]["backbone/vit"] == NOT_LOADED


@pytest.fixture
def programs(tmp_path):
    """Programs are kept: two runs that differ in nothing but what they loaded compile once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_it_trains_the_same_bit_for_bit(config, files, whole, programs):
    loop = make_loop(validate(config))
    loop.run(), whole.run()
    assert int(loop.state.step) == int(whole.state.step) == 2
    for path, value in whole.state.trainable.items():
        np.testing.assert_array_equal(value, loop.state.trainable[path], err_msg=path)


def alter(folder: Path) -> None:
    """Change the weights of a tower."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, file)
