"""The Q-Former against transformers' query-only BLIP-2 Q-Former, and the import of the original's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.qformer import weights as maps
from minigpt5_jax.models.qformer.model import BLIP2_QFORMER, QFormer, QFormerConfig
from minigpt5_jax.weights.table import Table, WeightTableError

HF = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, encoder_hidden_size=20
)


def template_of(config: QFormerConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: QFormer(config, rngs=rngs, **kwargs))


def load(template: Template, table: Table, source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return table.to_params(source, {k: s.shape for k, s in template.shapes.items()})


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def hf_model(frequency: int):
    """A perturbed Q-Former, query tokens, and the tensors of both under ``Blip2Model``'s names."""
    torch.manual_seed(0)
    model = Blip2QFormerModel(Blip2QFormerConfig(**HF, cross_attention_frequency=frequency)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(0.15 * torch.randn_like(p) + (1.0 if norm else 0.0))
    queries = torch.randn(1, 5, 24, requires_grad=True)
    config = QFormerConfig.from_hf(model.config.to_dict(), num_query_tokens=5)
    source = {"qformer." + k: v.numpy() for k, v in model.state_dict().items()}
    return model, queries, {"query_tokens": queries.detach().numpy(), **source}, config


@pytest.mark.parametrize("frequency", [1, 2, 4])
def test_forward_and_gradients_match_transformers(frequency):
    model, queries, source, config = hf_model(frequency)
    template, table = template_of(config), maps.hf_table(config)
    params = load(template, table, source)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 7, 20)).astype(np.float32)
    weight = rng.standard_normal((2, 5, 24)).astype(np.float32)

    inputs = torch.tensor(image, requires_grad=True)
    theirs = model(queries.expand(2, -1, -1), encoder_hidden_states=inputs).last_hidden_state
    (theirs * torch.tensor(weight)).sum().backward()

    def loss(params, image):
        out = template.bind(params)(image)
        return (out * weight).sum(), out

    (grads, image_grad), ours = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        jax.tree.map(jnp.asarray, params), jnp.asarray(image)
    )
    assert_close(ours, theirs.detach())
    assert_close(image_grad, inputs.grad)
    tensors = {"qformer." + k: p.grad.numpy() for k, p in model.named_parameters()}
    for path, want in load(template, table, {"query_tokens": queries.grad.numpy(), **tensors}).items():
        if path.endswith("key/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-4
        else:
            assert_close(grads[path], want)

    again = table.to_source(params)
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[k], source[k]) for k in source)


def test_original_checkpoint_imports_completely(oracle_weights, oracle_configs):
    prefix = "model."
    source = {
        k.removeprefix(prefix): v
        for k, v in oracle_weights.items()
        if k.startswith(("model.Qformer.", "model.query_tokens"))
    }
    config = QFormerConfig.from_hf(
        oracle_configs["qformer_bert"],
        encoder_hidden_size=oracle_configs["eva_vit"]["embed_dim"],
        num_query_tokens=oracle_configs["num_query_token"],
        cross_attention_frequency=oracle_configs["cross_attention_freq"],
    )
    table, template = maps.table(config), template_of(config)
    params = load(template, table, source)
    assert params.keys() == template.shapes.keys()
    again = table.to_source(params)
    assert source.keys() - again.keys() == {"Qformer.bert.embeddings.position_ids"}
    assert again.keys() < source.keys()
    assert all(np.array_equal(again[k], source[k]) for k in again)

    # LAVIS's file has the text branch too; anything else is an error that names it.
    text = [
        "Qformer.bert.encoder.layer.1.intermediate.dense.weight",
        "Qformer.cls.predictions.bias",
        "Qformer.bert.encoder.layer.0.output.LayerNorm.bias",
        "t5_proj.weight",
        "Qformer.bert.embeddings.word_embeddings.weight",
    ]
    load(template, table, {**source, **{name: np.zeros(3) for name in text}})
    stray = "Qformer.bert.encoder.layer.1.crossattention.self.key.bias"  # layer 1 has none
    with pytest.raises(WeightTableError, match=stray.replace(".", r"\.")):
        load(template, table, {**source, stray: np.zeros(40)})
    lost = "Qformer.bert.encoder.layer.3.output_query.dense.bias"
    with pytest.raises(WeightTableError, match=r"groups/layer/1/output_query/bias' lacks layers \[1\]"):
        load(template, table, {k: v for k, v in source.items() if k != lost})


def test_full_size_parameter_count():
    shapes = template_of(BLIP2_QFORMER).shapes
    assert math.prod(shapes["query_tokens"].shape) == 24_576
    assert sum(math.prod(s.shape) for s in shapes.values()) == 105_137_664 + 24_576


def test_dtype_remat_and_errors():
    config = QFormerConfig.from_hf(HF, num_query_tokens=5)
    params = template_of(config).init(jax.random.key(0))
    image = jax.random.normal(jax.random.key(1), (1, 7, 20))
    exact = template_of(config).bind(params)(image)
    out = template_of(config, dtype=jnp.bfloat16, remat=True).bind(params)(image.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    assert 0 < jnp.abs(out - exact).max() < 0.1
    for field, value in {
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "hidden_act": "swish",
        "position_embedding_type": "relative_key",
    }.items():
        with pytest.raises(ValueError, match=field):
            QFormerConfig.from_hf({**HF, field: value})
