"""BERT against transformers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig as HfConfig
from transformers import BertModel as HfModel

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.bert.model import MINILM_L6, BertConfig
from minigpt5_jax.models.bert.weights import TABLE, TOWER
from minigpt5_jax.weights.table import WeightTableError

HF = dict(
    vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=9,
)  # fmt: skip


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-8)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = HfModel(HfConfig(**HF)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    return model, source, BertConfig.from_hf(model.config.to_dict())


def test_states_and_gradients_match_transformers(pair):
    model, source, sizes = pair
    template = Template.of(lambda rngs: TOWER.module(sizes, rngs=rngs))
    params = jax.tree.map(jnp.asarray, TABLE.to_params(source, TOWER.shapes(sizes)))
    ids = np.array([[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    weight = np.random.default_rng(0).standard_normal((2, 6, 24)).astype(np.float32) * mask[..., None]

    def loss(params):
        out = template.bind(params)(jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))
        return (out * weight).sum(), out

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    theirs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    assert_close(np.asarray(ours)[mask > 0], theirs.detach().numpy()[mask > 0])
    (theirs * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    named = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    wanted = TABLE.to_params({k: g.numpy() for k, g in named.items()}, TOWER.shapes(sizes))
    for path, want in wanted.items():
        if path.endswith("key/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-4
        else:
            assert_close(grads[path], want)


def test_table_round_trip_and_what_is_left_out(pair):
    _, source, sizes = pair
    params = TABLE.to_params({**source, "embeddings.position_ids": np.arange(9)[None]}, TOWER.shapes(sizes))
    again = TABLE.to_source(params)
    assert set(source) - set(again) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(np.array_equal(again[k], source[k]) for k in again)
    with pytest.raises(WeightTableError, match="layer_norm/scale"):
        TABLE.to_params(
            {k: v for k, v in source.items() if k != "embeddings.LayerNorm.weight"}, TOWER.shapes(sizes)
        )


def test_full_size_parameter_count():
    pooler = 384 * 384 + 384
    assert sum(map(math.prod, TOWER.shapes(MINILM_L6).values())) + pooler == 22_713_216


def test_errors(pair):
    sizes = pair[2]
    template = Template.of(lambda rngs: TOWER.module(sizes, rngs=rngs))
    with pytest.raises(ValueError, match="max_position_embeddings=9"):
        jax.eval_shape(
            lambda p: template.bind(p)(jnp.ones((1, 10), jnp.int32), jnp.ones((1, 10), jnp.int32)),
            template.shapes,
        )
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        BertConfig.from_hf({**HF, "position_embedding_type": "relative_key"})
