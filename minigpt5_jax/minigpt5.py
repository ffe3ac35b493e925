"""MiniGPT-5: backbone + mapper + generator, its losses, and the random draws of a step.

The composite wires the three parts and turns a batch into ``{loss name: (sum, count)}``; it knows
their protocols only (:mod:`minigpt5_jax.parts.contracts`).  Fidelity 2.4, 3.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minigpt5_jax.batch import Batch
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.parts.contracts import KINDS, Generator, find

IGNORE = -100
SNR_BINS = 4  # equal ranges of timesteps, from high to low signal, in which the image loss is reported
SumCount = tuple[jax.Array, jax.Array]
Values = tuple[jax.Array, dict[str, SumCount]]
Made = tuple[str, Mapping[str, Any]]
"""Name of a part and keyword arguments of its module."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRandomness:
    """Every random draw of a step, made per item so that no layout of the batch changes them.

    Attributes:
      timesteps: i32[m].  noise, posterior_noise: f32[m h w c].
      cfg_drop: bool[m].  Items whose voken states are zeroed (classifier-free guidance).
      dropout_keys: key[b] for LoRA dropout, or None where nothing drops.
    """

    timesteps: Any
    noise: Any
    posterior_noise: Any
    cfg_drop: Any
    dropout_keys: Any = None

    @classmethod
    def from_key(
        cls,
        key: jax.Array,
        batch: Batch,
        generator: Generator,
        *,
        cfg_dropout: float = 0.0,
        lora_dropout: bool = False,
    ) -> StepRandomness:
        """StepRandomness of a (micro-)batch; a pure function of ``(key, id)`` for each item and row.

        Accumulation, packing, another mesh or another process count therefore see the same noise
        for the same item.  ``generator`` says the shape of latents and how many timesteps there are; an
        abstract one does.
        """
        item_root, row_root = jax.random.split(key)

        def draw(number):
            timestep, noise, posterior, drop = jax.random.split(jax.random.fold_in(item_root, number), 4)
            return (
                jax.random.randint(timestep, (), 0, generator.num_train_timesteps),
                jax.random.normal(noise, generator.latent_shape),
                jax.random.normal(posterior, generator.latent_shape),
                jax.random.uniform(drop) < cfg_dropout,
            )

        timesteps, noise, posterior, drop = jax.vmap(draw)(batch.item_id)
        dropout_keys = None
        if lora_dropout:
            dropout_keys = jax.vmap(lambda n: jax.random.fold_in(row_root, n))(batch.row_id)
        return cls(timesteps, noise, posterior, drop, dropout_keys)


