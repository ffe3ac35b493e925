"""The CLIP text encoder against transformers and against the original's recorded numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as HfConfig
from transformers import CLIPTextModel as HfModel

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text import weights as maps
from minigpt5_jax.models.clip_text.model import SD21_TEXT, ClipTextConfig, ClipTextModel
from minigpt5_jax.weights.table import WeightTableError

HF = dict(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=9,
    eos_token_id=39,
    bos_token_id=38,
    pad_token_id=0,
)


def template_of(config: ClipTextConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: ClipTextModel(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray]) -> dict:
    params = maps.table_for(source).to_params(source, {k: s.shape for k, s in template.shapes.items()})
    return jax.tree.map(jnp.asarray, params)


def assert_close(ours, theirs, tolerance=1e-4):
    """Largest error relative to the largest value, and absolute where values are below 1."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-8)


def hf_pair(hidden_act: str):
    torch.manual_seed(0)
    model = HfModel(HfConfig(**HF, hidden_act=hidden_act)).eval()
    with torch.no_grad():  # fresh biases are zero and scales one: perturb, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    template = template_of(ClipTextConfig.from_hf(model.config.to_dict()))
    return model, source, template, load(template, source)


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_input_gradient_match_transformers(hidden_act, masked):
    model, _, template, params = hf_pair(hidden_act)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 38, (2, 9))
    mask = (np.arange(9) < np.array([[9], [4]])).astype(np.int32)
    weight = rng.standard_normal((2, 9, 24)).astype(np.float32)

    # One embedding row per position makes the table's gradient the gradient of the input.
    ids[:] = np.arange(18).reshape(2, 9) + 3
    table = model.get_input_embeddings().weight
    theirs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask) if masked else None)
    (theirs.last_hidden_state * torch.tensor(weight)).sum().backward()

    def loss(params):
        out = template.bind(params)(jnp.asarray(ids, jnp.int32), jnp.asarray(mask) if masked else None)
        return (out * weight).sum(), out

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_close(ours, theirs.last_hidden_state.detach())
    assert_close(grads["token_embedding/embedding"], table.grad)
    named = load(template, {k: p.grad.numpy() for k, p in model.named_parameters()})
    for path, want in named.items():
        assert np.abs(want).max() > 0 or path.endswith("k_proj/bias")
        if not path.endswith("k_proj/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert_close(grads[path], want)


def test_mask_changes_pad_positions_only():
    _, _, template, params = hf_pair("gelu")
    ids = jnp.asarray(np.arange(9)[None] + 1, jnp.int32)
    mask = jnp.asarray(np.arange(9)[None] < 4)
    model = jax.jit(template.bind(params))
    with_mask, without = np.asarray(model(ids, mask)), np.asarray(model(ids))
    np.testing.assert_allclose(with_mask[:, :4], without[:, :4], atol=1e-6)
    assert np.abs(with_mask[:, 4:] - without[:, 4:]).max() > 1e-3


def test_oracle_caption_features(oracle_weights, oracle_cases, oracle_configs):
    prefix = "sd_text_encoder."
    source = {k.removeprefix(prefix): v for k, v in oracle_weights.items() if k.startswith(prefix)}
    template = template_of(ClipTextConfig.from_hf(oracle_configs["sd_text_encoder"]))
    model = jax.jit(template.bind(load(template, source)))
    case = {k.removeprefix("s1/sdtok/"): v for k, v in oracle_cases.items() if k.startswith("s1/sdtok/")}
    for item in ("0", "1", "empty"):
        ids = jnp.asarray(case[f"ids_{item}"], jnp.int32)
        mask = jnp.asarray(case[f"mask_{item}"], jnp.int32)
        assert_close(model(ids, mask), case[f"caption_target_{item}"], 1e-5)
        assert_close(model(ids), case[f"stock_pipeline_embeds_{item}"], 1e-5)
        target = {"0": "s1/a/mid/caption_feature", "empty": "s1/empty_text_feature"}.get(item)
        if target:
            assert_close(model(ids, mask), oracle_cases[target], 1e-5)


def test_table_round_trip_is_exact_and_accepts_both_spellings():
    _, source, template, params = hf_pair("gelu")
    bare = {k.removeprefix(maps.PREFIX): v for k, v in source.items()}
    full = {maps.PREFIX + k: v for k, v in bare.items()}
    for names in (bare, full):
        again = maps.table_for(names).to_source(jax.tree.map(np.asarray, load(template, names)))
        assert again.keys() == names.keys()
        assert all(np.array_equal(again[k], names[k]) for k in names)
    full[maps.PREFIX + "embeddings.position_ids"] = np.arange(9)[None]
    assert load(template, full).keys() == params.keys()
    del full["text_model.final_layer_norm.bias"]
    with pytest.raises(WeightTableError, match="final_layer_norm/bias"):
        load(template, full)


def test_full_size_parameter_count():
    shapes = template_of(SD21_TEXT).shapes
    assert sum(math.prod(s.shape) for s in shapes.values()) == 340_387_840


def test_dtypes_remat_and_errors():
    config = ClipTextConfig.from_hf(HF)
    template = template_of(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=True)
    params = template.init(jax.random.key(0))
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = template_of(config).bind({k: v.astype(jnp.float32) for k, v in params.items()})
    ids = jnp.ones((1, 9), jnp.int32)
    out = jax.jit(template.bind(params))(ids)
    assert out.dtype == jnp.float32
    assert np.abs(out - jax.jit(exact)(ids)).max() < 0.1  # bf16 arithmetic, same function
    with pytest.raises(ValueError, match="max_position_embeddings=9"):
        exact(jnp.ones((1, 10), jnp.int32))
    with pytest.raises(ValueError, match="hidden_act='swish'"):
        ClipTextConfig.from_hf({**HF, "hidden_act": "swish"})
    with pytest.raises(ValueError, match="attention_dropout"):
        ClipTextConfig.from_hf({**HF, "attention_dropout": 0.1})
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        ClipTextConfig.from_hf({**HF, "num_attention_heads": 5})
