"""The backward pass costs activations only: no matmul makes the gradient of a frozen leaf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import tiny
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness, loss_counts
from minigpt5_jax.training.flops import count_flops
from minigpt5_jax.training.step import (
    StepOptions,
    accumulate_gradients,
    loss_and_diagnostics,
)
from minigpt5_jax.training.tuning import FROZEN, label_parameters

OPTIONS = StepOptions(LossOptions())


@pytest.fixture(scope="module")
def flops(tiny_template, tiny_batch):
    """FLOPs of forward, of the step's gradients, and of gradients of every leaf."""
    labels = label_parameters(tiny_template.shapes, tiny.rules("stage1"))
    shapes = tiny_template.shapes
    trainable = {path: shape for path, shape in shapes.items() if labels[path] != FROZEN}
    frozen = {path: shape for path, shape in shapes.items() if labels[path] == FROZEN}
    generator = tiny_template.bind(shapes).generator
    batch = jax.tree.map(jnp.asarray, tiny_batch(8))

    def draw(batch):
        return StepRandomness.from_key(jax.random.key(0), batch, generator, cfg_dropout=OPTIONS.cfg_dropout)

    def forward(trainable, frozen):
        draws = draw(batch)
        counts = loss_counts(batch, draws, OPTIONS.loss)
        return loss_and_diagnostics(tiny_template, trainable, frozen, batch, draws, counts, OPTIONS.loss)[0]

    def step(trainable, frozen):
        return accumulate_gradients(tiny_template, trainable, frozen, batch, draw, OPTIONS)[0]

    def everything(trainable, frozen):
        return jax.grad(forward, argnums=(0, 1))(trainable, frozen)

    return {f.__name__: count_flops(f, trainable, frozen).total for f in (forward, step, everything)}


def test_frozen_weights_get_no_gradient_matmuls(flops, tiny_template):
    # Backward through a frozen tower costs its forward once more (activations), through a trained one
    # twice.  VAE and text encoder have no backward at all, so twice the forward is an upper bound
    # for all that is frozen; the mapper's own weight gradients come on top.
    mapper = sum(
        2 * shape.size
        for path, shape in tiny_template.shapes.items()
        if path.startswith("mapper/") and shape.ndim > 1
    )
    vokens_and_queries, rows = 12 + 8, 8
    assert flops["step"] < 2.05 * flops["forward"] + mapper * vokens_and_queries * rows
    assert flops["everything"] > flops["step"] + 0.3 * flops["forward"]
