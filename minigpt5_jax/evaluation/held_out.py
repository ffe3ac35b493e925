"""What a run shows of its held-out samples: losses, drawn images, the oracle's verdict."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.sources import Source
from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.inference.images import make_batch_sampler
from minigpt5_jax.inference.page import draw_grid
from minigpt5_jax.models.common import Params
from minigpt5_jax.shapes import oracle
from minigpt5_jax.training.sharding import replicated
from minigpt5_jax.training.validation import make_validation_step, make_validator
from minigpt5_jax.wiring.inputs import make_batch_sharder, open_loader
from minigpt5_jax.wiring.model import ModelSpec
from minigpt5_jax.wiring.used_towers import readable

Validate = Callable[[Params], dict[str, float]]
Grid = Callable[[Params], np.ndarray]


class HeldOutImages:
    """Images of one held-out update, drawn from its own vokens (teacher forcing) and always the same noise.

    Every process calls it and gets all of them, wherever their devices are.  The images of a set of
    parameters are kept until another is asked, so that a grid and a score of one step are drawn once.

    Args:
      draw: ``(params, batch, keys[m]) -> u8[m H W 3]``.
      batches: placed on ``mesh``; the first update that holds an image to draw is taken.
      seed: of the noise.
      micro: batches of an update.
    """

    def __init__(
        self,
        draw: Callable[[Params, Batch, jax.Array], jax.Array],
        batches: Sequence[Batch],
        frozen: Params,
        mesh: jax.sharding.Mesh,
        seed: int,
        micro: int = 1,
    ):
        everywhere = replicated(mesh)
        read = jax.jit(lambda batch: (batch.item_mask, batch.target), out_shardings=everywhere)
        self.targets = np.zeros((0, 0, 0, 3), np.uint8)
        """u8[n H W 3]: the data's own images; none where no batch has any."""
        for update in (batches[first : first + micro] for first in range(0, len(batches), micro)):
            mask, targets = map(np.concatenate, zip(*jax.device_get([read(batch) for batch in update])))
            if mask.any():
                self._update, self._items, self.targets = update, np.flatnonzero(mask), targets[mask]
                break

        def all_of(params: Params, batch: Batch, first: jax.Array) -> jax.Array:
            # An item's noise is that of its place in the update, however this is cut.
            items = batch.item_id.shape[0]
            keys = jax.random.split(jax.random.key(seed), items * micro)
            return draw(params, batch, jax.lax.dynamic_slice_in_dim(keys, first, items))

        self._draw, self._frozen = jax.jit(all_of, out_shardings=everywhere), frozen
        self._last: tuple[Params, np.ndarray] | None = None

    def __call__(self, trainable: Params) -> UInt8[np.ndarray, "n H W 3"]:
        """An image for each of ``targets``."""
        if self._last is None or self._last[0] is not trainable:
            params = {**self._frozen, **trainable}
            images = [
                np.asarray(self._draw(params, batch, np.int32(i * batch.item_id.shape[0])))
                for i, batch in enumerate(self._update)
            ]
            self._last = trainable, np.concatenate(images)[self._items]
        return self._last[1]


def watchers(
    config: ConfigDict,
    spec: ModelSpec,
    held_out: Source | None,
    frozen: Params,
    mesh: jax.sharding.Mesh,
    sampler: Sampler,
) -> tuple[Validate | None, Grid | None]:
    """(validation, image grid) over held-out samples; None for what cannot be.

    The numbers are global, and of the small world those of :func:`oracle_score` are among them.  There is no
    grid without held-out images, and no batch is read for a run that never asks for either.
    """
    if held_out is None or not (config.run.eval_every or config.run.grid_every):
        return None, None
    place, micro = make_batch_sharder(mesh, 1), config.data.accumulation or 1
    batches = [place(batch) for batch in held_out_batches(config, spec, held_out)]
    validator = make_validator(make_validation_step(spec.template, spec.options.loss), batches)
    inference = config.inference
    sample = make_batch_sampler(spec.template, sampler, inference.guidance_scale, inference.cfg_negative)
    drawn = HeldOutImages(sample, batches, frozen, mesh, config.run.seed, micro)
    judged = bool(len(drawn.targets)) and readable(config)

    def validate(trainable: Params) -> dict[str, float]:
        losses = validator(trainable, frozen)
        return losses | (oracle_score(drawn(trainable), drawn.targets) if judged else {})

    def grid(trainable: Params) -> np.ndarray:
        shown = slice(config.run.grid_images)
        targets = drawn.targets[shown]
        return draw_grid(np.concatenate([targets, drawn(trainable)[shown]]), columns=len(targets))

    return validate, grid if len(drawn.targets) else None


def held_out_batches(config: ConfigDict, spec: ModelSpec, held_out: Source) -> list[Batch]:
    """This process's micro-batches of the first ``run.eval_batches`` updates' worth of held-out samples.

    How an update is cut, which the devices may decide, does not change the samples.
    """
    count = config.run.eval_batches * (config.data.accumulation or 1)
    with contextlib.closing(open_loader(config, spec, held_out, training=False)) as loader:
        return list(itertools.islice(loader, count))


def oracle_score(
    drawn: UInt8[np.ndarray, "n 64 64 3"], targets: UInt8[np.ndarray, "n 64 64 3"]
) -> dict[str, float]:
    """Shares of :func:`minigpt5_jax.shapes.oracle.score`, the data's images being the truth."""
    return {f"oracle_{name}": share for name, share in oracle.score(drawn, oracle.read(targets)).items()}
