"""How good the small world's backbones are, measured on the files as they are shipped.

    python -m minigpt5_jax.shapes.backbones.evaluate [--only native] [--only vae] [--objects 1] [--count 500]

``native`` is the ceiling of stage 1: the UNet driven by its own text encoder on held-out captions.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.text.templates import clean_caption
from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.diffusion.samplers import guided
from minigpt5_jax.diffusion.schedule import SD21_BASE
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.vae.model import AutoencoderKL
from minigpt5_jax.parts.generators.stable_diffusion import StableDiffusion
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.backbones import train_text, train_vae
from minigpt5_jax.shapes.backbones.describe import described
from minigpt5_jax.shapes.dataset import draw_pairs
from minigpt5_jax.shapes.oracle import score
from minigpt5_jax.shapes.render import IMAGE_SIZE
from minigpt5_jax.shapes.wording import caption
from minigpt5_jax.shapes.world import Scene, draw_scene

BATCH = 50
PARTS = ("native", "vae", "described")


def native(
    assets: Path = files.ASSETS,
    *,
    count: int = 500,
    seed: int = 0,
    objects: int = 1,
    sampler: str = "ddim",
    steps: int = 20,
    guidance: float = 2.0,
    padding_only: bool = False,
) -> dict[str, float]:
    """The oracle's scores of images for ``count`` held-out captions of so many ``objects``.

    ``padding_only`` replaces the features at real tokens, which depend on the wording, by their mean.
    """
    scenes, captions = held_out_captions(count, seed, objects)
    tokenizer = ClipTokenizer(assets / "sd/tokenizer")
    text = files.read_tower(assets, "text_encoder")
    ids, mask = tokenizer.encode(captions)
    features = train_text.features(text, ids, mask)
    if padding_only:
        features = np.where(mask[..., None] > 0, features.mean(0), features)
    empty = train_text.features(text, *tokenizer.encode([""]))[0]
    draw = make_native(assets, sampler=sampler, steps=steps, guidance=guidance)
    images = [
        np.asarray(draw(features[i : i + BATCH], empty, jax.random.fold_in(jax.random.key(seed), i)))
        for i in range(0, count, BATCH)
    ]
    return score(np.concatenate(images), scenes)


def held_out_captions(count: int, seed: int, objects: int) -> tuple[list[Scene], list[str]]:
    """Held-out scenes of so many objects with captions."""
    if objects == 1:
        return draw_pairs("held_out", count, seed)[1:]
    random = np.random.default_rng((seed, objects))
    scenes = [draw_scene(random, held_out=True, count=objects) for _ in range(count)]
    return scenes, [clean_caption(caption(scene, random)) for scene in scenes]


def make_native(assets: Path, *, sampler: str, steps: int, guidance: float):
    """``f(features [n 77 128], empty [77 128], key) -> images u8[n 64 64 3]`` of the written towers."""
    towers = {name: files.read_tower(assets, name) for name in ("unet", "vae", "text_encoder")}
    params = {f"{name}/{path}": value for name, tower in towers.items() for path, value in tower.items()}
    sizes = {name: files.read_config(assets, name) for name in towers}
    sizes |= {"schedule": SD21_BASE, "image_size": IMAGE_SIZE}
    sizes["empty_caption_ids"] = (0,) * train_text.POSITIONS
    template = Template.of(lambda rngs: StableDiffusion(**sizes, rngs=rngs))

    @jax.jit
    def draw(params, features, empty, key):
        generator = template.bind(params)
        noise = jax.random.normal(key, (len(features), *generator.latent_shape))
        condition = jnp.concatenate([jnp.broadcast_to(empty, features.shape), features])
        denoise = guided(generator.denoiser(condition), guidance)
        return generator.decode(generator.make_sampler(sampler, steps).sample(denoise, noise))

    return functools.partial(draw, params)


def reconstruction(assets: Path = files.ASSETS) -> dict[str, float]:
    """Share of held-out scenes the oracle reads rightly after the VAE, by noise on the latents."""
    config = files.read_config(assets, "vae")
    template = Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return train_vae.measure(files.read_tower(assets, "vae"), template)


def main() -> None:
    """Command line: prints JSON lines."""
    from absl import flags

    from minigpt5_jax import cli

    assets = cli.define_path("assets", str(files.ASSETS), "folder of the stored backbones")
    options = (
        flags.DEFINE_integer("count", 500, "held-out images of each number of objects", lower_bound=1),
        flags.DEFINE_integer("seed", 0, "of captions and noise"),
        flags.DEFINE_enum("sampler", "ddim", ["ddim", "pndm", "dpm_solver++"], "image sampler"),
        flags.DEFINE_integer("steps", 20, "denoising steps", lower_bound=1),
        flags.DEFINE_float("guidance", 2.0, "guidance scale"),
    )
    objects = flags.DEFINE_multi_enum("objects", ["1", "2", "3"], ["1", "2", "3"], "number of objects")
    only = flags.DEFINE_multi_enum("only", list(PARTS), list(PARTS), "what to measure")

    def run(_: list[str]) -> None:
        given, folder = {option.name: option.value for option in options}, Path(assets.value)
        if "vae" in only.value:
            print(json.dumps({"vae": reconstruction(folder)}), flush=True)
        if "described" in only.value:
            print(json.dumps({"described": described(folder)}), flush=True)
        for number in map(int, objects.value if "native" in only.value else ()):
            whole = native(folder, objects=number, **given)
            padding = native(folder, objects=number, padding_only=True, **given)["all"]
            result = {"objects": number, **given, "native": whole, "padding positions only": padding}
            print(json.dumps(result), flush=True)

    cli.start(lambda words: cli.guarded(lambda: run(words)))


if __name__ == "__main__":
    main()
