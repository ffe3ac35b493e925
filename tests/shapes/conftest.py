"""A run for the judges."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.session import LoadedModel


@pytest.fixture(scope="session")
def seeing_run(tmp_path_factory, oracle_dir):
    """An untrained run of the oracle's sizes: it reads images and draws 64 pixels, badly."""
    config = tiny.write_oracle_sources(tmp_path_factory.mktemp("sources"))
    config.inference.update(sampler="ddim", num_inference_steps=1, max_new_tokens=4)
    spec, random = build(config), np.random.default_rng(0)

    def leaf(path, shape):  # drawn by numpy: nothing to compile
        if path.endswith("scale"):
            return jnp.ones(shape, jnp.float32)
        size = np.prod(shape[:-1] or (2500,)) ** -0.5
        return jnp.asarray(size * random.standard_normal(shape), jnp.float32)

    params = {path: leaf(path, s.shape) for path, s in spec.template.shapes.items()}
    tokenizer = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    return LoadedModel(config, spec, params, tokenizer, 3)
