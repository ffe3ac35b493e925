"""The train command refuses bad input with one clear message, before anything is compiled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tiny
from minigpt5_jax.config import ConfigError, validate
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.shapes.dataset import write_pairs
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.training.sharding import ShardingError
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.run_settings import check_new_parameters
from minigpt5_jax.wiring.training import make_loop, micro_batch_note, parameter_table


@pytest.fixture
def config(tmp_path):
    """The small world on CC3M files, eight samples a step."""
    made = tiny.run_file("shapes_stage1").get_config()
    tsv = write_pairs(tmp_path / "data", "train", 16, 0)
    made.data.update(format="cc3m", train=str(tsv), global_batch=8)
    made.run.update(workdir=str(tmp_path / "run"), num_steps=60)
    return made


def refused(config, error, pattern):
    with pytest.raises(error, match=pattern):
        make_loop(validate(config))


def test_missing_workdir_and_data(config):
    config.run.workdir = ""
    refused(config, ConfigError, "--workdir")
    config.run.workdir = "/tmp/none"
    config.data.train = ""
    refused(config, ConfigError, "data.train")
    config.data.train = "/nowhere/train.tsv"
    refused(config, DataError, "not found: /nowhere/train.tsv")


def test_tsv_without_its_column(config, tmp_path):
    bad = tmp_path / "bad.tsv"
    bad.write_text("text\timage_path\na cat\ta.png\n")
    config.data.train = str(bad)
    refused(config, DataError, r"caption")


def test_unreadable_images_stop_above_the_budget(config, tmp_path):
    lines = Path(config.data.train).read_text().splitlines()
    for line in lines[1:4]:
        (tmp_path / "data" / line.split("\t")[1]).write_bytes(b"")
    config.data.error_budget = 0.0
    refused(config, DataError, r"(?s)samples? (is|are) unusable.*data\.error_budget")


def test_batch_that_the_mesh_does_not_divide(config):
    config.data.global_batch = 6
    refused(config, ShardingError, r"6 entries.*8 devices")


def test_mesh_that_the_devices_do_not_fill(config):
    config.mesh.data = 3
    refused(config, ShardingError, r"data=3.*8 devices")


def test_batch_that_accumulation_does_not_divide(config):
    config.data.accumulation = 3
    refused(config, ConfigError, r"global_batch=8.*3")


def test_weights_that_are_missing_are_all_named(config):
    config.weights.llm = "/nowhere/vicuna"
    config.weights.update(stable_diffusion="", unet="", text_encoder="", clip_tokenizer="")
    config.model.generator.update(unet="sd21_base", vae="sd21_base", text_encoder="sd21_base")
    config.model.generator.scheduler = "sd21_base"
    config.model.backbone.llm = "vicuna_7b"
    config.model.mapper.d_model = 1024
    refused(config, ConfigError, r"(?s)weights.llm: /nowhere/vicuna.*weights.unet.*weights.vae.*text_encoder")


def test_init_from_a_folder_without_checkpoints(config, tmp_path):
    config.run.init_from = str(tmp_path)
    refused(config, CheckpointError, "no complete checkpoint")


def test_lora_that_no_pattern_trains_is_refused_with_the_rule_that_trains_it(config):
    config.model.backbone.lora_rank = 8
    with pytest.raises(ConfigError, match=r"20,480 new .* tuning.stage='stage1' has no pattern") as error:
        make_loop(validate(config))
    for group in ("llm", "frozen"):
        [rule] = re.findall(r'tuning.rules="(.*?)"', str(error.value))
        config.tuning.rules = ast.literal_eval(rule.replace("'llm'", repr(group)))
        spec = build(validate(config))
        check_new_parameters(config, spec)
        assert {g for path, g in spec.labels.items() if "/lora_" in path} == {group}


def test_parameter_table_adds_up(config):
    spec = build(validate(config))
    total = parameter_table(spec).splitlines()[-1].replace(",", "").split()
    count, trainable, frozen = map(int, total[1:4])
    assert count == trainable + frozen == sum(s.size for s in spec.template.shapes.values())


def test_micro_batches_that_the_devices_chose_are_said():
    assert micro_batch_note(4, None, None) == micro_batch_note(4, None, 4)
    assert micro_batch_note(4, None, None).startswith("4 micro-batches per update, as few as fit the devices")
    assert "data.accumulation; 4 before this resume" in micro_batch_note(1, None, 4)
    assert micro_batch_note(1, None, None) == micro_batch_note(2, 2, None) == ""
    assert "3 micro-batches per update, not data.accumulation=6" in micro_batch_note(3, 6, None)
