"""Decoding: rules against transformers, the loop against the oracle and against single calls."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import original
from minigpt5_jax.inference.decode import FINISH_REASONS, DecodeResult, decode
from minigpt5_jax.inference.sampling import SamplingConfig, process
from minigpt5_jax.models.abstract import Template, take_layers_apart
from minigpt5_jax.models.llama import weights as llama_map
from minigpt5_jax.models.llama.model import Llama, LlamaConfig

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
N = 8


# ---------------------------------------------------------------------------------------------
# Rules on scores


@pytest.mark.parametrize(
    "penalty, temperature, top_k, top_p",
    [(2.0, 1.0, 50, 0.9), (1.3, 0.7, 0, 0.6), (1.0, 2.0, 5, 1.0), (0.5, 1.0, 500, 0.05), (2.0, 1.5, 0, 1.0)],
)
def test_scores_equal_transformers(penalty, temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((6, 200))).astype(np.float32)
    ids = rng.integers(0, 200, (6, 30))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    theirs += [TemperatureLogitsWarper(temperature)]
    theirs += [TopKLogitsWarper(top_k or logits.shape[1])] + [TopPLogitsWarper(top_p)] * (top_p < 1)
    want = theirs(torch.tensor(ids), torch.tensor(logits)).numpy()

    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    config = SamplingConfig(
        repetition_penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p, stop_sequences=()
    )
    ours = np.asarray(process(jnp.asarray(logits), jnp.asarray(seen), config))
    assert np.array_equal(np.isfinite(ours), np.isfinite(want))
    np.testing.assert_allclose(ours[np.isfinite(ours)], want[np.isfinite(want)], rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_p": 0.0},
        {"temperature": 0.0},
        {"force_image": "last"},
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"force_image": "first", "max_images": 0},
        {"min_text_tokens": 256},
        {"stop_sequences": ((),)},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if len(wrong) == 1 else "max_images"):
        SamplingConfig(**wrong)


# ---------------------------------------------------------------------------------------------
# The loop on a model whose next id is a function of the last one


@dataclasses.dataclass
class Chain:
    """A model of another kind: states are (id, position), the next id is ``follow[id]``."""

    follow: tuple[int, ...]

    def embed(self, tokens):
        return jnp.stack([tokens, jnp.zeros_like(tokens)], -1).astype(jnp.float32)

    def init_cache(self, batch, max_length):
        return jnp.zeros(batch, jnp.int32)

    def decode(self, inputs_embeds, *, positions, valid, cache):
        # Entries come in order and without gaps, or the answer shows it.
        right = positions == cache[:, None] + jnp.cumsum(valid, 1) - 1
        hidden = inputs_embeds.at[..., 1].set(jnp.where(right | ~valid, positions, -99))
        return hidden, cache + valid.sum(1)

    def logits(self, hidden):
        width = len(self.follow)
        best = jnp.array(self.follow)[hidden[..., 0].astype(jnp.int32)]
        second = (best + 1) % width  # what comes when the best is banned
        return 9.0 * jax.nn.one_hot(best, width) + 4.0 * jax.nn.one_hot(second, width)


V = 20
PLAIN = SamplingConfig(
    do_sample=False, repetition_penalty=1.0, max_new_tokens=6, eos_ids=(2,), stop_sequences=((5,), (6, 7))
)


def chain(**follow: int) -> Chain:
    """``_3=4`` means that 4 follows 3; otherwise an id follows itself."""
    table = list(range(V + N + 1))
    for start, to in follow.items():
        table[int(start[1:])] = to
    return Chain(tuple(table))


def answer(model: Chain, prompts: list[list[int]], **settings) -> DecodeResult:
    lengths = jnp.array([len(p) for p in prompts])
    padded = jnp.array([p + [0] * (3 - len(p)) for p in prompts])

    @compiled
    def run(keys):
        config = dataclasses.replace(PLAIN, **settings)
        embeds = model.embed(padded)
        return decode(model, embeds, lengths, keys, config, first_voken_id=V, num_vokens=N)

    return jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), len(prompts))))


def texts(result: DecodeResult) -> list[list[int]]:
    assert all((row[n:] == 0).all() for row, n in zip(result.tokens, result.lengths, strict=True))
    return [list(row[:n]) for row, n in zip(result.tokens, result.lengths, strict=True)]


def reasons(result: DecodeResult) -> list[str]:
    return [FINISH_REASONS[i] for i in result.finish_reason]


def test_every_row_ends_by_its_own_rule():
    model = chain(_3=2, _4=5, _8=6, _6=7, _9=10, _10=7, _7=9)
    result = answer(model, [[3], [1, 1, 4], [1, 8], [9]])
    assert texts(result) == [[2], [5], [6, 7], [10, 7, 9, 10, 7, 9]]
    assert reasons(result) == ["eos", "stop", "stop", "length"]
    assert not result.num_images.any()
    assert (result.voken_position == -1).all()


def test_image_feeds_all_vokens_and_keeps_the_states_before_them():
    """Row 0 starts an image in its second turn; row 1 goes on with single entries meanwhile."""
    model = chain(_3=4, _4=V, **{f"_{V + N - 1}": 11}, _11=2)
    result = answer(model, [[1, 3], [9, 9, 9]])
    assert texts(result) == [[4, V, 11, 2], [9] * 6]
    assert list(result.num_images) == [1, 0]
    assert list(result.voken_position[:, 0]) == [1, -1]
    assert list(result.voken_states[0, 0, :, 0]) == [4, *range(V, V + N - 1)]
    assert list(result.voken_states[0, 0, :, 1]) == list(range(2, 2 + N))  # positions
    assert not result.voken_states[1].any()


def test_images_beyond_the_allowed_are_not_begun():
    model = chain(_3=V, **{f"_{V + N - 1}": V})
    one = answer(model, [[3]], max_new_tokens=4)
    assert texts(one)[0].count(V) == 1
    assert not set(texts(one)[0]) & set(range(V + 1, V + N + 1))
    two = answer(model, [[3]], max_new_tokens=4, max_images=3)
    assert texts(two) == [[V, V, V, 0]]  # the second best is an inner voken, banned as well
    assert list(two.voken_position[0]) == [0, 1, 2]
    assert list(two.voken_states[0, 2, :, 1]) == list(range(2 * N, 3 * N))
    none = answer(model, [[3]], max_new_tokens=2, max_images=0)
    assert V not in texts(none)[0]
    assert none.voken_states.shape == (1, 0, N, 2)
    stray = answer(model, [[3]], max_new_tokens=2, max_images=0, ban_inner_vokens=False)
    assert texts(stray) == [[V + 1, V + 1]]


def test_image_as_the_last_id_has_its_states():
    result = answer(chain(_3=4, _4=V), [[3], [9]], max_new_tokens=2)
    assert texts(result) == [[4, V], [9, 9]]
    assert reasons(result) == ["length", "length"]
    assert list(result.voken_states[0, 0, :, 0]) == [4, *range(V, V + N - 1)]


def test_forced_images():
    model = chain(_3=4, _4=5, _8=6, _6=7, **{f"_{V + N - 1}": 5})
    prompts = [[3], [8], [9]]
    first = answer(model, prompts, force_image="first")
    assert texts(first) == [[V, 5]] * 3
    later = answer(model, prompts, force_image="first", min_text_tokens=1)
    assert texts(later) == [[4, V, 5], [7, V, 5], [9, V, 5]]  # 6 begins an ending: second best
    after = answer(model, prompts, force_image="after_text")
    assert texts(after) == [[4, V, 5], [V, 5], [9, 9, 9, 9, 9, V]]
    assert list(after.num_images) == [1, 1, 1]


def test_text_ends_no_earlier_than_asked():
    model = chain(_3=2, _4=V)
    result = answer(model, [[3], [4]], min_text_tokens=2)
    assert texts(result)[0][:2] == [3, 3]  # 2 is banned: second best
    assert V not in texts(result)[1][:2]


def test_dummy_id_is_penalised_and_written_first():
    model = chain(_3=4, _4=2)
    plain = answer(model, [[3]], repetition_penalty=4.0)
    dummy = answer(model, [[3]], repetition_penalty=4.0, dummy_token_id=4)
    assert texts(plain) == [[4, 2]]
    assert texts(dummy)[0][:2] == [4, 5]  # 9 / 4 for id 4, 4 for id 5


# ---------------------------------------------------------------------------------------------
# The loop on LLaMA


def test_oracle_forced_generation(oracle_weights, oracle_configs, oracle_cases):
    prefix = "model.llama_model."
    source = {k.removeprefix(prefix): v for k, v in oracle_weights.items() if k.startswith(prefix)}
    config = LlamaConfig.from_hf(oracle_configs["llama"])
    template = Template.of(lambda rngs: Llama(config, rngs=rngs))
    params = (llama_map.TABLE + llama_map.VOKEN_TABLE).to_params(
        original.split_tables(source, 9), {k: s.shape for k, s in template.shapes.items()}
    )
    case = {k.removeprefix("s1/i1_forced/"): v for k, v in oracle_cases.items() if "s1/i1_forced/" in k}
    want = case["out/sequences"][0]
    settings = SamplingConfig(
        max_new_tokens=int(case["in/max_new_tokens"]),
        do_sample=False,
        force_image="first",
        eos_ids=(1,),
        dummy_token_id=int(want[0]),
        ban_inner_vokens=False,
    )
    prompt = jnp.asarray(case["mid/prompt_embeds_llm"])

    @compiled
    def run(params, keys):
        llm = template.bind(params)
        lengths = jnp.array([prompt.shape[1]])
        return decode(llm, prompt, lengths, keys, settings, first_voken_id=1000, num_vokens=N)

    result = run(params, jax.random.split(jax.random.key(0), 1))
    assert np.array_equal(result.tokens[0], want)
    assert (int(result.num_images[0]), int(result.voken_position[0, 0])) == (1, 1)
    mapper_in = case["mid/mapper_in"]
    assert np.abs(result.voken_states[0] - mapper_in).max() <= 1e-5 * np.abs(mapper_in).max()

    # Distributions: those behind the first, which forcing made certain.
    seen = np.zeros((6, 1009), bool)
    for step in range(6):
        seen[step, want[: step + 1]] = True
    scores = process(jnp.asarray(case["out/logits_last"]), jnp.asarray(seen), settings)
    probabilities = jax.nn.softmax(scores, axis=-1)
    assert np.abs(probabilities - case["out/probs"])[1:].max() < 1e-6
    assert np.array_equal(probabilities[1:] > 0, case["out/probs"][1:] > 0)
    # At the first step all but [IMG0] has the probability 0 after forcing; what was kept is the same.
    kept = np.isfinite(scores[0]) | (np.arange(1009) == 1000)
    assert case["out/probs"][0, 1000] > 0.999
    assert (case["out/probs"][0, ~kept] == 0).all()


SAMPLED = SamplingConfig(
    max_new_tokens=10,
    max_images=2,
    top_k=0,
    top_p=1.0,
    temperature=2.0,
    repetition_penalty=1.1,
    eos_ids=(2, 7),
    stop_sequences=((5,), (11, 12)),
)
PROMPTS = ((4, 9, 30, 3, 22, 17, 35), (8, 8), (33, 20, 21, 22, 39), (6,), (13, 38, 9, 25), (31, 19, 4))


@pytest.fixture(scope="module")
def small():
    """Bound tiny LLaMA that draws ``[IMG0]`` (id 40) often."""
    template, params = make_small()
    return template.bind(params)


def make_small():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    template = Template.of(lambda rngs: Llama(config, rngs=rngs))
    params = {k: v * (1 if "scale" in k else 12) for k, v in template.init(jax.random.key(0)).items()}
    params["lm_head/voken"] = params["lm_head/voken"].at[0].mul(8)
    return template, params


@pytest.fixture(scope="module")
def sample(small):
    """``sample(rows, seed) -> DecodeResult`` of some of the prompts, each with its own key of the seed."""

    @compiled
    def run(ids, lengths, keys):
        return decode(small, small.embed(ids), lengths, keys, SAMPLED, first_voken_id=40, num_vokens=N)

    def sample(rows: slice, seed: int) -> DecodeResult:
        ids = jnp.array([p + (3,) * (7 - len(p)) for p in PROMPTS], jnp.int32)[rows]
        lengths = jnp.array([len(p) for p in PROMPTS])[rows]
        keys = jax.random.split(jax.random.key(seed), len(PROMPTS))[rows]
        return jax.tree.map(np.asarray, run(ids, lengths, keys))

    return sample


def test_a_row_does_not_depend_on_its_batch(sample):
    everything = slice(None)
    many = sample(everything, 5)
    assert many.num_images.max() == 2 and len(set(many.lengths)) > 2  # rows do differ
    for row in range(len(PROMPTS)):
        alone = sample(slice(row, row + 1), 5)
        for name in ("tokens", "lengths", "voken_position", "num_images", "finish_reason"):
            assert np.array_equal(getattr(alone, name)[0], getattr(many, name)[row]), name
        np.testing.assert_allclose(alone.voken_states[0], many.voken_states[row], atol=1e-5)
    assert not np.array_equal(sample(everything, 6).tokens, many.tokens)


def test_layers_taken_apart_give_the_same_states(small):
    template, params = make_small()
    stacked = [path for path, axes in template.axes.items() if "layers" in axes]
    take_layers_apart(params, stacked)
    take_layers_apart(params, stacked)  # a second session of the same model
    assert all(isinstance(params[path], tuple) == (path in stacked) for path in params) and stacked
    ids = jnp.array([PROMPTS[0]])
    place, valid = jnp.arange(7)[None], jnp.ones((1, 7), bool)

    def run(llm):
        options = {"positions": place, "valid": valid, "cache": llm.init_cache(1, 9)}
        states, cache = llm.decode(llm.embed(ids), **options)
        return states, cache.keys

    for one, other in zip(compiled(run)(small), compiled(run)(template.bind(params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "platform, module_name, package",
    [("cuda", "jax_cuda13_plugin", "jax[cuda13]"), ("tpu", "libtpu", "jax[tpu]")],
)
def test_layers_apart_are_not_copied_where_it_is_compiled_for(platform, module_name, package):
    pytest.importorskip(module_name, reason=f"{module_name} is not installed; pip install '{package}'")
    worker = [sys.executable, str(Path(__file__).with_name("decode_worker.py")), platform]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    # cuBLAS has no product of 8 and 16 bits, and the compiler's own kernels are switched off in the worker.
    ways = ("stacked", "apart", *(("apart int8",) if platform == "tpu" else ()))
    found = {how: subprocess.run([*worker, *how.split()], **options) for how in ways}
    assert all(done.returncode == 0 for done in found.values()), [d.stderr[-1000:] for d in found.values()]
    for how in ways[1:]:  # in 8 bits no matrix is written out in 16, either
        assert found[how].stdout.startswith("0 "), found[how].stdout
    assert not found["stacked"].stdout.startswith("0 "), "the counter sees copies where there are some"


def test_voken_states_are_those_of_training(small, sample):
    """One call over prompt and answer, vokens written out, gives the states that were collected."""
    result = sample(slice(None), 5)
    whole, starts = np.zeros((len(PROMPTS), 40), np.int32), []
    lengths = np.zeros((len(PROMPTS), 1), int)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for token in texts(result)[row]:
            if token == 40:
                starts.append((row, len(ids)))
            ids += range(40, 40 + N) if token == 40 else [token]
        whole[row, : len(ids)], lengths[row] = ids, len(ids)
    place = jnp.broadcast_to(jnp.arange(40), whole.shape)

    @compiled
    def run(ids, segments):
        return small(small.embed(ids), positions=place, segment_ids=segments)

    hidden = run(jnp.asarray(whole), (place < lengths).astype(jnp.int32))
    assert len(starts) == result.num_images.sum() >= 3
    drawn = np.arange(SAMPLED.max_images) < result.num_images[:, None]
    for (row, start), ours in zip(starts, result.voken_states[drawn], strict=True):
        np.testing.assert_allclose(ours, hidden[row, start - 1 : start + N - 1], atol=1e-5)
