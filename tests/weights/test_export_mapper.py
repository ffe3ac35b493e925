"""The exported mapper is the mapper: the shipped PyTorch module, loaded from its folder alone."""

from __future__ import annotations

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
import torch

from minigpt5_jax.export import export_torch
from minigpt5_jax.models.mapper import weights as maps
from minigpt5_jax.weights.formats.load import open_weights


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapper") / "mapper"
    export_torch(run_folder("stage1"), path, to="mapper")
    return path


def load(folder):
    """The module that lies in the folder, by its path: nothing of this package is involved."""
    spec = importlib.util.spec_from_file_location("exported_mapper", folder / "torch_mapper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FeatureMapper.from_folder(folder)


def test_conditions_are_ours(folder, run_of, condition_of):
    run, mapper = run_of("stage1"), load(folder)
    states = np.random.default_rng(1).standard_normal((3, 8, 128)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(mapper(torch.tensor(states)), condition_of(run, states), atol=2e-5)
        zero = condition_of(run, np.zeros((1, 8, 128), np.float32))
        np.testing.assert_allclose(mapper.unconditional(), zero, atol=2e-5)
    assert np.abs(zero).max() > 0.1, "biases and queries act on zeros"


def test_the_way_there_and_back_changes_no_bit(folder, run_of):
    params = {k.removeprefix("mapper/"): v for k, v in run_of("stage1").params.items() if "mapper/" in k}
    source = open_weights(folder / "mapper.safetensors")
    again = maps.TABLE.to_params(source, {path: value.shape for path, value in params.items()})
    assert again.keys() == params.keys()
    assert all(np.array_equal(again[path], params[path]) for path in params)
    assert {value.dtype for value in source.values()} == {np.dtype(np.float32)}


def test_config_and_readme_say_how_it_is_used(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["num_queries"] == 77 and config["d_model"] == 128 and config["num_vokens"] == 8
    assert config["voken_state_shift"] == 1
    readme = (folder / "README.md").read_text()
    assert len(readme.splitlines()) == 5 and "[n, 8, 128] -> [n, 77, 128]" in readme


def test_half_precision(run_folder, tmp_path, condition_of, run_of):
    export_torch(run_folder("stage1"), tmp_path / "mapper", to="mapper", dtype="bfloat16")
    source = open_weights(tmp_path / "mapper" / "mapper.safetensors")
    assert {value.dtype for value in source.values()} == {np.dtype(ml_dtypes.bfloat16)}
    states = np.random.default_rng(1).standard_normal((1, 8, 128)).astype(np.float32)
    ours = condition_of(run_of("stage1"), states)
    with torch.no_grad():
        theirs = load(tmp_path / "mapper")(torch.tensor(states)).float().numpy()
    error = np.abs(theirs - ours).mean() / np.abs(ours).mean()
    assert 1e-4 < error < 0.05, "rounded to 8 bits, and no more than that"
