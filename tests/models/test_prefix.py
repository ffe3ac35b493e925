"""Prefix tuning: PEFT's layout, transformers' numbers, decoding, and the reference's count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers import LlamaConfig as HfConfig

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import VICUNA_7B, Llama, LlamaConfig
from minigpt5_jax.models.llama.weights import TABLE
from minigpt5_jax.models.prefix import PrefixConfig

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PREFIX = PrefixConfig(num_virtual_tokens=3, encoder_hidden_size=16)


def models():
    template = Template.of(lambda rngs: Llama(CONFIG, prefix=PREFIX, rngs=rngs))
    params = template.init(jax.random.key(0))
    hf = LlamaForCausalLM(
        HfConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    ).eval()
    known = {p: np.asarray(v) for p, v in params.items() if "voken" not in p and "prefix" not in p}
    hf.load_state_dict({key: torch.tensor(value) for key, value in TABLE.to_source(known).items()})
    return template, params, hf


def torch_prefix(params) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's PrefixEncoder written out: [n, 2 layers width], viewed and permuted into (key, value) pairs."""
    value = {k: torch.tensor(np.asarray(v)) for k, v in params.items() if "prefix_encoder" in k}
    hidden = value["prefix_encoder/embedding"]
    for i, act in ((0, torch.tanh), (1, lambda x: x)):
        kernel, bias = (value[f"prefix_encoder/transform/{i}/{leaf}"] for leaf in ("kernel", "bias"))
        hidden = act(hidden @ kernel + bias)
    pairs = hidden.view(1, 3, 2 * 2, 2, 8).permute(2, 0, 3, 1, 4).split(2)
    return [(pair[0], pair[1]) for pair in pairs]


def test_states_equal_transformers_with_past_key_values():
    template, params, hf = models()
    embeds = np.random.default_rng(0).standard_normal((1, 7, 32)).astype(np.float32)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(torch_prefix(params)):
        cache.update(key, value, layer)
    with torch.no_grad():
        want = hf.model(
            inputs_embeds=torch.tensor(embeds),
            past_key_values=cache,
            attention_mask=torch.ones(1, 10),
            position_ids=torch.arange(3, 10)[None],
        ).last_hidden_state.numpy()
    positions = jnp.arange(7)[None]
    got = template.bind(params)(
        jnp.asarray(embeds), positions=positions, segment_ids=jnp.ones((1, 7), jnp.int32)
    )
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    without = {p: jnp.zeros_like(v) if "prefix" in p else v for p, v in params.items()}
    other = template.bind(without)(
        jnp.asarray(embeds), positions=positions, segment_ids=jnp.ones((1, 7), jnp.int32)
    )
    assert np.abs(other - got).max() > 1e-2, "the prefix changes nothing"


def test_decoding_in_pieces_equals_the_whole_sequence():
    template, params, _ = models()
    model = template.bind(params)
    embeds = jax.random.normal(jax.random.key(2), (2, 7, 32))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    whole = model(embeds, positions=positions, segment_ids=jnp.ones((2, 7), jnp.int32))
    cache, parts = model.init_cache(2, 7), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        part, cache = model.decode(
            embeds[:, start:stop],
            positions=positions[:, start:stop],
            valid=jnp.ones((2, stop - start), bool),
            cache=cache,
        )
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_full_size_count():
    template = Template.of(lambda rngs: Llama(VICUNA_7B, prefix=PrefixConfig(), rngs=rngs))
    assert sum(s.size for p, s in template.shapes.items() if "prefix_encoder" in p) == 272_913_408
