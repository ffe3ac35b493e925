"""The self-test of a checkpoint, on the small world's backbones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt5_jax.config import get_config, use_shapes_backbones
from minigpt5_jax.evaluation.verify import TEXT, Report, VerificationError, problems_of, verify, verify_run
from minigpt5_jax.wiring.pretrained import load_pretrained
from minigpt5_jax.wiring.session import LoadedModel

LLM = "backbone/llm/"


@pytest.fixture(scope="module")
def untrained() -> LoadedModel:
    return load_pretrained(config=use_shapes_backbones(get_config()))


@pytest.fixture(scope="module")
def drawing(untrained) -> LoadedModel:
    """A model that draws: voken rows of their own, [IMG0]'s output row along the state behind the prompt."""
    params, tokenizer = dict(untrained.params), untrained.tokenizer
    ids = np.asarray([[tokenizer.bos_id, *tokenizer.encode(TEXT)]], np.int32)

    @jax.jit
    def last(params, ids):
        llm = untrained.spec.template.bind(params).backbone.llm
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        return llm(llm.embed(ids), positions=positions, segment_ids=jnp.ones_like(ids))[0, -1]

    state = last(params, ids)
    rows = jax.random.normal(jax.random.key(0), params[f"{LLM}embed_tokens/voken"].shape)
    params[f"{LLM}embed_tokens/voken"] = rows
    params[f"{LLM}lm_head/voken"] = 0.01 * rows.at[0].set(1000 * state)
    return dataclasses.replace(untrained, params=params)


@pytest.fixture(scope="module")
def report(drawing) -> Report:
    return verify_run(drawing)


def test_a_model_that_draws_passes_with_its_numbers(report, drawing):
    assert report.drawn and report.forced and report.rank == 1
    assert report.correlation > 0.9, "the shipped UNet predicts noise"
    assert report.parameters == sum(value.size for value in drawing.params.values())
    assert "[IMG0]: rank 1" in str(report) and "drawn by itself: yes" in str(report)


def test_untrained_vokens_are_reported_with_the_numbers(untrained):
    with pytest.raises(VerificationError, match=r"all voken rows are the same: they were never.*(.|\n)*rank"):
        verify_run(untrained)


def test_values_that_are_no_numbers_are_named(drawing):
    path = "mapper/fc/fc1/bias"
    bad = {**drawing.params, path: drawing.params[path].at[0].set(jnp.nan)}
    with pytest.raises(VerificationError, match=f"NaN or infinite: {path}"):
        verify_run(dataclasses.replace(drawing, params=bad))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"rank": 51, "drawn": False}, "never among the 50 likeliest"),
        ({"forced": False}, "cannot be forced"),
        ({"difference": 1e-5}, "do not depend on the vokens"),
        ({"correlation": 0.02}, "does not predict noise: it predicts v"),
        ({"logit": float("nan")}, "NaN or infinite numbers"),
    ],
)
def test_each_thing_that_may_be_wrong_is_named(report, change, match):
    assert not problems_of(report, top_k=50)
    [problem] = problems_of(dataclasses.replace(report, **change), top_k=50)
    assert match in problem


def test_a_half_written_checkpoint_does_not_load(tmp_path):
    (tmp_path / "checkpoints/00000007.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="no complete checkpoint"):
        verify(tmp_path)
