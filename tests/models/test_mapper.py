"""The feature mapper against torch's nn.Transformer and against the original's recorded numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.mapper.model import MINIGPT5_MAPPER, FeatureMapper, MapperConfig
from minigpt5_jax.models.mapper.weights import TABLE
from minigpt5_jax.weights.table import WeightTableError

TINY = MapperConfig(
    llm_hidden_size=20,
    d_model=24,
    nhead=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dim_feedforward=40,
    num_queries=5,
)


def template_of(config: MapperConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: FeatureMapper(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray]) -> dict:
    params = TABLE.to_params(source, {k: s.shape for k, s in template.shapes.items()})
    return jax.tree.map(jnp.asarray, params)


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


class TorchMapper(torch.nn.Module):
    """Fidelity 1.11 in torch's own modules."""

    def __init__(self, c: MapperConfig):
        super().__init__()
        first, second = torch.nn.Linear(c.llm_hidden_size, c.d_model), torch.nn.Linear(c.d_model, c.d_model)
        self.fc = torch.nn.Sequential(first, torch.nn.GELU(), second)
        self.llm_to_t2i_mapping = torch.nn.Transformer(
            c.d_model,
            c.nhead,
            c.num_encoder_layers,
            c.num_decoder_layers,
            c.dim_feedforward,
            dropout=0.0,
            layer_norm_eps=c.layer_norm_eps,
            norm_first=True,
            batch_first=True,
        )
        self.t2i_decoder_prompt = torch.nn.Parameter(torch.randn(1, c.num_queries, c.d_model))

    def forward(self, vokens):
        prompt = self.t2i_decoder_prompt.repeat(vokens.shape[0], 1, 1)
        return self.llm_to_t2i_mapping(src=self.fc(vokens), tgt=prompt)


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


def random_vokens() -> tuple[jax.Array, np.ndarray]:
    rng = np.random.default_rng(0)
    vokens = rng.standard_normal((3, 8, 20)).astype(np.float32)
    vokens[1] = 0.0  # a CFG-dropped group
    return jnp.asarray(vokens), rng.standard_normal((3, 5, 24)).astype(np.float32)


def test_forward_and_every_gradient_match_torch(pair):
    model, _, template, params = pair
    rematted = template_of(TINY, remat=True)  # the composite's tests take gradients without
    vokens, weight = random_vokens()
    inputs = torch.tensor(np.array(vokens), requires_grad=True)
    theirs = model(inputs)
    (theirs * torch.tensor(weight)).sum().backward()

    def loss(params, vokens):
        out = rematted.bind(params)(vokens)
        return (out * weight).sum(), out

    (grads, dvokens), ours = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, vokens)
    assert_close(ours, theirs.detach())
    assert_close(jax.jit(template.bind(params))(vokens), theirs.detach())
    assert_close(dvokens, inputs.grad)
    wanted = load(template, {k: p.grad.numpy() for k, p in model.named_parameters()})
    scale = max(float(jnp.abs(g).max()) for g in wanted.values())
    for path, want in wanted.items():
        if path.endswith("k_proj/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-5 * scale
        else:
            assert_close(grads[path], want)


def test_oracle(oracle_configs, oracle_weights, oracle_cases):
    fields = dict(oracle_configs["mapper"])
    config = MapperConfig(llm_hidden_size=48, num_queries=fields.pop("n_queries"), **fields)
    template = template_of(config)
    prefixes = ("fc.", "llm_to_t2i_mapping.", "t2i_decoder_prompt")
    source = {k: v for k, v in oracle_weights.items() if k.startswith(prefixes)}
    assert len(source) == 129
    mapper = template.bind(load(template, source))
    case = {k.removeprefix("s1/a/mid/"): v for k, v in oracle_cases.items() if k.startswith("s1/a/mid/")}
    hidden = jax.jit(mapper.fc)(jnp.asarray(case["mapper_in"]))
    assert_close(hidden, case["fc_out"], 1e-5)
    assert_close(jax.jit(mapper.encoder)(hidden), case["mapper_memory"], 1e-5)
    assert_close(jax.jit(mapper)(jnp.asarray(case["mapper_in"])), case["mapper_out"], 1e-5)


def test_round_trip_is_exact_and_strict(pair):
    _, source, template, params = pair
    back = TABLE.to_source({k: np.asarray(v) for k, v in params.items()})
    assert back.keys() == source.keys()
    assert all(np.array_equal(back[k], source[k]) for k in source)
    with pytest.raises(WeightTableError, match="queries"):
        load(template, {k: v for k, v in source.items() if k != "t2i_decoder_prompt"})
    with pytest.raises(WeightTableError, match="fc.4.weight"):
        load(template, source | {"fc.4.weight": np.zeros(3)})


def test_full_size_counts_and_logical_axes():
    template = template_of(MINIGPT5_MAPPER)
    counts = {"fc": 0, "encoder": 0, "decoder": 0, "queries": 0}
    for path, shape in template.shapes.items():
        counts[path.split("/")[0]] += math.prod(shape.shape)
    assert counts == {"fc": 5_244_928, "encoder": 50_386_944, "decoder": 67_188_736, "queries": 78_848}
    assert all(len(template.axes[path]) == len(shape.shape) for path, shape in template.shapes.items())
    assert template.axes["decoder/layers/multihead_attn/q_proj/kernel"] == ("layers", "embed", ("heads", 8))


def test_initialisation_follows_torch(oracle_cases):
    """Same support as the original's fresh values, leaf by leaf."""
    config = MapperConfig(llm_hidden_size=48, d_model=32, nhead=8, dim_feedforward=128)
    params = template_of(config).init(jax.random.key(0))
    source = TABLE.to_source({k: np.asarray(v) for k, v in params.items()})
    names, ranges = oracle_cases["s1/init/mapper_names"], oracle_cases["s1/init/mapper_min_max"]
    assert set(names) == set(source) - {"t2i_decoder_prompt"}
    for name, (low, high) in zip(names, ranges):
        value, bound = source[name], max(-low, high)
        # A bias of 32 values may miss the ends of its range; a matrix of 1024 and more does not.
        slack = 0.03 if value.ndim > 1 else 0.45
        assert np.abs(value).max() == pytest.approx(bound, rel=slack), name
    assert np.std(source["t2i_decoder_prompt"]) == pytest.approx(1.0, rel=0.05)
    assert np.abs(np.mean(source["t2i_decoder_prompt"])) < 0.08


def test_bfloat16_keeps_float32_streams_and_output(pair):
    _, _, template, params = pair
    vokens, _ = random_vokens()
    exact = jax.jit(template.bind(params))(vokens)
    rounded = jax.jit(template_of(TINY, dtype=jnp.bfloat16).bind(params))(vokens)
    assert rounded.dtype == jnp.float32
    assert_close(rounded, exact, 3e-2)
    assert float(jnp.abs(rounded - exact).max()) > 0


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="d_model=10 does not divide into nhead=4"):
        MapperConfig(d_model=10, nhead=4)
