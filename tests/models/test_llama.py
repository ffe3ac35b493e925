"""LLaMA against transformers, peft and the oracle: values, gradients, packing, cache, weights."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import original
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama import weights as maps
from minigpt5_jax.models.llama.model import VICUNA_7B, Llama, LlamaConfig, LoraConfig, init_voken_rows
from minigpt5_jax.weights.table import WeightTableError

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
HF = dict(vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4)
NEW = 9
LENGTHS = (11, 7)  # of two right-padded rows


def template_of(config: LlamaConfig, **kwargs) -> Template:
    return Template.of(lambda rngs: Llama(config, rngs=rngs, **kwargs))


def load(template: Template, source: dict[str, np.ndarray], *, skip: str = "/lora_") -> dict[str, np.ndarray]:
    """Parameters from a state dict whose two tables are whole (V + n rows)."""
    shapes = {k: s.shape for k, s in template.shapes.items() if skip not in k}
    return (maps.TABLE + maps.VOKEN_TABLE).to_params(original.split_tables(source, NEW), shapes)


def numpy_of(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.items()}


def hf_llama(kv_heads: int) -> transformers.LlamaForCausalLM:
    """Random transformers model over V + n rows; norms perturbed, so that none is the identity."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **HF | {"vocab_size": HF["vocab_size"] + NEW},
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (1.0 if "norm" in name else 0.0))
    return model


def our_config(model: transformers.LlamaForCausalLM) -> LlamaConfig:
    return LlamaConfig.from_hf(model.config.to_dict() | {"vocab_size": HF["vocab_size"]})


def rows(lengths=LENGTHS, width: int = HF["hidden_size"]):
    """Random embeddings, positions and segments of right-padded rows."""
    longest = max(lengths)
    embeds = np.random.default_rng(0).standard_normal((len(lengths), longest, width)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), embeds.shape[:2])
    return jnp.asarray(embeds), positions, (positions < jnp.array(lengths)[:, None]).astype(jnp.int32)


def run(llm: Llama, embeds, positions, segments) -> jax.Array:
    """One compiled call."""
    return compiled(lambda *x: llm(x[0], positions=x[1], segment_ids=x[2]))(embeds, positions, segments)


