"""Checkpoints of earlier versions load, generate's session works, and training resumes from them.

The fixtures were written by commit df60a7f: ``configs/shapes_stage1.py`` for two steps, and stage 2 on
dialogues from it (without its optimizer state), with one mapper layer on either side:

    python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir runs/fx \
        --config.model.mapper.num_encoder_layers=1 --config.model.mapper.num_decoder_layers=1 \
        --config.model.mapper.dim_feedforward=8 --config.run.num_steps=2 --config.optimizer.warmup_steps=1 \
        --config.run.eval_every=0 --config.run.grid_every=0 --config.run.keep_latest=1 \
        --config.run.keep_best=0 --config.data.global_batch=8 --config.data.shapes_train=64 \
        --config.data.shapes_validation=16
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.training.state import TrainState, init_state
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.restore import load_run, not_pretrained, open_parent_run, open_run
from minigpt5_jax.wiring.run_settings import check_end, compare_settings, saved_accumulation
from minigpt5_jax.wiring.training import closing_words, make_loop, resume

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """``old(name)``: workdir of a run that an earlier version wrote."""

    def unpack(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with tarfile.open(FIXTURES / f"{name}.tgz") as archive:
            archive.extractall(folder, filter="data")
        return folder

    return unpack


def test_a_first_stage_loads_and_makes_a_session(old):
    folder = old("run_df60a7f")
    run = load_run(folder)
    assert (
        run.step == 2 and run.config.tuning.stage == "stage1" and run.config.model.mapper.dim_feedforward == 8
    )
    saved = Checkpoints(folder / "checkpoints", read_only=True).paths("trainable", 2)
    assert {path for path, group in run.spec.labels.items() if group != FROZEN} == set(saved)
    assert run.config.mesh.exchange == "float32"  # it summed gradients so, whatever the default is now
    assert run.session(batch_size=1).sampling.max_new_tokens == 64


def test_a_moved_source_is_named_with_the_flag_that_says_where_it_is(old, tmp_path):
    folder = old("run_df60a7f")
    run = open_run(folder, weights={"vit": str(tmp_path / "moved")})
    with pytest.raises(
        ConfigError, match=r"(?s)weights.vit: .*not exist.*Say where they are: --weights NAME="
    ):
        run.check()
    open_run(folder, weights={"vit": open_run(folder).config.weights.vit}).check()


def test_a_second_stage_keeps_its_tuning_rules(old):
    run = open_run(old("run_df60a7f_stage2"))
    assert run.stage == 2 and run.config.tuning.stage == "stage2"
    trained = {path for path, group in run.spec.labels.items() if group != FROZEN}
    assert any("/lora_a" in path for path in trained)
    assert not any(path.startswith(("mapper/fc", "mapper/queries")) for path in trained)
    values = run.load().params
    assert {path for path in run.spec.template.shapes if not_pretrained(path, run.spec)} <= values.keys()


def test_another_stage_starts_from_it(old):
    stage2 = open_run(old("run_df60a7f_stage2"))
    stage2.config.run.init_from = str(old("run_df60a7f"))
    meta, parent = open_parent_run(stage2.config, stage2.spec)
    here = stage2.spec.template.shapes
    assert meta["bundle"]["stage"] == 1 and parent.template.shapes.keys() < here.keys()


def test_training_resumes_behind_its_last_step(old, capsys):
    folder = old("run_df60a7f")
    config = open_run(folder).config
    config.run.update(workdir=str(folder), num_steps=3, grid_every=0, eval_every=0, compile_cache="")
    config.optimizer.update(grad_clip=1.0, lr_mapper=1e-3, warmup_steps=3)
    loop = make_loop(config)
    assert loop.first_step == 2 and int(loop.state.step) == 2
    told = capsys.readouterr().err
    assert "optimizer.grad_clip: checkpoint None, this run 1.0" in told
    assert "optimizer.lr_mapper: checkpoint 0.002, this run 0.001" in told
    assert "run.num_steps: checkpoint 2, this run 3" in told
    assert "the rates rise over 0 steps" in told and "optimizer.warmup_steps=3" in told
    # It loaded all towers; this version leaves out what captions do not use, and keeps their hashes.
    assert not any(path.startswith("backbone/vit/") for path in loop.frozen)
    assert loop.meta["frozen"] == Checkpoints(folder / "checkpoints", read_only=True).meta()["frozen"]
    real = loop.train_step.function

    def stand_in(state: TrainState, frozen, batch):
        """The step fits what was restored; compiling it would tell nothing about old checkpoints."""
        state, metrics = jax.eval_shape(real, state, frozen, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        return dataclasses.replace(loop.state, step=loop.state.step + 1), dict.fromkeys(metrics, 1.0)

    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), loop.state)
    loop.train_step = stand_in
    loop.run()
    assert Checkpoints(folder / "checkpoints", read_only=True).latest_step == 3
    words = closing_words(config)
    assert f"{folder}/metrics.jsonl  losses" in words and f"{folder}/images" not in words
    [command] = re.findall(r"--checkpoint (\S+)", words.split("generate")[1])[:1]
    assert open_run(command).step == 3


def test_settings_that_break_a_run_are_refused_by_their_keys(old):
    folder = old("run_df60a7f")
    run = open_run(folder)
    config, checkpoints = run.config, Checkpoints(folder / "checkpoints", read_only=True)
    assert compare_settings(config, run.spec, checkpoints) == []
    config.data.accumulation, config.mesh.tensor = 4, 2
    assert compare_settings(config, run.spec, checkpoints) == [
        "data.accumulation: checkpoint 1, this run 4",
        "mesh.tensor: checkpoint 1, this run 2",
    ]
    config.data.accumulation = config.mesh.tensor = None  # left to the devices
    assert compare_settings(config, run.spec, checkpoints) == [] and saved_accumulation(checkpoints) == 1
    with pytest.raises(CheckpointError, match=r"is at step 2, .* at step 1: give run.num_steps=2 or more"):
        check_end(config, 1, checkpoints)
    check_end(config, 2, checkpoints)
    config.tuning.rules = (("mapper/queries", FROZEN),)
    with pytest.raises(
        CheckpointError, match=r"config.tuning.rules: checkpoint \[.*, this run \[\['mapper/q"
    ):
        compare_settings(config, build(config), checkpoints)
    config.run.workdir, config.model.backbone.lora_rank = str(folder), 8
    with pytest.raises(CheckpointError, match=r"config.model.backbone.lora_rank: checkpoint 0, this run 8"):
        make_loop(config)


def test_a_state_with_clipping_of_an_earlier_version_is_read(tmp_path):
    """It was a chain of clipping, without a state, and the optimizer."""
    labels = {"mapper/w": "mapper"}
    optimizer = make_optimizer(labels, {"mapper": optax.constant_schedule(1.0)}, grad_clip=1.0)
    state = init_state({"mapper/w": jnp.arange(3.0)}, labels, optimizer, 0)
    chained = {**vars(state), "opt_state": ((), jax.tree.map(lambda x: x + 1, state.opt_state))}
    meta = {"config": get_config().to_dict(), "tokenizer": {}, "frozen": {}, "data": {}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, chained, 7, meta)
    checkpoints.wait()
    resumed, data_state = resume(checkpoints, state, meta, jax.tree.map(lambda x: x.sharding, state))
    checkpoints.close()
    assert data_state == 7
    np.testing.assert_array_equal(
        resumed.opt_state.inner_states["mapper"].inner_state[0].mu["mapper/w"], np.ones(3)
    )
