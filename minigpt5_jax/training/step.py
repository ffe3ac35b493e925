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
from minigpt5_jax.models.mesh import SHARD_AXES, SHARDS
from minigpt5_jax.training.optimizer import with_frozen_masked
from minigpt5_jax.training.sharding import Layout
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


Sums = tuple[Params, jax.Array, dict[str, SumCount]]
"""Gradients of the trainables, total loss and (sum, count)s."""


def accumulate_gradients(
    template: Template,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    draw: Callable[[Batch], StepRandomness],
    options: StepOptions,
    layout: Layout | None = None,
) -> Sums:
    """Gradients of the trainables, total loss and (sum, count)s over all micro-batches.

    With a ``layout`` each shard (rows of a place of ``data x fsdp``) has gradients of its own over all its
    micro-batches, which then are summed once; trainables come and gradients go as they are stored.
    """
    draws = draw(batch) if options.accumulation == 1 else jax.vmap(draw)(batch)
    counts = loss_counts(batch, draws, options.loss)
    if layout is None or layout.shards == 1:
        return _over_micro_batches(template, trainable, frozen, batch, draws, counts, options)
    values = layout.gather(trainable)

    def shard(batch: Batch, draws: StepRandomness) -> Sums:
        return _over_micro_batches(template, values, frozen, batch, draws, counts, options)

    lead = int(options.accumulation > 1)
    batch, draws = shards_apart(batch, draws, layout.shards, lead)
    apart = jax.vmap(shard, in_axes=lead, axis_name=SHARDS, spmd_axis_name=SHARD_AXES)
    grads, loss, sums = apart(batch, draws)
    return layout.reduce(grads), *jax.tree.map(lambda x: x.sum(0), (loss, sums))


def shards_apart(batch: Batch, draws: StepRandomness, count: int, lead: int) -> tuple[Batch, StepRandomness]:
    """Batch and draws with an axis of shards at place ``lead``, and indices that are relative to their shard.

    Rows, items and images follow each other in the order of their rows, so that each shard has its own.
    """
    batch, draws = jax.tree.map(
        lambda x: x.reshape(*x.shape[:lead], count, x.shape[lead] // count, *x.shape[lead + 1 :]),
        (batch, draws),
    )
    rows, items, images = (x.shape[lead + 1] for x in (batch.tokens, batch.item_id, batch.images))
    lines = rows if batch.prompt_end is None else items
    own: dict[str, jax.Array] = {"voken_row": batch.voken_row % lines, "image_row": batch.image_row % rows}
    if batch.image_index is not None:
        own["image_index"] = batch.image_index % max(images, 1)
    return dataclasses.replace(batch, **own), draws


def _over_micro_batches(
    template: Template,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    draws: StepRandomness,
    counts: Mapping[str, jax.Array],
    options: StepOptions,
) -> Sums:
    grad_of = jax.value_and_grad(
        lambda t, micro, draws: loss_and_diagnostics(template, t, frozen, micro, draws, counts, options.loss),
        has_aux=True,
    )
    if options.accumulation == 1:
        (loss, sums), grads = grad_of(trainable, batch, draws)
        return grads, loss, sums

    def body(carry: Sums, inputs: tuple[Batch, StepRandomness]) -> tuple[Sums, None]:
        (loss, sums), grads = grad_of(trainable, *inputs)
        return jax.tree.map(jnp.add, carry, (grads, loss, sums)), None

    first = jax.tree.map(lambda x: x[0], (batch, draws))
    (loss, sums), grads = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: grad_of(trainable, *first))
    )
    return jax.lax.scan(body, (grads, loss, sums), (batch, draws))[0]


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
    layout: Layout | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """``step(state, frozen, batch) -> (state, metrics)``; jit it with ``donate_argnums=0``.

    ``draw(key, micro_batch)`` replaces the random draws (:func:`make_draw`) by given ones.  ``layout`` is how
    the parameters lie on a mesh of several devices.

    Metrics are scalars: ``loss``, each loss and diagnostic as a global mean (NaN where nothing
    counted, so that an empty bin is not mistaken for a zero), and ``grad_norm`` over the trainables.
    """
    draw = draw or make_draw(template, options)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        grads, loss, sums = accumulate_gradients(
            template, state.trainable, frozen, batch, lambda micro: draw(key, micro), options, layout
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
