"""Runs of other mappers and numbers of vokens: trained, continued, generated from and exported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import tiny
from minigpt5_jax.config import validate
from minigpt5_jax.export import export_torch
from minigpt5_jax.generate import make_session
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.restore import load_run
from minigpt5_jax.shapes.dataset import write_pairs
from minigpt5_jax.train import make_loop
from minigpt5_jax.weights.export.model import ExportError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ABLATIONS = load(ROOT / "configs" / "ablations.py")


@pytest.fixture(scope="module", params=[("decoder_only", 16), ("fixed_queries", 2)], ids=str)
def trained(request, tmp_path_factory):
    """(variant, number of vokens, workdir) of a run of two steps."""
    variant, count = request.param
    folder = tmp_path_factory.mktemp(variant)
    config = tiny.write_oracle_sources(folder / "weights")
    getattr(ABLATIONS, variant)(config)
    ABLATIONS.vokens(config, count)
    config.model.backbone.update(vit="none", qformer="none")
    tsv = write_pairs(folder / "data", "train", 16, 0)
    config.data.update(train=str(tsv), global_batch=8, worker_count=0, max_length=200, flip_mode="off")
    config.run.update(workdir=str(folder / "run"), num_steps=2, eval_every=0, grid_every=0)
    config.optimizer.warmup_steps = 1
    config.inference.update(sampler="ddim", num_inference_steps=1, max_new_tokens=2, force_image="first")
    make_loop(validate(config)).run()
    return variant, count, folder / "run"


@pytest.fixture(scope="module")
def run(trained):
    return load_run(trained[2])


def test_it_goes_on(trained, run):
    config = run.config.copy_and_resolve_references()
    config.run.num_steps = 3
    loop = make_loop(validate(config))
    assert loop.first_step == run.step == 2
    for path, value in {**loop.frozen, **loop.state.trainable}.items():
        np.testing.assert_array_equal(value, run.params[path], err_msg=path)


def test_it_draws(run):
    [answer] = make_session(run, batch_size=1).generate([Prompt("a red circle", seed=1)])
    assert len(answer.pictures) == 1 and answer.pictures[0].shape == (64, 64, 3)


def test_the_exported_mapper_computes_the_same(trained, run, tmp_path):
    _, count, workdir = trained
    export_torch(workdir, tmp_path / "mapper", to="mapper")
    mapper = load(tmp_path / "mapper" / "torch_mapper.py").FeatureMapper.from_folder(tmp_path / "mapper")
    states = np.random.default_rng(0).standard_normal((2, count, 48)).astype(np.float32)

    @jax.jit
    def both(params, states):
        model = run.spec.template.bind(params)
        return model.condition(states), model.unconditional()

    ours, zero = both(run.params, states)
    with torch.no_grad():
        np.testing.assert_allclose(mapper(torch.tensor(states)), ours, atol=2e-5)
        np.testing.assert_allclose(mapper.unconditional(), zero, atol=2e-5)
    assert f"[n, {count}, 48] -> [n, 77, 32]" in (tmp_path / "mapper/README.md").read_text()


def test_the_originals_file(trained, run, tmp_path):
    """It has names for fixed queries, and needs them; it has none for the other mapper."""
    variant, count, workdir = trained
    path = tmp_path / "stage1.ckpt"
    if variant == "decoder_only":
        with pytest.raises(ExportError, match="the original never saves .*mapper/layers"):
            export_torch(workdir, path, to="minigpt5")
        assert not list(tmp_path.iterdir())
        return
    export_torch(workdir, path, to="minigpt5")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert len(state) == 131
    np.testing.assert_array_equal(state["t2i_decoder_prompt"][0], run.params["mapper/queries"])
    table = state["model.llama_model.model.embed_tokens.weight"]
    assert len(table) == 1000 + count + 1
    np.testing.assert_array_equal(table[1000:], run.params["backbone/llm/embed_tokens/voken"])


def test_fixed_queries_are_those_of_the_seed(trained, run):
    """As they were drawn from N(0, 1): no update, no weight decay."""
    variant, _, _ = trained
    if variant == "fixed_queries":
        drawn = run.spec.template.init(jax.random.key(run.config.run.seed))
        np.testing.assert_array_equal(run.params["mapper/queries"], drawn["mapper/queries"])
        assert abs(np.std(drawn["mapper/queries"]) - 1) < 0.05
        moved = np.asarray(run.params["mapper/fc/fc1/bias"]) != np.asarray(drawn["mapper/fc/fc1/bias"])
        assert moved.all()