class Loss(NamedTuple):
    """A loss: which of its values count, and the values themselves.

    Attributes:
      mask: ``(batch, randomness, options)`` -> bool, of a whole update too (leading accumulation axes).
      values: ``(model, outputs, batch)`` -> (a value for each entry of the mask, ``{name: (sum, count)}``).
      parts: kinds of parts that its gradients reach.
    """

    mask: Callable[[Batch, StepRandomness, Any], jax.Array]
    values: Callable[[Any, Any, Batch], Values]
    parts: tuple[str, ...] = KINDS


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the losses are put together (fidelity 3.1, Q8).

    Attributes:
      weights: loss name -> weight; a loss without a weight is not computed.
      caption_target_on_drop: ``"empty"`` (the empty string's features, as the original) or ``"skip"``
        (a dropped item leaves the caption mean).
      losses: every loss that has a name.
    """

    weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"text": 0.01, "image": 1.0, "caption": 0.1}
    )
    caption_target_on_drop: str = "empty"
    losses: Mapping[str, Loss] = dataclasses.field(default_factory=lambda: LOSSES)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the losses are functions of."""

    hidden: jax.Array  # [b t d]
    condition: jax.Array  # [m q c]
    draws: StepRandomness


class Composite(nnx.Module):
    """The composite.  Parameters live under ``backbone/``, ``mapper/`` and ``generator/``.

    Args:
      backbone, mapper, generator: ``(name, keyword arguments of the module)`` of each part.
    """

    def __init__(
        self,
        *,
        backbone: Made,
        mapper: Made,
        generator: Made,
        rngs: nnx.Rngs,
    ):
        self.backbone = find("backbone", backbone[0]).module(**backbone[1], rngs=rngs)
        self.mapper = find("mapper", mapper[0]).module(**mapper[1], rngs=rngs)
        self.generator = find("generator", generator[0]).module(**generator[1], rngs=rngs)

    @property
    def first_voken_id(self) -> int:
        """Id of ``[IMG0]``."""
        return self.backbone.vocab_size

    def voken_states(
        self,
        hidden: Float[Array, "b t d"],
        row: Int[Array, " m"],
        start: Int[Array, " m"],
        before: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "m n d"]:
        """The n hidden states that feed the mapper, for each target image (fidelity 2.4).

        ``before`` is :attr:`Batch.before`; vokens follow each other in a tree too.
        """
        columns = start[:, None] - self.backbone.voken_state_shift + jnp.arange(self.backbone.num_vokens)
        if before is not None:
            columns = jnp.where(columns < start[:, None], before[row, start][:, None], columns)
        return hidden[row[:, None], columns].astype(jnp.float32)

    def condition(
        self, vokens: Float[Array, "m n d"], drop: Bool[Array, " m"] | None = None
    ) -> Float[Array, "m q c"]:
        """Mapper output; dropped items are mapped from zeros, so biases still act (fidelity 3.2)."""
        if drop is not None:
            vokens = jnp.where(drop[:, None, None], 0.0, vokens)
        return self.mapper(vokens).astype(jnp.float32)

    def unconditional(self) -> Float[Array, "1 q c"]:
        """T(0), the negative condition of voken guidance (fidelity 3.5)."""
        # What a dropped item was trained with: zeros in, so biases and queries act.  The empty prompt's
        # features are another point, away from which guidance would also undo what the mapper always adds.
        return self.condition(jnp.zeros((1, self.backbone.num_vokens, self.backbone.hidden_size)))

    def target_latents(self, batch: Batch, draws: StepRandomness) -> Float[Array, "m h w c"]:
        """Latents of the images to draw, from pixels or from precomputed moments with the same draws."""
        moments = batch.target_moments
        if moments is None:
            moments = self.generator.moments(batch.target)
        return self.generator.latents(moments, draws.posterior_noise)

    def outputs(self, batch: Batch, draws: StepRandomness) -> Outputs:
        """Run backbone and mapper on a batch."""
        hidden = self.backbone.hidden(self.backbone.embed(batch), batch, draws.dropout_keys)
        vokens = self.voken_states(hidden, batch.voken_row, batch.voken_start, batch.before)
        return Outputs(hidden, self.condition(vokens, draws.cfg_drop), draws)

    def loss(
        self, name: str, outputs: Outputs, batch: Batch, options: LossOptions
    ) -> tuple[SumCount, dict[str, SumCount]]:
        """One loss and its diagnostics, each ``(sum, count)``."""
        mask = options.losses[name].mask(batch, outputs.draws, options)
        values, diagnostics = options.losses[name].values(self, outputs, batch)
        return sum_count(values, mask), diagnostics

    def losses(
        self, batch: Batch, draws: StepRandomness, options: LossOptions
    ) -> tuple[dict[str, SumCount], dict[str, SumCount]]:
        """(losses, diagnostics), each ``{name: (sum, count)}`` so that means can be taken globally."""
        outputs = self.outputs(batch, draws)
        losses, diagnostics = {}, {}
        for name in options.weights:
            losses[name], extra = self.loss(name, outputs, batch, options)
            diagnostics.update(extra)
        return losses, diagnostics


def sum_count(values: jax.Array, mask: jax.Array) -> SumCount:
    """Sum of the values where the mask is set, and how many these are."""
    return jnp.where(mask, values, 0.0).sum(), mask.sum().astype(jnp.float32)


def text_mask(batch: Batch, draws: StepRandomness, options: LossOptions) -> jax.Array:
    """Positions of ``label_positions`` that are targets, bool[... b l]."""
    labels = jnp.take_along_axis(batch.labels, batch.label_positions, axis=-1)
    return (batch.label_positions > 0) & (labels != IGNORE)


def text_values(model: Composite, outputs: Outputs, batch: Batch) -> Values:
    """Next-token cross-entropy at label positions only (fidelity 2.2, 2.3).

    Logits are two blocks, frozen vocabulary and new rows, joined in the logsumexp: one array of all rows
    would copy the head of a vocabulary-sharded model every step.  Also reports how often ``[IMG0]`` is the
    arg-max where it is due.
    """
    positions = batch.label_positions
    labels = jnp.take_along_axis(batch.labels, positions, axis=1)
    if batch.before is None:
        before = jnp.maximum(positions - 1, 0)
    else:
        before = jnp.take_along_axis(batch.before, positions, axis=1)
    states = jnp.take_along_axis(outputs.hidden, before[..., None], axis=1)
    base, new = model.backbone.logit_blocks(states)
    vocab = base.shape[-1]
    log_z = jnp.logaddexp(jax.nn.logsumexp(base, -1), jax.nn.logsumexp(new, -1))

    def pick(block, index):
        index = jnp.clip(index, 0, block.shape[-1] - 1)[..., None]
        return jnp.take_along_axis(block, index, axis=-1)[..., 0]

    target = jnp.where(labels < vocab, pick(base, labels), pick(new, labels - vocab))
    due = (positions > 0) & (labels == vocab)
    emitted = (new[..., 0] >= base.max(-1)) & (new[..., 0] >= new.max(-1))
    return log_z - target, {"voken_emission": sum_count(emitted.astype(jnp.float32), due)}


def image_mask(batch: Batch, draws: StepRandomness, options: LossOptions) -> jax.Array:
    """Items with an image to draw, bool[... m]."""
    return batch.item_mask


def image_values(model: Composite, outputs: Outputs, batch: Batch) -> Values:
    """Latent-diffusion loss of every target image (fidelity 3.4), also by signal-to-noise ratio.

    SNR falls with the timestep: ``image_t0_249`` is the mean over items whose timestep is 0 ... 249 and so on
    (of 1,000 timesteps).  The bins split the items, at no cost but their sums.
    """
    draws = outputs.draws
    latents = model.target_latents(batch, draws)
    per_item = model.generator.denoising_loss(latents, outputs.condition, draws.timesteps, draws.noise)
    borders = [model.generator.num_train_timesteps * n // SNR_BINS for n in range(SNR_BINS + 1)]
    return per_item, {
        f"image_t{low}_{high - 1}": sum_count(
            per_item, batch.item_mask & (draws.timesteps >= low) & (draws.timesteps < high)
        )
        for low, high in itertools.pairwise(borders)
    }


def caption_mask(batch: Batch, draws: StepRandomness, options: LossOptions) -> jax.Array:
    """Items that take part in the caption mean, bool[... m]."""
    mask = batch.item_mask & batch.has_caption
    return mask if options.caption_target_on_drop == "empty" else mask & ~draws.cfg_drop


def caption_values(model: Composite, outputs: Outputs, batch: Batch) -> Values:
    """MSE between the condition and the caption's text features (fidelity 3.2, 3.3)."""
    target = model.generator.caption_features(batch.caption_ids, batch.caption_mask)
    drop = outputs.draws.cfg_drop[:, None, None]
    target = jnp.where(drop, model.generator.empty_caption_features(), target)
    return jnp.square(outputs.condition - target).mean((1, 2)), {}


LOSSES = {
    "text": Loss(text_mask, text_values, parts=("backbone",)),
    "image": Loss(image_mask, image_values),
    "caption": Loss(caption_mask, caption_values),
}
"""Loss name -> loss; parts may bring others (``Part.losses``)."""


def loss_counts(batch: Batch, draws: StepRandomness, options: LossOptions) -> dict[str, jax.Array]:
    """The counts that :meth:`Composite.losses` will return, known before any forward pass.

    Accumulation needs them first: each micro-batch's sum is divided by the count of the whole batch.
    Leading (accumulation) axes are summed over.
    """
    masks = {name: options.losses[name].mask(batch, draws, options) for name in options.weights}
    return {name: mask.sum().astype(jnp.float32) for name, mask in masks.items()}


def parts_with_gradient(sums: Mapping[str, SumCount], options: LossOptions) -> dict[str, jax.Array]:
    """Kind of part -> bool[]: whether a loss whose gradients reach it counted anything in this update.

    Args:
      sums: what :meth:`Composite.losses` returned, summed over the micro-batches.
    """
    counted = {
        kind: [sums[name][1] > 0 for name in options.weights if kind in options.losses[name].parts]
        for kind in KINDS
    }
    return {kind: jnp.any(jnp.array(some)) for kind, some in counted.items()}


def make_template(backbone: Made, mapper: Made, generator: Made, *, attention: str = "auto") -> Template:
    """The composite's template: shapes, logical axes and ``bind``; nothing is allocated.

    ``attention`` is how all towers attend (:data:`minigpt5_jax.models.attention.IMPLEMENTATIONS`).
    """
    return Template.of(
        lambda rngs: Composite(backbone=backbone, mapper=mapper, generator=generator, rngs=rngs),
        attention,
    )
