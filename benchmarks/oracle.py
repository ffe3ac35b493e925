"""How far the small world's oracle can be trusted: what it reads from corrupted images.  JSON lines.

    python -m benchmarks.oracle [--count 300]

Each line: number of objects, what corrupted the images, share read wholly right, share of each attribute.
Half of the scenes are held out; for the VAE all are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.vae.model import AutoencoderKL
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.backbones import train_vae
from minigpt5_jax.shapes.oracle import score
from minigpt5_jax.shapes.render import IMAGE_SIZE, render
from minigpt5_jax.shapes.world import draw_scene

NOISES = (0.0, 0.1, 0.25)  # on latents, in their standard deviations


def box_blur(images: np.ndarray, width: int) -> np.ndarray:
    for axis in (1, 2):
        shifted = [np.roll(images, k, axis) for k in range(-(width // 2), width // 2 + 1)]
        images = np.mean(shifted, axis=0)
    return images


def corrupted(images: np.ndarray, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """(how, images in 0 ... 255) for several ways of corrupting them, ``clean`` first."""
    clean = images.astype(np.float32)
    yield "clean", clean
    for sd in (0.2, 0.4, 0.8):
        yield f"white noise, sd {sd} of -1..1", clean + 127.5 * sd * random.standard_normal(clean.shape)
    for width in (3, 5):
        yield f"box blur of {width} pixels", box_blur(clean, width)
    half = clean.reshape(len(clean), IMAGE_SIZE // 2, 2, IMAGE_SIZE // 2, 2, 3).mean((2, 4))
    yield "half resolution", half.repeat(2, 1).repeat(2, 2)


def through_vae(images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Images after the stored VAE, by noise on the latents."""
    folder = Path(flags.FLAGS.assets).expanduser()
    config, params = files.read_config(folder, "vae"), files.read_tower(folder, "vae")
    template = Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs))
    for noise in NOISES:
        yield f"VAE, latent noise {noise}", train_vae.reconstruct(template, params, images, noise)


def lines() -> Iterator[dict]:
    """The results, one by one."""
    random = np.random.default_rng(flags.FLAGS.seed)
    count = flags.FLAGS.count
    for objects in (1, 2, 3):
        scenes = [draw_scene(random, bool(i % 2), objects) for i in range(count)]
        for name, images in corrupted(render(scenes), random):
            yield {"objects": objects, "corrupted by": name, **score(images, scenes)}
        held_out = [draw_scene(random, True, objects) for _ in range(count)]
        for name, images in through_vae(render(held_out)):
            yield {"objects": objects, "corrupted by": name, **score(images, held_out)}


def main(_: list[str]) -> None:
    """Print the results as they come."""
    for line in lines():
        print(json.dumps(line), flush=True)


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_integer("count", 300, "scenes of each number of objects", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of scenes and noise", lower_bound=0)
    flags.DEFINE_string("assets", str(files.ASSETS), "folder of the stored VAE")


if __name__ == "__main__":
    define_flags()
    app.run(main)
