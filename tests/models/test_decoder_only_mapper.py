"""The decoder-only mapper against plain PyTorch: forward, gradients, table, T(0), sizes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.decoder_only_mapper.model import (
    DECODER_ONLY_MAPPER,
    DecoderOnlyMapper,
    DecoderOnlyMapperConfig,
)
from minigpt5_jax.models.decoder_only_mapper.weights import TABLE
from minigpt5_jax.weights.table import WeightTableError

TINY = DecoderOnlyMapperConfig(
    llm_hidden_size=20, d_model=24, nhead=4, num_layers=3, dim_feedforward=40, num_queries=11
)


def template_of(config: DecoderOnlyMapperConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: DecoderOnlyMapper(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray]) -> dict:
    params = TABLE.to_params(source, {k: s.shape for k, s in template.shapes.items()})
    return jax.tree.map(jnp.asarray, params)


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


class TorchMapper(torch.nn.Module):
    """Fidelity 9.1's reading in torch's own modules: MLP, encoder layers, closing norm, zeros behind."""

    def __init__(self, c: DecoderOnlyMapperConfig):
        super().__init__()
        first, second = torch.nn.Linear(c.llm_hidden_size, c.d_model), torch.nn.Linear(c.d_model, c.d_model)
        self.fc = torch.nn.Sequential(first, torch.nn.GELU(), second)
        layer = torch.nn.TransformerEncoderLayer(
            c.d_model,
            c.nhead,
            c.dim_feedforward,
            dropout=0.0,
            layer_norm_eps=c.layer_norm_eps,
            norm_first=True,
            batch_first=True,
        )
        self.llm_to_t2i_mapping = torch.nn.TransformerEncoder(
            layer,
            c.num_layers,
            torch.nn.LayerNorm(c.d_model, eps=c.layer_norm_eps),
            enable_nested_tensor=False,
        )
        self.queries = c.num_queries

    def forward(self, vokens):
        drawn = self.llm_to_t2i_mapping(self.fc(vokens))
        zeros = torch.zeros(len(vokens), self.queries - vokens.shape[1], drawn.shape[2])
        return torch.cat([drawn, zeros], dim=1)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = TorchMapper(TINY)
    with torch.no_grad():  # fresh biases are zero and scales one: perturb, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    template = template_of(TINY)
    return model, source, template, load(template, source)


def test_forward_and_every_gradient_match_torch(pair):
    model, _, template, params = pair
    rematted = template_of(TINY, remat=True)
    rng = np.random.default_rng(0)
    vokens = rng.standard_normal((3, 8, 20)).astype(np.float32)
    vokens[1] = 0.0  # a CFG-dropped group
    weight = rng.standard_normal((3, 11, 24)).astype(np.float32)
    inputs = torch.tensor(vokens, requires_grad=True)
    theirs = model(inputs)
    (theirs * torch.tensor(weight)).sum().backward()

    def loss(params, vokens):
        out = rematted.bind(params)(vokens)
        return (out * weight).sum(), out

    grads_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, dvokens), ours = grads_of(params, jnp.asarray(vokens))
    assert_close(ours, theirs.detach())
    assert_close(template.bind(params)(jnp.asarray(vokens)), theirs.detach())
    assert_close(dvokens, inputs.grad)
    wanted = load(template, {k: p.grad.numpy() for k, p in model.named_parameters()})
    scale = max(float(jnp.abs(g).max()) for g in wanted.values())
    for path, want in wanted.items():
        if path.endswith("k_proj/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-5 * scale
        else:
            assert_close(grads[path], want)


@pytest.mark.parametrize("count", [1, 2, 11])
def test_any_number_of_vokens_up_to_the_condition(pair, count):
    model, _, template, params = pair
    vokens = np.random.default_rng(count).standard_normal((2, count, 20)).astype(np.float32)
    ours = np.asarray(template.bind(params)(jnp.asarray(vokens)))
    with torch.no_grad():
        assert_close(ours, model(torch.tensor(vokens)))
    assert not ours[:, count:].any()


def test_more_vokens_than_the_condition_has_vectors(pair):
    _, _, template, params = pair
    with pytest.raises(ValueError, match=r"12 vokens exceed the 11 vectors .*num_vokens.*encoder_decoder"):
        template.bind(params)(jnp.zeros((1, 12, 20)))


def test_of_zeros_every_voken_says_the_same(pair):
    """No positions and equal inputs: T(0) is one vector, as often as there are vokens, then zeros."""
    _, _, template, params = pair
    [condition] = np.asarray(template.bind(params)(jnp.zeros((1, 8, 20))))
    np.testing.assert_allclose(condition[:8], np.broadcast_to(condition[0], (8, 24)), atol=1e-6)
    assert np.abs(condition[0]).max() > 0.1, "biases act on zeros"
    assert not condition[8:].any()


def test_round_trip_is_exact_and_strict(pair):
    _, source, template, params = pair
    back = TABLE.to_source({k: np.asarray(v) for k, v in params.items()})
    assert back.keys() == source.keys() and len(source) == 4 + 3 * 12 + 2
    assert all(np.array_equal(back[k], source[k]) for k in source)
    with pytest.raises(WeightTableError, match="norm"):
        load(template, {k: v for k, v in source.items() if k != "llm_to_t2i_mapping.norm.bias"})
    with pytest.raises(WeightTableError, match="t2i_decoder_prompt"):
        load(template, source | {"t2i_decoder_prompt": np.zeros((1, 11, 24))})


def test_full_size_counts_and_logical_axes():
    """A layer: attention 4 x (1024^2 + 1024), feed-forward 2 x 1024 x 4096 + 5120, two norms."""
    template = template_of(DECODER_ONLY_MAPPER)
    counts = {"fc": 0, "layers": 0, "norm": 0}
    for path, shape in template.shapes.items():
        counts[path.split("/")[0]] += math.prod(shape.shape)
    layer = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert counts == {"fc": 5_244_928, "layers": 8 * layer, "norm": 2_048}
    assert sum(counts.values()) == 106_016_768
    assert all(len(template.axes[path]) == len(shape.shape) for path, shape in template.shapes.items())
    assert template.axes["layers/feed_forward/linear1/kernel"] == ("layers", "embed", "mlp")


def test_bfloat16_keeps_float32_streams_and_output(pair):
    _, _, template, params = pair
    vokens = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 20)), jnp.float32)
    exact = template.bind(params)(vokens)
    rounded = template_of(TINY, dtype=jnp.bfloat16).bind(params)(vokens)
    assert rounded.dtype == jnp.float32
    assert_close(rounded, exact, 3e-2)
    assert float(jnp.abs(rounded - exact).max()) > 0
