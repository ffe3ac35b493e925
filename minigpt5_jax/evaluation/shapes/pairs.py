"""What a trained model draws of held-out captions, and natively by its text encoder, read by the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from minigpt5_jax.inference.images import initial_latents, sample_images
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.shapes.backbones.evaluate import held_out_captions
from minigpt5_jax.shapes.oracle import score
from minigpt5_jax.shapes.world import Scene
from minigpt5_jax.wiring.model import caption_tokenizer
from minigpt5_jax.wiring.session import LoadedModel, open_sampler

BATCH_SIZE = 32
Images = list[np.ndarray | None]


def voken_images(
    run: LoadedModel, captions: Sequence[str], seed: int = 0, batch_size: int = BATCH_SIZE
) -> Images:
    """What the whole model draws when it reads a caption; None where it wrote no image."""
    session = run.session(batch_size=batch_size)
    prompts = [Prompt(text, (), seed + number) for number, text in enumerate(captions)]
    return [answer.images[0] if answer.images else None for answer in session.generate(prompts)]


def native_images(
    run: LoadedModel, captions: Sequence[str], seed: int = 1, batch_size: int = BATCH_SIZE
) -> Images:
    """Images by the generator's own text encoder: what the frozen UNet can do at best."""
    inference = run.config.inference
    ids, mask = caption_tokenizer(run.config, run.spec.sizes).encode(list(captions))
    sampler = open_sampler(run.config, run.spec)

    @jax.jit
    def draw(params, ids, mask, keys):
        generator = run.spec.template.bind(params).generator
        return sample_images(
            generator,
            sampler,
            generator.caption_features(ids, mask),
            generator.empty_caption_features()[None],
            initial_latents(keys, generator.latent_shape),
            inference.guidance_scale,
        )

    keys, images = jax.random.split(jax.random.key(seed), len(ids)), []
    for start in range(0, len(ids), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(ids) - 1)  # the last one fills up
        images += list(np.asarray(draw(run.params, ids[rows], mask[rows], keys[rows])))
    return images[: len(ids)]


def shares(images: Images, scenes: Sequence[Scene]) -> dict[str, float]:
    """The oracle's shares, and ``drawn``; an image that was not drawn is wrong in everything."""
    there = [i for i, image in enumerate(images) if image is not None]
    part = len(there) / len(images)
    if not there:
        return {"all": 0.0, "drawn": 0.0}
    found = score(np.stack([images[i] for i in there]), [scenes[i] for i in there])
    return {**{name: value * part for name, value in found.items()}, "drawn": part}


def judge_pairs(
    run: LoadedModel,
    *,
    count: int,
    objects: Sequence[int] = (1, 2, 3),
    seed: int = 0,
    native: bool = True,
    batch_size: int = BATCH_SIZE,
) -> dict[str, dict[str, Any]]:
    """The oracle's shares on ``count`` held-out captions of each number of ``objects``.

    Args:
      native: measure the ceiling too.

    Returns:
      ``{"1": {"count", "vokens": {"all", "background", "shape", ..., "drawn"}, "native": {...}}, ...}``;
      ``drawn`` is the share of captions behind which the model wrote its vokens.
    """
    scenes, captions = [], []  # of all numbers together: what draws them is compiled once
    for number in objects:
        more_scenes, more_captions = held_out_captions(count, seed, number)
        scenes += more_scenes
        captions += more_captions
    drawn = {"vokens": voken_images(run, captions, seed, batch_size)}
    if native:
        drawn["native"] = native_images(run, captions, seed + 1, batch_size)

    def row(start: int) -> dict[str, Any]:
        part = slice(start, start + count)
        return {"count": count, **{way: shares(p[part], scenes[part]) for way, p in drawn.items()}}

    return {str(number): row(i * count) for i, number in enumerate(objects)}
