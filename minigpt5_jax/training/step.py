"""The train step: one pure function, jitted once, for every stage and variant.

Stages differ in loss weights and tuning patterns, which arrive as values; there is no ``if stage``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from minigpt5_jax.batch import Batch
from minigpt5_jax.minigpt5 import LossOptions, StepRandomness, SumCount, loss_counts, parts_with_gradient
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.training.optimizer import with_frozen_masked
from minigpt5_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the step needs to know besides the model.

    Attributes:
      loss: weights and target rules of the losses.
      cfg_dropout: probability that an item's voken states are zeroed.
      lora_dropout: whether LoRA dropout is drawn.
      accumulation: micro-batches per update; batches then carry a leading axis of this length.
    """

    loss: LossOptions
    cfg_dropout: float = 0.1
    lora_dropout: bool = False
    accumulation: int = 1


def loss_and_diagnostics(
    template: Template,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Batch,
    draws: StepRandomness,
    counts: Mapping[str, jax.Array],
    options: LossOptions,
) -> tuple[jax.Array, dict[str, SumCount]]:
    """Weighted sum of ``sum_k / counts[k]`` and every (sum, count) seen on the way.

    ``counts`` are those of the whole update, so that micro-batches add up to the large batch.
    """
    model = template.bind({**frozen, **trainable})
    losses, diagnostics = model.losses(batch, draws, options)
    total = sum(
        weight * losses[name][0] / jnp.maximum(counts[name], 1.0) for name, weight in options.weights.items()
    )
    return total, {**losses, **diagnostics}


def accumulate_gradients(
    template: Template,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    draw: Callable[[Batch], StepRandomness],
    options: StepOptions,
) -> tuple[Params, jax.Array, dict[str, SumCount]]:
    """Gradients of the trainables, total loss and (sum, count)s over all micro-batches."""
    grad_of = jax.value_and_grad(
        lambda t, micro, draws, counts: loss_and_diagnostics(
            template, t, frozen, micro, draws, counts, options.loss
        ),
        has_aux=True,
    )
    if options.accumulation == 1:
        draws = draw(batch)
        (loss, sums), grads = grad_of(trainable, batch, draws, loss_counts(batch, draws, options.loss))
        return grads, loss, sums

    draws = jax.vmap(draw)(batch)
    counts = loss_counts(batch, draws, options.loss)

    def body(carry, inputs):
        micro, micro_draws = inputs
        (loss, sums), grads = grad_of(trainable, micro, micro_draws, counts)
        return jax.tree.map(jnp.add, carry, (grads, loss, sums)), None

    first = jax.tree.map(lambda x: x[0], (batch, draws))
    shapes = jax.eval_shape(lambda: grad_of(trainable, *first, counts))
    (loss, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, loss, sums), _ = jax.lax.scan(body, (grads, loss, sums), (batch, draws))
    return grads, loss, sums


def make_draw(template: Template, options: StepOptions) -> Callable[[jax.Array, Batch], StepRandomness]:
    """``draw(key, micro_batch)``: the random draws of training by these options."""
    return functools.partial(
        StepRandomness.from_key,
        generator=template.bind(template.shapes).generator,
        cfg_dropout=options.cfg_dropout,
        lora_dropout=options.lora_dropout,
    )


def make_train_step(
    template: Template,
    labels: Mapping[str, str],
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    *,
    draw: Callable[[jax.Array, Batch], StepRandomness] | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """``step(state, frozen, batch) -> (state, metrics)``; jit it with ``donate_argnums=0``.

    ``draw(key, micro_batch)`` replaces the random draws (:func:`make_draw`) by given ones.

    Metrics are scalars: ``loss``, each loss and diagnostic as a global mean (NaN where nothing
    counted, so that an empty bin is not mistaken for a zero), and ``grad_norm`` over the trainables.
    """
    draw = draw or make_draw(template, options)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        grads, loss, sums = accumulate_gradients(
            template, state.trainable, frozen, batch, lambda micro: draw(key, micro), options
        )
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            with_frozen_masked(grads, labels),
            state.opt_state,
            with_frozen_masked(state.trainable, labels),
            reached=parts_with_gradient(sums, options.loss),
        )
        trainable = optax.apply_updates(state.trainable, {path: updates[path] for path in state.trainable})
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **means(sums)}
        return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics

    return train_step


def means(sums: Mapping[str, SumCount]) -> Metrics:
    """sum / count of each entry; NaN where the count is zero."""
    return {name: jnp.where(n > 0, s / jnp.maximum(n, 1.0), jnp.nan) for name, (s, n) in sums.items()}