def assert_close(ours, theirs, tolerance=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def tiny():
    """A bound model without LoRA, with its parameters."""
    template = template_of(LlamaConfig(**HF))
    params = template.init(jax.random.key(0))
    return template.bind({k: v * (1 if "scale" in k else 8) for k, v in params.items()})


@pytest.fixture(scope="module")
def tiny_lora():
    """Template and parameters of a model with every LoRA factor away from zero."""
    template = template_of(LlamaConfig(**HF), lora=LoraConfig(r=2, lora_dropout=0.5))
    params = template.init(jax.random.key(0))
    return template, {k: v * (1 if "scale" in k else 8) + 0.3 * ("lora_b" in k) for k, v in params.items()}


# ---------------------------------------------------------------------------------------------
# Against transformers, peft and the original


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_and_gradients_match_transformers(kv_heads):
    model = hf_llama(kv_heads)
    template = template_of(our_config(model))
    source = numpy_of(model.state_dict())
    params = load(template, source)
    embeds, positions, segments = rows()
    inputs = torch.tensor(np.asarray(embeds), requires_grad=True)
    logits = model(inputs_embeds=inputs, attention_mask=torch.tensor(np.asarray(segments))).logits
    weight = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    weight = weight * np.asarray(segments)[..., None]
    (logits * torch.tensor(weight)).sum().backward()

    def loss(params, embeds):
        llm = template.bind(params)
        ours = llm.logits(llm(embeds, positions=positions, segment_ids=segments))
        return (ours * weight).sum(), ours

    (gradients, embeds_gradient), ours = compiled(jax.grad(loss, (0, 1), has_aux=True))(params, embeds)
    real = np.asarray(segments, bool)
    assert_close(ours[real], logits.detach().numpy()[real])
    assert np.isfinite(ours).all()
    assert_close(embeds_gradient, inputs.grad)
    theirs = numpy_of(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    )
    for path, want in load(template, theirs).items():
        if not path.startswith("embed_tokens"):  # fed by embeddings: the tables take no part
            assert_close(gradients[path], want)


def test_embedding_and_its_voken_gradient(tiny):
    tokens = jnp.array([[0, 49, 50, 58], [52, 3, 52, 1]], jnp.int32)
    whole = jnp.concatenate([tiny.embed_tokens.embedding[...], tiny.embed_tokens.voken[...]])
    assert np.array_equal(tiny.embed(tokens), whole[tokens])
    count = jax.grad(lambda rows: tiny_embed(tiny, rows, tokens).sum())(tiny.embed_tokens.voken[...])
    assert np.array_equal(count[:, 0], [1, 0, 2, 0, 0, 0, 0, 0, 1])


def tiny_embed(llm: Llama, voken: jax.Array, tokens: jax.Array) -> jax.Array:
    """``llm.embed`` as a function of the new rows."""
    template = template_of(llm.config)
    shapes = template.shapes
    zeros = {path: jnp.zeros(shape.shape) for path, shape in shapes.items()}
    return template.bind(zeros | {"embed_tokens/voken": voken}).embed(tokens)


def test_lora_matches_peft():
    model = hf_llama(4)
    source = numpy_of(model.state_dict())
    config = our_config(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn_like(p))
    template = template_of(config, lora=LoraConfig(r=3, lora_alpha=12.0))
    lora = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    table = maps.lora_table()
    shapes = {k: s.shape for k, s in template.shapes.items() if "/lora_" in k}
    factors = table.to_params(numpy_of(lora), shapes)
    base = load(template, source)
    again = table.to_source(factors)
    assert again.keys() == lora.keys()
    assert all(np.array_equal(again[n], p.detach().numpy()) for n, p in lora.items())

    embeds, positions, segments = rows()
    inputs, mask = torch.tensor(np.asarray(embeds)), torch.tensor(np.asarray(segments))
    logits = wrapped(inputs_embeds=inputs, attention_mask=mask).logits
    real = np.asarray(segments, bool)
    logits[torch.tensor(real)].square().sum().backward()

    def loss(factors):
        llm = template.bind(base | factors)
        ours = llm.logits(llm(embeds, positions=positions, segment_ids=segments))
        return jnp.square(jnp.where(segments[..., None] > 0, ours, 0)).sum(), ours

    gradients, ours = compiled(jax.grad(loss, has_aux=True))(factors)
    assert_close(ours[real], logits.detach().numpy()[real])
    theirs = table.to_params(numpy_of({n: p.grad for n, p in lora.items()}), shapes)
    for path, want in theirs.items():
        assert_close(gradients[path], want)


def test_oracle_states_and_logits(oracle_weights, oracle_configs, oracle_cases):
    prefix = "model.llama_model."
    source = {k.removeprefix(prefix): v for k, v in oracle_weights.items() if k.startswith(prefix)}
    template = template_of(LlamaConfig.from_hf(oracle_configs["llama"]))
    params = load(template, source)
    again = maps.join_tables((maps.TABLE + maps.VOKEN_TABLE).to_source(params))
    assert source.keys() - again.keys() == {k for k in source if k.endswith("inv_freq")}
    assert all(np.array_equal(again[k], source[k]) for k in again)

    mid = {k.removeprefix("s1/a/mid/"): v for k, v in oracle_cases.items() if k.startswith("s1/a/mid/")}
    segments = jnp.asarray(mid["llm_attention_mask"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    llm = template.bind(params)
    hidden = compiled(lambda x: llm(x, positions=positions, segment_ids=segments))(mid["llm_inputs_embeds"])
    real = np.asarray(segments, bool)
    assert_close(hidden[real], mid["llm_all_hidden"][-1][real], 2e-5)
    row, column = np.nonzero(mid["llm_labels"] != -100)
    base, new = llm.logit_blocks(hidden[row, column - 1])
    assert (base.shape[-1], new.shape[-1]) == (1000, NEW)
    assert_close(np.concatenate([base, new], -1), mid["llm_logits_supervised"], 2e-5)
    ids = jnp.asarray(oracle_cases["s1/a/in/input_ids"], jnp.int32)  # the model puts BOS before them
    kept = oracle_cases["s1/a/in/attention_mask"].astype(bool)
    assert_close(np.asarray(llm.embed(ids))[kept], mid["llm_inputs_embeds"][:, 1:][kept], 1e-6)


# ---------------------------------------------------------------------------------------------
# Packing, dropout, cache


def test_packed_segments_equal_separate_rows(tiny):
    embeds, positions, segments = rows()
    separate = run(tiny, embeds, positions, segments)
    packed = np.zeros((1, 20, HF["hidden_size"]), np.float32)
    place = np.zeros((1, 20), np.int32)
    where = np.zeros((1, 20), np.int32)
    start = 0
    for row, length in enumerate(LENGTHS):
        packed[0, start : start + length] = embeds[row, :length]
        place[0, start : start + length] = np.arange(length)
        where[0, start : start + length] = row + 1
        start += length
    together = run(tiny, *map(jnp.asarray, (packed, place, where)))
    assert np.isfinite(together).all()
    assert_close(together[0, :11], separate[0, :11], 1e-5)
    assert_close(together[0, 11:18], separate[1, :7], 1e-5)


def test_dropout_of_a_row_is_its_own(tiny_lora):
    template, params = tiny_lora
    llm = template.bind(params)
    everything = rows()

    def keys():  # made again for each call: the suite refuses keys used twice
        return jax.random.split(jax.random.key(3), 2)

    @compiled
    def run(inputs, keys):
        embeds, positions, segments = inputs
        return llm(embeds, positions=positions, segment_ids=segments, dropout_keys=keys)

    plain, both = run(everything, None), run(everything, keys())
    assert np.abs(both - plain)[1, :7].max() > 1e-2
    swapped = run(jax.tree.map(lambda x: x[::-1], everything), keys()[::-1])  # another place
    assert_close(swapped[0, :7], both[1, :7], 1e-5)
    shorter = run(jax.tree.map(lambda x: x[1:, :7], everything), keys()[1:])  # another batch and padding
    assert_close(shorter[0], both[1, :7], 1e-5)
    other = run(everything, keys()[::-1])
    assert np.abs(other[1, :7] - both[1, :7]).max() > 1e-2


def test_the_trunk_of_a_tree_has_one_dropout_mask(tiny_lora):
    """Whatever branches stand behind it; two branches of the same tokens have masks of their own."""
    template, params = tiny_lora
    llm, (embeds, _, _) = template.bind(params), rows()
    trunk, branch, other = embeds[:1, :3], embeds[:1, 3:5], embeds[1:, 3:5]
    positions = jnp.array([[0, 1, 2, 3, 4, 3, 4]])
    ends = jnp.array([[7, 7, 7, 5, 5, 7, 7]])

    @compiled
    def run(*branches):
        tree = jnp.concatenate([trunk, *branches], axis=1)
        keys = jax.random.split(jax.random.key(3), 1)
        return llm(tree, positions=positions, segment_ids=1 + 0 * ends, subtree_ends=ends, dropout_keys=keys)

    same, different = run(branch, branch)[0], run(branch, other)[0]
    assert_close(different[:5], same[:5], 1e-5)
    assert np.abs(same[3:5] - same[5:]).max() > 1e-2


def test_remat_changes_memory_not_gradients(tiny_lora):
    template, params = tiny_lora
    again = template_of(LlamaConfig(**HF), lora=LoraConfig(r=2, lora_dropout=0.5), remat=True)
    embeds, positions, segments = rows()
    keys = jax.random.split(jax.random.key(3), 2)
    chosen = ("layers/self_attn/q_proj/lora_a", "layers/mlp/up_proj/kernel")

    def gradient(template):
        def loss(some):
            llm = template.bind(params | some)
            hidden = llm(embeds, positions=positions, segment_ids=segments, dropout_keys=keys)
            return jnp.square(hidden[:, :7, :3]).sum()

        return compiled(jax.grad(loss))({path: params[path] for path in chosen})

    ours, theirs = gradient(again), gradient(template)
    for path in chosen:
        assert_close(ours[path], theirs[path], 1e-5)


def test_cached_pieces_equal_one_call(tiny):
    """Rows advance by different counts in one call; invalid places leave no trace."""
    embeds, positions, segments = rows()
    full = np.asarray(run(tiny, embeds, positions, segments))
    cache = tiny.init_cache(2, 12)
    feed = compiled(lambda x, where, valid, cache: tiny.decode(x, positions=where, valid=valid, cache=cache))
    fed, seen = np.zeros(2, int), np.zeros_like(full)
    for counts in ((4, 2), (1, 1), (0, 3), (5, 1), (1, 0)):
        width = 5
        piece = np.full((2, width, HF["hidden_size"]), 1e3, np.float32)
        place, valid = np.zeros((2, width), np.int32), np.zeros((2, width), bool)
        for row, count in enumerate(counts):
            span = slice(fed[row], fed[row] + count)
            piece[row, :count], place[row, :count] = embeds[row, span], positions[row, span]
            valid[row, :count] = True
        hidden, cache = feed(piece, place, valid, cache)
        assert np.isfinite(hidden).all()
        for row, count in enumerate(counts):
            seen[row, fed[row] : fed[row] + count] = hidden[row, :count]
        fed += counts
    assert tuple(cache.lengths) == tuple(fed) == LENGTHS
    assert_close(seen[0], full[0], 1e-5)
    assert_close(seen[1, :7], full[1, :7], 1e-5)


def test_bf16_keeps_residual_and_new_rows_fp32():
    template = template_of(LlamaConfig(**HF), lora=LoraConfig(), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    for path, shape in template.shapes.items():
        own = "voken" in path or "lora_" in path
        assert shape.dtype == (jnp.float32 if own else jnp.bfloat16), path
    params = template.init(jax.random.key(0))
    llm = template.bind(params)
    embeds, positions, segments = rows()
    assert llm.embed(positions).dtype == jnp.float32
    hidden = run(llm, embeds, positions, segments)
    assert hidden.dtype == jnp.bfloat16  # fidelity 1.13
    assert all(block.dtype == jnp.float32 for block in llm.logit_blocks(hidden))
    exact = template_of(LlamaConfig(**HF), lora=LoraConfig()).bind(
        {path: value.astype(jnp.float32) for path, value in params.items()}
    )
    assert_close(hidden.astype(jnp.float32), run(exact, embeds, positions, segments), 0.02)
    assert llm.init_cache(2, 4).keys.dtype == jnp.bfloat16
    assert llm.init_cache(2, 4, jnp.float32).keys.dtype == jnp.float32


# ---------------------------------------------------------------------------------------------
# Initial values, sizes, refusals


def test_new_rows_start_at_the_mean_and_lora_at_zero(tiny_lora):
    template, _ = tiny_lora
    fresh = template.init(jax.random.key(0))
    assert not np.asarray(fresh["layers/self_attn/v_proj/lora_b"]).any()
    bound = 1 / math.sqrt(HF["hidden_size"])
    spread = np.abs(fresh["layers/self_attn/q_proj/lora_a"])
    assert 0.9 * bound < spread.max() <= bound
    filled = init_voken_rows(fresh)
    assert_close(
        filled["embed_tokens/voken"],
        np.broadcast_to(fresh["embed_tokens/embedding"].mean(0), (NEW, HF["hidden_size"])),
        1e-6,
    )
    assert_close(
        filled["lm_head/voken"],
        np.broadcast_to(fresh["lm_head/kernel"].mean(1), (NEW, HF["hidden_size"])),
        1e-6,
    )


def test_full_size_parameter_counts():
    shapes = template_of(VICUNA_7B, lora=LoraConfig()).shapes
    count = {k: math.prod(s.shape) for k, s in shapes.items()}
    lora = sum(v for k, v in count.items() if "/lora_" in k)
    new = sum(v for k, v in count.items() if k.endswith("/voken"))
    assert (lora, sum(count.values()) - lora - new) == (4_194_304, 6_738_415_616)
    assert sum(count.values()) - lora == 6_738_489_344


def test_table_is_strict():
    model = hf_llama(4)
    template, source = template_of(our_config(model)), numpy_of(model.state_dict())
    with pytest.raises(WeightTableError, match=r"layers/1/mlp/down_proj|lacks layers \[1\]"):
        load(template, {k: v for k, v in source.items() if k != "model.layers.1.mlp.down_proj.weight"})
    with pytest.raises(WeightTableError, match="q_proj.bias"):
        load(template, source | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    with pytest.raises(WeightTableError, match=r"lm_head\.weight"):
        original.split_tables({k: v for k, v in source.items() if k != "lm_head.weight"}, NEW)


def test_configurations_it_does_not_implement_are_refused():
    with pytest.raises(ValueError, match="rope_type='linear'"):
        LlamaConfig.from_hf({"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    with pytest.raises(ValueError, match="tie_word_embeddings=True"):
        LlamaConfig.from_hf({"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="head_dim=64"):
        LlamaConfig.from_hf(HF | {"head_dim": 64})
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        LlamaConfig(**HF, num_key_value_heads=3)
    with pytest.raises(ValueError, match="gate_proj"):
        LoraConfig(target_modules=("q_proj", "gate_proj"))
