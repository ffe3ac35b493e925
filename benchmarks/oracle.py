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
from minigpt5_jax.shapes.oracle import corrupted, score
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import draw_scene

COUNT = flags.DEFINE_integer("count", 300, "scenes of each number of objects", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of scenes and noise", lower_bound=0)
ASSETS = flags.DEFINE_string("assets", str(files.ASSETS), "folder of the stored VAE")
NOISES = (0.0, 0.1, 0.25)  # on latents, in their standard deviations


def through_vae(pictures: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures after the stored VAE, by noise on the latents."""
    folder = Path(ASSETS.value)
    config, params = files.read_config(folder, "vae"), files.read_tower(folder, "vae")
    template = Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs))
    for noise in NOISES:
        yield f"VAE, latent noise {noise}", train_vae.reconstruct(template, params, pictures, noise)


def lines() -> Iterator[dict]:
    """The results, one by one."""
    random = np.random.default_rng(SEED.value)
    for objects in (1, 2, 3):
        scenes = [draw_scene(random, bool(i % 2), objects) for i in range(COUNT.value)]
        for name, pictures in corrupted(render(scenes), random):
            yield {"objects": objects, "corrupted by": name, **score(pictures, scenes)}
        held_out = [draw_scene(random, True, objects) for _ in range(COUNT.value)]
        for name, pictures in through_vae(render(held_out)):
            yield {"objects": objects, "corrupted by": name, **score(pictures, held_out)}


def main(_: list[str]) -> None:
    """Print the results as they come."""
    for line in lines():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
