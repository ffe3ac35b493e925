"""Validation: losses without dropout, at fixed noise levels, under right and wrong conditions.

The plain image loss hardly falls even when training works, because most of it is decided by the
timestep.  What shows that vokens learnt to draw is a comparison at equal noise: the image loss
with the right condition, with the condition of another sample, and with T(0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.batch import Batch
from minigpt5_jax.minigpt5 import Composite, LossOptions, StepRandomness, SumCount
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.training.step import means

NOISE_LEVELS = (100, 300, 500, 700)
"""Timesteps of the fixed-noise comparison, from nearly clean to mostly noise: signal-to-noise ratios of 8.5,
1.4, 0.4 and 0.1 under Stable Diffusion's schedule."""

ValidationStep = Callable[[Params, Params, Batch], dict[str, SumCount]]


def make_validation_step(
    template: Template, options: LossOptions, levels: tuple[int, ...] = NOISE_LEVELS
) -> ValidationStep:
    """``f(trainable, frozen, batch) -> {name: (sum, count)}``; deterministic (Q6, Q16).

    Names: ``text``, ``voken_emission``, ``caption``, and the image loss at the fixed ``levels`` as
    ``image`` (right condition), ``image_swapped`` (that of the item before; the last's
    for the first) and ``image_unconditional`` (T(0)); ``image_t100`` and so on are ``image`` at one level.
    """
    generator = template.bind(template.shapes).generator

    def step(trainable: Params, frozen: Params, batch: Batch) -> dict[str, SumCount]:
        model = template.bind({**frozen, **trainable})
        # The same key at every call: an item meets the same noise whenever it is validated.
        draws = StepRandomness.from_key(jax.random.key(0), batch, generator)
        outputs = model.outputs(batch, draws)
        result = {}
        for name in options.weights:
            if name != "image":
                result[name], extra = model.loss(name, outputs, batch, options)
                result.update(extra)
        if "image" in options.weights:
            result.update(_image_losses(model, batch, draws, outputs.condition, levels))
        return result

    return step


def _image_losses(
    model: Composite, batch: Batch, draws: StepRandomness, condition: jax.Array, levels: tuple[int, ...]
) -> dict[str, SumCount]:
    latents = model.target_latents(batch, draws)
    mask = batch.item_mask
    cases = {
        "image": (condition, mask),
        "image_swapped": (jnp.roll(condition, 1, axis=0), mask & jnp.roll(mask, 1)),
        "image_unconditional": (jnp.broadcast_to(model.unconditional(), condition.shape), mask),
    }

    @jax.jit  # so that the generator is traced once, not for each case
    def at_levels(case: jax.Array) -> jax.Array:
        def at_level(level: jax.Array) -> jax.Array:
            timesteps = jnp.full(mask.shape, level)
            return model.generator.denoising_loss(latents, case, timesteps, draws.noise)

        return jax.lax.map(at_level, jnp.asarray(levels))

    result = {}
    for name, (case, valid) in cases.items():
        per_item = at_levels(case)
        totals = jnp.where(valid, per_item, 0.0).sum(1)
        count = valid.sum().astype(jnp.float32)
        result[name] = (totals.mean(), count)
        if name == "image":
            result |= {f"image_t{level}": (totals[i], count) for i, level in enumerate(levels)}
    return result


def make_validator(
    step: ValidationStep, batches: Sequence[Batch]
) -> Callable[[Params, Params], dict[str, float]]:
    """``f(trainable, frozen) -> {name: global mean}`` over the same batches at every call."""
    compiled = jax.jit(step)

    def validate(trainable: Params, frozen: Params) -> dict[str, float]:
        total: dict[str, SumCount] | None = None
        for batch in batches:
            sums = compiled(trainable, frozen, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        if total is None:
            raise ValueError("there is no validation batch; give data.validation more samples")
        return {name: float(np.asarray(value)) for name, value in means(total).items()}

    return validate
