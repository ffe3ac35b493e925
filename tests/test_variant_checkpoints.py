"""Runs of other mappers and numbers of vokens: saved, loaded, generated from and exported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tiny
from minigpt5_jax.config import validate
from minigpt5_jax.export import export_torch
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.weights.export.model import ExportError
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.restore import load_run, not_pretrained
from tiny import run_file

ROOT = Path(__file__).parents[1]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ABLATIONS = run_file("ablations")


@pytest.fixture(scope="module", params=[("decoder_only", 16), ("fixed_queries", 2)], ids=str)
def saved(request, tmp_path_factory):
    """(variant, number of vokens, workdir of a run that saved itself at step 7, what it saved)."""
    variant, count = request.param
    folder = tmp_path_factory.mktemp(variant)
    config = tiny.write_oracle_sources(folder / "weights")
    getattr(ABLATIONS, variant)(config)
    ABLATIONS.vokens(config, count)
    config.model.backbone.update(vit="none", qformer="none")
    config.inference.update(sampler="ddim", num_inference_steps=1, max_new_tokens=2, force_image="first")
    spec, random = build(validate(config)), np.random.default_rng(0)
    values = {
        path: np.float32(0.2 * random.standard_normal(shape.shape) + path.endswith("scale"))
        for path, shape in spec.template.shapes.items()
        if not_pretrained(path, spec)
    }
    tiny.save_run(config, folder / "run", {path: jnp.asarray(value) for path, value in values.items()})
    return variant, count, folder / "run", values


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved[2])


def test_it_comes_back_as_it_was_saved(saved, run):
    variant, count, _, values = saved
    assert run.step == 7 and run.tokenizer.num_vokens == count
    assert ("mapper/queries" in values) == (variant == "fixed_queries")
    for path, value in values.items():
        np.testing.assert_array_equal(run.params[path], value, err_msg=path)


@pytest.mark.slow
def test_it_draws(run):
    [answer] = run.session(batch_size=1).generate([Prompt("a red circle", seed=1)])
    assert len(answer.images) == 1 and answer.images[0].shape == (64, 64, 3)


def test_the_exported_mapper_computes_the_same(saved, run, tmp_path):
    _, count, workdir, _ = saved
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


def test_the_originals_file(saved, run, tmp_path):
    """It has names for fixed queries, and needs them; it has none for the other mapper."""
    variant, count, workdir, _ = saved
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
