"""The EVA ViT against transformers' BLIP-2 vision model, and the import of the original's weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Blip2VisionConfig, Blip2VisionModel

import original
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.eva_vit import weights as maps
from minigpt5_jax.models.eva_vit.model import EVA_VIT_G, EvaVit, EvaVitConfig
from minigpt5_jax.weights.table import Table, WeightTableError

HF = dict(
    hidden_size=24,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=12,
    patch_size=4,
)


def template_of(config: EvaVitConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: EvaVit(config, rngs=rngs, **kwargs))


def load(template: Template, table: Table, source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return table.to_params(source, {k: s.shape for k, s in template.shapes.items()})


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def hf():
    """A perturbed BLIP-2 vision model (key bias kept at zero), its tensors, and our parameters."""
    torch.manual_seed(0)
    model = Blip2VisionModel(Blip2VisionConfig(**HF)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            if name.endswith("qkv.bias"):
                p[24:48] = 0
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    template = template_of(EvaVitConfig.from_hf(model.config.to_dict()))
    return model, source, template, load(template, maps.HF_TABLE, source)


def test_forward_and_gradients_match_transformers(hf):
    model, _, template, params = hf
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 12, 12, 3)).astype(np.float32)
    weight = rng.standard_normal((2, 10, 24)).astype(np.float32)

    # Without post_layernorm, which is the backbone's ln_vision.
    inputs = torch.tensor(pixels).permute(0, 3, 1, 2).requires_grad_()
    theirs = model.encoder(inputs_embeds=model.embeddings(inputs)).last_hidden_state
    (theirs * torch.tensor(weight)).sum().backward()

    def loss(params, pixels):
        out = template.bind(params)(pixels)
        return (out * weight).sum(), out

    (grads, pixel_grad), ours = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        jax.tree.map(jnp.asarray, params), jnp.asarray(pixels)
    )
    assert_close(ours, theirs.detach())
    assert_close(pixel_grad, inputs.grad.permute(0, 2, 3, 1))
    tensors = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    for key in tensors:
        if key.endswith("qkv.bias"):
            tensors[key][24:48] = 0  # their key bias exists, though softmax ignores it: rounding noise
    for path, want in load(template, maps.HF_TABLE, tensors).items():
        assert_close(grads[path], want)


def test_tables_are_inverse_and_agree(hf):
    _, source, template, params = hf
    kept = {k: v for k, v in source.items() if not k.startswith("post_layernorm")}
    again = maps.HF_TABLE.to_source(params)
    assert again.keys() == kept.keys()
    assert all(np.array_equal(again[k], kept[k]) for k in kept)

    table = maps.table(EvaVitConfig.from_hf(HF))
    eva = table.to_source(params)
    assert eva["blocks.2.attn.qkv.weight"].shape == (72, 24)
    np.testing.assert_array_equal(
        eva["blocks.2.attn.qkv.weight"], source["encoder.layers.2.self_attn.qkv.weight"]
    )
    back = load(template, table, eva)
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[k], params[k]) for k in params)


def test_key_bias_that_is_not_zero_is_refused(hf):
    _, source, template, _ = hf
    bias = source["encoder.layers.1.self_attn.qkv.bias"].copy()
    bias[30] = 1e-3
    with pytest.raises(WeightTableError, match="no key bias"):
        load(template, maps.HF_TABLE, {**source, "encoder.layers.1.self_attn.qkv.bias": bias})


def test_original_checkpoint_imports_completely(oracle_weights, oracle_configs):
    prefix = "model.visual_encoder."
    source = {k.removeprefix(prefix): v for k, v in oracle_weights.items() if k.startswith(prefix)}
    config = original.eva_config(oracle_configs["eva_vit"])
    assert config.intermediate_size == 244
    table, template = maps.table(config), template_of(config)
    params = load(template, table, source)
    assert params.keys() == template.shapes.keys()
    again = table.to_source(params)
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[k], source[k]) for k in source)

    # eva_vit_g.pth also has a 40th block, a closing norm and a head; anything else is an error.
    extra = {k.replace("blocks.2.", "blocks.3."): v for k, v in source.items() if k.startswith("blocks.2.")}
    extra |= {"norm.weight": np.ones(56), "head.bias": np.ones(5), "fc_norm.bias": np.ones(56)}
    more = load(template, table, {**source, **extra})
    assert all(np.array_equal(more[k], params[k]) for k in params)
    with pytest.raises(WeightTableError, match=r"blocks\.1\.attn\.k_bias"):
        load(template, table, {**source, "blocks.1.attn.k_bias": np.ones(56)})
    with pytest.raises(WeightTableError, match=r"blocks/mlp/fc1/bias' lacks layers \[1\]"):
        load(template, table, {k: v for k, v in source.items() if k != "blocks.1.mlp.fc1.bias"})


def test_full_size_parameter_count():
    shapes = template_of(EVA_VIT_G).shapes
    assert sum(math.prod(s.shape) for s in shapes.values()) == 985_894_528
    assert EVA_VIT_G == original.eva_config(
        dict(img_size=224, patch_size=14, mlp_ratio=4.3637, embed_dim=1408, depth=39, num_heads=16)
    )


def test_dtype_remat_and_errors(hf):
    _, _, template, params = hf
    config = EvaVitConfig.from_hf(HF)
    half = template_of(config, dtype=jnp.bfloat16, remat=True).bind(jax.tree.map(jnp.asarray, params))
    pixels = jnp.asarray(np.random.default_rng(1).standard_normal((1, 12, 12, 3)), jnp.float32)
    out, exact = half(pixels), template.bind(jax.tree.map(jnp.asarray, params))(pixels)
    assert out.dtype == jnp.bfloat16
    assert jnp.abs(out - exact).max() < 0.05 * jnp.abs(exact).max()
    with pytest.raises(ValueError, match="image_size=12"):
        half(jnp.zeros((1, 16, 16, 3)))
    for field, value in {
        "qkv_bias": False,
        "attention_dropout": 0.1,
        "hidden_act": "swish",
        "num_attention_heads": 5,
        "image_size": 13,
    }.items():
        with pytest.raises(ValueError, match=field):
            EvaVitConfig.from_hf({**HF, field: value})
