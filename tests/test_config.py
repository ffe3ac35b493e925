"""Configuration: every run file, overrides, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ml_collections import ConfigDict

import commands
from minigpt5_jax import config as config_module
from minigpt5_jax.config import (
    ConfigError,
    apply_variant,
    choose,
    describe,
    get_config,
    keys_of,
    num_steps,
    use_shapes_backbones,
    validate,
    value_at,
    warmup_steps,
    weight_sources,
)
from minigpt5_jax.config.keys import KEYS
from minigpt5_jax.diffusion.samplers import SAMPLERS
from minigpt5_jax.inference.session import CFG_NEGATIVES
from minigpt5_jax.parts.contracts import find, shipped
from tiny import run_file

ROOT = Path(__file__).parents[1]
# shapes_backbones.py is no run of the model: pretrain has keys of its own (tests/shapes/test_parts.py).
RUN_FILES = sorted(set((ROOT / "configs").glob("*.py")) - {ROOT / "configs/shapes_backbones.py"})


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.stem)
def test_every_run_file_is_valid_locked_and_documented(path):
    module = run_file(path.stem)
    config = validate(module.get_config())
    assert config.is_locked
    assert config.run.name == path.stem
    for word in ("python -m minigpt5_jax", path.name, "Hardware", "xpected number"):
        assert word in module.__doc__, f"docstring of {path.name} does not say {word!r}"
    with pytest.raises(ConfigError, match="unknown variant 'nonsense'; known: .*mapper=encoder_decoder"):
        module.get_config("nonsense")


def test_the_papers_settings():
    stage1 = run_file("stage1").get_config()
    assert (stage1.data.global_batch, stage1.optimizer.lr_llm, stage1.optimizer.lr_mapper) == (48, 2e-5, 2e-4)
    assert stage1.loss.to_dict() | {"text": 0.01, "image": 1.0, "caption": 0.1} == stage1.loss.to_dict()
    assert num_steps(stage1, 2_222_000) == 92_584  # "about 92,600": 2.2M rows and 1% instructions, 2 epochs
    for name, variant in (("stage2_vist", "shuffled"), ("stage2_mmdialog", None)):
        stage2 = run_file(name).get_config(variant)
        assert (stage2.data.global_batch, stage2.run.epochs) == (32, 4.0)
        assert stage2.optimizer.lr_llm == stage2.optimizer.lr_mapper == 2e-5
        assert stage2.loss.caption == 0.0 and stage2.model.backbone.lora_rank == 8
    assert num_steps(stage2.copy_and_resolve_references(), 34_428 * 13) == 55_946
    trees = run_file("stage2_vist").get_config()  # whole stories by default
    assert (trees.data.packing, trees.data.global_batch, trees.data.buckets) == ("tree", 3 * 13, ())
    assert num_steps(trees, 34_428 * 13) == 45_904


def test_every_key_is_explained_and_described():
    table = describe()
    for path, key in KEYS.items():
        assert key.why and f"--config.{path}=" in table
        assert key.default is not None or key.kind is not None
    for part in shipped():
        assert all(key.why for key in part.keys.values())
        assert all(use.why and use.get and use.origin.licence for use in part.uses.values())
    changed = get_config()
    changed.run.seed = 7
    assert "--config.run.seed=7 [42]" in describe(changed)


def test_typos_and_wrong_types_are_errors():
    config = get_config()
    with pytest.raises(AttributeError, match="num_stepz"):
        config.run.num_stepz = 3
    with pytest.raises(TypeError):
        config.run.num_steps = "many"
    with pytest.raises(TypeError):
        config.optimizer.lr_llm = "fast"
    config.run.num_steps = 2000  # not set by default, typed all the same
    assert validate(config).run.num_steps == 2000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.flip_mode", "both", r"data.flip_mode='both' is not one of 'independent', 'shared', 'off'"),
        ("data.context_dropout", 0.2, r"context_dropout=0.2 is for stories .*; data.format is 'cc3m'"),
        ("optimizer.lr_llm", -1.0, r"optimizer.lr_llm=-1.0 is less than 0.0"),
        ("loss.cfg_dropout", 1.5, r"loss.cfg_dropout=1.5 is more than 1.0"),
        ("optimizer.eps", float("nan"), r"optimizer.eps=nan is not a finite number"),
        ("data.accumulation", 7, r"global_batch=48 does not divide into data.accumulation=7 .* 42 or 49"),
        ("mesh.fsdp", -1, r"mesh .*one may be -1"),
        ("mesh.tensor", 0, r"mesh .*at least 1"),
        ("model.backbone.vit", "none", r"vit and model.backbone.qformer are 'none' together"),
        ("model.mapper.nhead", 7, r"d_model=1024 does not divide into model.mapper.nhead=7"),
        ("tuning.rules", ((".*", "everything"),), r"'everything'\) is not \(pattern, group\)"),
        ("inference.sampler", "euler", r"inference.sampler='euler' is not one of 'pndm', 'ddim'"),
    ],
)
def test_bad_values_are_named_with_numbers_and_remedy(path, value, message):
    config = get_config()
    section, _, name = path.rpartition(".")
    value_at(config, section)[name] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_a_run_that_is_not_longer_than_its_warm_up_warms_up_for_a_tenth():
    config = get_config()
    config.run.num_steps = 60
    validate(config)
    assert [warmup_steps(config, steps) for steps in (4, 60, 1000, 1001)] == [0, 6, 100, 1000]


def test_all_problems_are_reported_at_once():
    config = get_config()
    config.update(ConfigDict({"loss": {"text": 0.0, "image": 0.0, "caption": 0.0}, "run": {"epochs": 0.0}}))
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert len(str(error.value).splitlines()) == 2


def test_choosing_a_variant_installs_its_whole_sub_tree():
    config = apply_variant(get_config(), "mapper=decoder_only")
    keys = find("mapper", "decoder_only").keys
    assert (
        set(config.model.mapper.keys()) == {"name", *keys} and "num_encoder_layers" not in config.model.mapper
    )
    assert validate(config).is_locked
    with pytest.raises(ConfigError, match="unknown mapper 'gill'; known: decoder_only, encoder_decoder"):
        choose(config, "mapper", "gill")
    with pytest.raises(ConfigError, match="unknown part 'decoder'; known: backbone, mapper, generator"):
        apply_variant(config, "decoder=x")


def test_variants_of_a_file_are_applied_in_order():
    known = {"tiny": lambda c: c.run.update(num_steps=2), "named": lambda c: c.run.update(name="n")}
    config = apply_variant(get_config(), "tiny,named", known)
    assert (config.run.num_steps, config.run.name) == (2, "n")


def test_weight_sources_fill_sub_folders():
    config = get_config()
    assert set(weight_sources(config).values()) == {""}
    config.weights.update(stable_diffusion="sd/", vae="other/vae", llm="vicuna")
    sources = weight_sources(config)
    assert sources["unet"] == "sd/unet" and sources["clip_tokenizer"] == "sd/tokenizer"
    assert sources["vae"] == "other/vae" and sources["tokenizer"] == "vicuna"
    assert "stable_diffusion" not in sources
    shapes = {name for name, path in weight_sources(use_shapes_backbones(get_config())).items() if path}
    assert shapes == set(sources)


COMMAND = "from minigpt5_jax import cli; cli.run(lambda c: print('RUN', c.run.workdir, c.run.num_steps))"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("command"), "minigpt5_jax.cli", COMMAND)


STAGE1 = ("--config", "configs/stage1.py")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*STAGE1, "--config.run.num_stepz=5"), "key 'num_stepz'. Did you mean"),
        ((*STAGE1, "--config.run.num_steps=soon"), "--config.run.num_steps=soon: invalid literal for int"),
        ((*STAGE1, "--wrokdir=x"), "'wrokdir'. Did you mean: workdir"),
        ((*STAGE1, "--config.data.accumulation=7"), "does not divide into data.accumulation=7"),
        (("--config", "configs/stage1.py:foo"), "error: unknown variant 'foo'; known: "),
        (("--config", "configs/stage3.py"), "not found: configs/stage3.py; did you mean configs/"),
        (("--config", "tests"), "error: run file tests: Is a directory"),
        ((), "give a run file"),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(args, message, command):
    done = command(*args)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_line_overrides_and_helps(command):
    done = command(*STAGE1, "--workdir=w", "--config.run.num_steps=5000")
    assert (done.returncode, done.stdout) == (0, "RUN w 5000\n")
    done = command("--help")
    assert done.returncode == 0 and "--config:" in done.stdout and "--workdir:" in done.stdout
    done = command("--help_config")
    assert done.returncode == 0 and done.stdout == config_module.describe() + "\n"


def test_choices_are_what_the_code_behind_them_knows():
    assert set(keys_of(get_config())["inference.sampler"].choices) == set(SAMPLERS)
    assert set(KEYS["inference.cfg_negative"].choices) == set(CFG_NEGATIVES)
