"""CLIP whole and its image encoder against transformers, in the names of Hugging Face and of OpenAI."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig as HfConfig
from transformers import CLIPModel as HfModel

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip.model import CLIP_B16, CLIP_B32, CLIP_L14, Clip, ClipConfig
from minigpt5_jax.models.clip.weights import HF_TABLE, OPENAI_TABLE, TOWER, sizes_of, table_for
from minigpt5_jax.models.clip_vision.weights import TOWER as VISION
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.table import WeightTableError

WIDTHS = dict(intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu")
HF = dict(
    text_config=dict(
        WIDTHS, hidden_size=16, vocab_size=30, max_position_embeddings=7, eos_token_id=29, bos_token_id=28
    ),
    vision_config=dict(WIDTHS, hidden_size=24, image_size=12, patch_size=4),
    projection_dim=20,
)


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-8)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = HfModel(HfConfig(**HF)).eval()
    with torch.no_grad():  # fresh biases are zero and scales one: perturb, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    sizes = ClipConfig.from_hf(model.config.to_dict())
    params = jax.tree.map(jnp.asarray, table_for(source).to_params(source, TOWER.shapes(sizes)))
    return model, source, sizes, params


def test_features_and_gradients_match_transformers(pair):
    model, _, sizes, params = pair
    template = Template.of(lambda rngs: Clip(sizes, rngs=rngs))
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 12, 12, 3)).astype(np.float32)
    ids = np.array([[28, 3, 4, 29, 0, 0, 0], [28, 5, 6, 7, 8, 9, 29]])

    def both(params):
        clip = template.bind(params)
        image, text = (
            clip.image_features(jnp.asarray(pixels)),
            clip.text_features(jnp.asarray(ids, jnp.int32), jnp.asarray([3, 6])),
        )
        return (image * jnp.arange(20)).sum() + (text * jnp.arange(20)).sum(), (image, text)

    grads, (image, text) = jax.jit(jax.grad(both, has_aux=True))(params)
    vision = model.vision_model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    their_image = model.visual_projection(vision.pooler_output)
    states = model.text_model(input_ids=torch.tensor(ids)).last_hidden_state
    their_text = model.text_projection(states[torch.arange(2), torch.tensor([3, 6])])
    assert_close(image, their_image.detach())
    assert_close(text, their_text.detach())
    ((their_image + their_text) * torch.arange(20)).sum().backward()
    named = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    for path, want in HF_TABLE.to_params(
        {k: g.numpy() for k, g in named.items()}, TOWER.shapes(sizes)
    ).items():
        if path.endswith("k_proj/bias"):  # analytically zero: softmax ignores a shift of all keys
            assert np.abs(grads[path]).max() < 1e-3
        else:
            assert_close(grads[path], want)


def test_every_form_of_names_gives_the_same_parameters(pair):
    _, source, sizes, params = pair
    shapes = TOWER.shapes(sizes)
    host = jax.tree.map(np.asarray, params)
    old = source | {
        "text_model.embeddings.position_ids": np.arange(7),
        "vision_model.embeddings.position_ids": np.arange(10),
    }
    openai = OPENAI_TABLE.to_source(host)
    assert openai["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (72, 24)
    assert openai["visual.proj"].shape == (24, 20) and openai["text_projection"].shape == (16, 20)
    assert np.array_equal(
        openai["transformer.resblocks.0.attn.in_proj_weight"][16:32],
        source["text_model.encoder.layers.0.self_attn.k_proj.weight"],
    )
    stored = openai | {name: np.array(1) for name in ("input_resolution", "context_length", "vocab_size")}
    for form in (source, old, openai, stored):
        again = table_for(form).to_params(form, shapes)
        assert again.keys() == host.keys() and all(np.array_equal(again[k], host[k]) for k in host)
    again = HF_TABLE.to_source(host)
    assert again.keys() == source.keys() and all(np.array_equal(again[k], source[k]) for k in again)
    with pytest.raises(WeightTableError, match="vision/class_embedding"):
        OPENAI_TABLE.to_params({k: v for k, v in openai.items() if "class" not in k}, shapes)


def test_image_encoder_alone_reads_a_file_of_the_whole(pair):
    model, source, sizes, _ = pair
    shapes = VISION.shapes(sizes.vision_config)
    alone = {k: v for k, v in source.items() if k.startswith("vision_model.")}
    bare = {k.removeprefix("vision_model."): v for k, v in alone.items()}
    forms = [VISION.table(form, None).to_params(form, shapes) for form in (source, alone, bare)]
    assert all(np.array_equal(f[k], forms[0][k]) for f in forms for k in shapes)
    template = Template.of(lambda rngs: VISION.module(sizes.vision_config, rngs=rngs))
    pixels = np.random.default_rng(2).standard_normal((1, 12, 12, 3)).astype(np.float32)
    out = template.bind(jax.tree.map(jnp.asarray, forms[0]))(jnp.asarray(pixels))
    theirs = model.vision_model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    assert_close(out.tokens, theirs.last_hidden_state.detach())
    assert_close(out.pooled, theirs.pooler_output.detach())
    with pytest.raises(ValueError, match="image_size=12"):
        template.bind(forms[0])(jnp.zeros((1, 8, 8, 3)))


def test_full_size_parameter_counts():
    count = lambda sizes: sum(map(math.prod, TOWER.shapes(sizes).values()))  # noqa: E731
    assert count(CLIP_L14) == 427_616_513
    assert count(CLIP_B32) == 151_277_313


@pytest.mark.parametrize("preset", [CLIP_L14, CLIP_B32, CLIP_B16])
def test_sizes_are_told_by_the_image_encoder(preset):
    vision = preset.vision_config
    shape = np.broadcast_to(np.float16(0), (vision.hidden_size, 3, vision.patch_size, vision.patch_size))
    assert sizes_of({"visual.conv1.weight": shape}) == preset
    assert sizes_of({"vision_model.embeddings.patch_embedding.weight": shape}) == preset
    assert sizes_of({"visual.conv1.weight": shape}, "gelu").text_config.hidden_act == "gelu"


def test_other_files_are_named():
    with pytest.raises(WeightFileError, match="no image encoder of CLIP; give the folder"):
        sizes_of({"visual.layer1.0.conv1.weight": np.zeros(1)})
    with pytest.raises(WeightFileError, match="width 1280 and patches of 14 .* config.json"):
        sizes_of({"visual.conv1.weight": np.broadcast_to(np.float16(0), (1280, 3, 14, 14))})
    with pytest.raises(ValueError, match="not the config.json of CLIP whole"):
        ClipConfig.from_hf({"hidden_size": 3})
