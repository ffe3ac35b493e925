"""The small world's VAE: 64x64 images to 8x8x4 latents, from nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.models.vae.model import AutoencoderKL, VaeConfig, sample_posterior
from minigpt5_jax.shapes.backbones.fields import training_contents
from minigpt5_jax.shapes.backbones.fit import fit, in_parts
from minigpt5_jax.shapes.oracle import right
from minigpt5_jax.shapes.render import IMAGE_SIZE, render, render_cells
from minigpt5_jax.shapes.world import BACKGROUNDS, all_scenes, draw_scene

CONFIG = VaeConfig.from_hf(
    {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "block_out_channels": [8, 16, 32, 64],
        "layers_per_block": 1,
        "sample_size": IMAGE_SIZE,
        "scaling_factor": 1.0,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
)
FILLED = 0.7  # share of places with an object; a full image teaches more per step than a sparse one
KL_WEIGHT = 3e-5
OBJECT_WEIGHT = 3.0
DECODER_NOISE = 0.15  # largest noise on latents, in their standard deviations


def batches(size: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Images u8[n 64 64 3] with each place filled at random, and weights f32[n 64 64 1]."""
    contents = training_contents()

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng((seed, step))
        chosen = contents[random.integers(len(contents), size=(size, 4))]
        chosen = np.where(random.random((size, 4)) < FILLED, chosen, 0)
        background = random.integers(len(BACKGROUNDS), size=size)
        images = render_cells(chosen, background)
        empty = render_cells(np.zeros_like(chosen), background)
        weight = 1.0 + (OBJECT_WEIGHT - 1.0) * (images != empty).any(-1, keepdims=True)
        return images, weight.astype(np.float32)

    return batch


def train(
    steps: int, decoder_steps: int, seed: int, size: int = 8, checkpoints: Path | None = None
) -> tuple[Params, VaeConfig, float]:
    """(parameters, configuration with its scaling factor, seconds); the decoder is trained on alone."""
    template = Template.of(lambda rngs: AutoencoderKL(CONFIG, rngs=rngs))

    def loss(params, batch, key):
        pixels = batch[0].astype(jnp.float32) / 127.5 - 1.0
        model = template.bind(params)
        moments = model.encode(pixels)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        latents = sample_posterior(moments, jax.random.normal(key, mean.shape))
        error = (batch[1] * jnp.abs(model.decode(latents) - pixels)).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3)).mean()
        return error + KL_WEIGHT * kl, {"l1": error, "kl": kl}

    params, seconds = fit(
        loss,
        template.init(jax.random.key(seed)),
        batches(size, seed),
        steps=steps,
        seed=seed,
        name="vae",
        checkpoint=checkpoints and checkpoints / "vae.npz",
    )
    params, more = train_decoder(template, params, decoder_steps, seed + 1, checkpoints=checkpoints)
    config = dataclasses.replace(CONFIG, scaling_factor=round(1.0 / spread_of_latents(template, params), 5))
    return params, config, seconds + more


def spread_of_latents(template: Template, params: Params) -> float:
    """Standard deviation of the latents of training images."""
    images = render(list(all_scenes(False))[::5])
    return float(np.split(encode(template, params, images), 2, axis=-1)[0].std())


def train_decoder(
    template: Template, params: Params, steps: int, seed: int, size: int = 12, checkpoints: Path | None = None
) -> tuple[Params, float]:
    """Go on with the decoder, under latent noise as a UNet's errors are; the encoder stays as it is."""
    encoder = {path: v for path, v in params.items() if path.startswith(("encoder/", "quant_conv/"))}
    decoder = {path: v for path, v in params.items() if path not in encoder}
    spread = spread_of_latents(template, params)

    def loss(decoder, batch, key):
        pixels = batch[0].astype(jnp.float32) / 127.5 - 1.0
        model = template.bind({**encoder, **decoder})
        moments = model.encode(pixels)
        keys = jax.random.split(key, 3)
        shape = (*moments.shape[:-1], moments.shape[-1] // 2)
        latents = sample_posterior(moments, jax.random.normal(keys[0], shape))
        noise = DECODER_NOISE * spread * jax.random.uniform(keys[1], (shape[0], 1, 1, 1))
        pixels_out = model.decode(latents + noise * jax.random.normal(keys[2], shape))
        error = (batch[1] * jnp.abs(pixels_out - pixels)).mean()
        return error, {"l1": error}

    decoder, seconds = fit(
        loss,
        decoder,
        batches(size, seed),
        steps=steps,
        seed=seed,
        name="vae decoder",
        checkpoint=checkpoints and checkpoints / "vae_decoder.npz",
    )
    return {**encoder, **decoder}, seconds


def encode(template: Template, params: Params, images: np.ndarray, size: int = 64) -> np.ndarray:
    """Moments of images u8[n 64 64 3], f32[n 8 8 8]."""
    run = jax.jit(lambda p, x: template.bind(p).encode(x.astype(jnp.float32) / 127.5 - 1.0))
    return in_parts(functools.partial(run, params), size, images)


def reconstruct(
    template: Template, params: Params, images: np.ndarray, noise: float, seed: int = 0
) -> np.ndarray:
    """Images through the VAE, latents disturbed by ``noise`` standard deviations of themselves."""
    run = jax.jit(lambda p, z: template.bind(p).decode(z))
    mean, _ = np.split(encode(template, params, images), 2, axis=-1)
    random = np.random.default_rng(seed)
    latents = mean + noise * mean.std() * random.standard_normal(mean.shape).astype(np.float32)
    pixels = in_parts(functools.partial(run, params), 64, latents)
    return np.round(np.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def measure(params: Params, template: Template, count: int = 200) -> dict[str, float]:
    """Share of held-out scenes the oracle reads rightly after the VAE, by objects and latent noise."""
    random, result = np.random.default_rng(1), {}
    for objects in (1, 2, 3):
        scenes = [draw_scene(random, held_out=True, count=objects) for _ in range(count)]
        images = render(scenes)
        for noise in (0.0, 0.1, 0.25):
            share = right(reconstruct(template, params, images, noise), scenes).mean()
            result[f"all right, {objects} objects, latent noise {noise}"] = float(share)
    return result
