"""The small world's vision: EVA-type ViT and Q-Former, trained to name what is in an image.

A linear head, thrown away afterwards, reads the background and place q mod 4 from the state of query q
through noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import LayerNorm, Params
from minigpt5_jax.models.eva_vit.model import EvaVit, EvaVitConfig
from minigpt5_jax.models.qformer.model import QFormer, QFormerConfig
from minigpt5_jax.parts.backbones.minigpt4 import IMAGE_MEAN, IMAGE_STD
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.backbones.fields import ask, by_turns, labels, scenes_of, training_contents
from minigpt5_jax.shapes.backbones.fit import fit, unit_gain
from minigpt5_jax.shapes.backbones.heads import Heads, init_heads, read, read_loss
from minigpt5_jax.shapes.render import IMAGE_SIZE, render, render_cells, scenes_of_cells
from minigpt5_jax.shapes.world import BACKGROUNDS, PLACES, Scene, draw_scene

VIT = EvaVitConfig(
    image_size=IMAGE_SIZE,
    patch_size=16,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
)
QFORMER = QFormerConfig(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    cross_attention_frequency=2,
    encoder_hidden_size=128,
    num_query_tokens=8,
)
POSITION_SPREAD = 0.5  # of what patches bring, about 1
STATE_NOISE = 0.5  # of states of unit variance
PIXEL_NOISE = 0.15  # largest standard deviation, of a range of -1 ... 1
Look = Callable[[np.ndarray], np.ndarray]
"""Images u8[i 64 64 3] to states of the queries f32[i q d]."""
BLUR = 0.7  # largest share of a blurred image: what a UNet draws is soft


class ShapesVision(nnx.Module):
    """ViT, its norm and Q-Former, under the names of the MiniGPT-4 backbone."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.vit = EvaVit(VIT, rngs=rngs)
        self.ln_vision = LayerNorm(VIT.hidden_size, eps=1e-5, rngs=rngs)
        self.qformer = QFormer(QFORMER, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [i 64 64 3] in 0 ... 255 to states of the queries [i 8 128]."""
        pixels = (images.astype(jnp.float32) / 255.0 - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
        return self.qformer(self.ln_vision(self.vit(pixels)))


def template() -> Template:
    """The towers."""
    return Template.of(lambda rngs: ShapesVision(rngs=rngs))


def batches(size: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Images with up to four training objects, and their labels."""
    cells = training_contents()
    fields = by_turns(QFORMER.num_query_tokens)

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((seed, step))
        chosen = cells[random.integers(len(cells), size=(size, len(PLACES)))]
        chosen = np.where(random.random((size, 1)) < random.random((size, len(PLACES))), chosen, 0)
        background = random.integers(len(BACKGROUNDS), size=size)
        scenes = scenes_of_cells(chosen, background)
        every = np.ones((size, QFORMER.num_query_tokens), bool)
        return {"images": render_cells(chosen, background), "asked": ask(labels(scenes), every, fields)}

    return batch


def disturb(images: jax.Array, key: jax.Array) -> jax.Array:
    """Noise and blur of a random strength, image by image; f32 in 0 ... 255."""
    keys, pixels = jax.random.split(key, 3), images.astype(jnp.float32)
    one = (len(images), 1, 1, 1)
    soft = sum(jnp.roll(pixels, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) / 9.0
    share = BLUR * jax.random.uniform(keys[0], one)
    noise = 127.5 * PIXEL_NOISE * jax.random.uniform(keys[1], one)
    return (1 - share) * pixels + share * soft + noise * jax.random.normal(keys[2], pixels.shape)


def start(tower: Template, key: jax.Array) -> Params:
    """Where the towers start: kernels of unit gain, positions as visible as what patches bring."""
    eyes = unit_gain(tower.init(key))
    return eyes | {"vit/pos_embed": eyes["vit/pos_embed"] * (POSITION_SPREAD / 0.02)}


def train(
    steps: int, seed: int, size: int = 48, checkpoint: Path | None = None
) -> tuple[Params, Heads, float]:
    """(parameters, the head, seconds)."""
    tower = template()

    def loss(params, batch, key):
        first, second = jax.random.split(key)
        states = tower.bind(params["eyes"])(disturb(batch["images"], first))
        states += STATE_NOISE * jax.random.normal(second, states.shape)
        error, right = read_loss(params["head"], states, batch["asked"])
        return error, {"read": error, "right": right}

    key = jax.random.key(seed)
    params: dict[str, Params | Heads] = {
        "eyes": start(tower, key),
        "head": init_heads(jax.random.fold_in(key, 1), QFORMER.hidden_size),
    }
    batch = batches(size, seed)
    fitted, seconds = fit(loss, params, batch, steps=steps, seed=seed, name="vision", checkpoint=checkpoint)
    return fitted["eyes"], fitted["head"], seconds


def make_look(params: Params, size: int = 50, seed: int | None = None) -> Look:
    """``f(images u8[i 64 64 3]) -> f32[i q d]``, states of the queries, compiled once.

    With a ``seed`` the images are disturbed as in training.
    """
    tower, root = template(), jax.random.key(seed or 0)

    @jax.jit
    def run(params, images, key):
        return tower.bind(params)(images if seed is None else disturb(images, key))

    def look(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            states = run(params, padded, jax.random.fold_in(root, start))
            parts.append(np.asarray(states)[: len(part)])
        return np.concatenate(parts)

    return look


def see(look: Look, heads: Heads, images: UInt8[np.ndarray, "i 64 64 3"]) -> list[Scene]:
    """What the head reads: each place from the first query that tells of it."""
    states, fields = look(images), by_turns(len(PLACES))
    found = np.zeros((len(images), fields.shape[1]), np.int32)
    for place in range(len(PLACES)):
        classes = np.asarray(read(heads, jnp.asarray(states[:, place])))
        found = np.where(fields[place], classes, found)
    return scenes_of(found)


def measure(params: Params, heads: Heads, seed: int = 1) -> dict[str, float]:
    """Share of held-out images of which everything is read rightly."""
    random, result, look = np.random.default_rng(seed), {}, make_look(params)
    for count in (1, 2, 3):
        scenes = [draw_scene(random, held_out=True, count=count) for _ in range(300)]
        told = see(look, heads, render(scenes))
        right = np.mean([got == want for got, want in zip(told, scenes, strict=True)])
        result[f"scene read from the queries, {count} objects"] = float(right)
    return result


def write(assets: Path, eyes: Params) -> None:
    """ViT, and Q-Former with the norm before it, into their own files."""
    files.write_tower(assets, "vit", eyes, VIT, prefix="vit/")
    rest = {path: v for path, v in eyes.items() if not path.startswith("vit/")}
    files.write_tower(assets, "qformer", rest, QFORMER)


def read_eyes(assets: Path) -> Params:
    """Both towers as they are stored."""
    return files.read_tower(assets, "vit", prefix="vit/") | files.read_tower(assets, "qformer")
