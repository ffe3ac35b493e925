"""Forward FLOPs of every full-size tower, one JSON line each, counted without allocating or compiling.

    JAX_PLATFORMS=cpu python benchmarks/flops.py            # about a minute

``published`` is what torch's counter gives for the original's towers, in TFLOP per sample (a sample
is a 512-pixel picture, a 224-pixel picture, a caption of 77 tokens, eight voken states, or one token).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.clip_text import SD21_TEXT, ClipTextModel
from minigpt5_jax.models.common import Template
from minigpt5_jax.models.eva_vit import EVA_VIT_G, EvaVit
from minigpt5_jax.models.mapper import MINIGPT5_MAPPER, FeatureMapper
from minigpt5_jax.models.qformer import BLIP2_QFORMER, QFormer
from minigpt5_jax.models.unet import SD21_UNET, UNet2DConditionModel
from minigpt5_jax.models.vae import SD21_VAE, AutoencoderKL
from minigpt5_jax.training.flops import count_flops

Shape = jax.ShapeDtypeStruct
Tower = tuple[str, float, Callable[[nnx.Rngs], nnx.Module], Callable[..., Any], tuple[Shape, ...]]


def floats(*shape: int) -> Shape:
    """Abstract float32 input."""
    return Shape(shape, jnp.float32)


def ids(*shape: int) -> Shape:
    """Abstract int32 input."""
    return Shape(shape, jnp.int32)


def towers() -> Iterator[Tower]:
    """(name, published TFLOP, constructor, call, inputs) of a batch of one."""
    yield ("unet", 0.8043, lambda rngs: UNet2DConditionModel(SD21_UNET, rngs=rngs),
           lambda tower, *inputs: tower(*inputs), (floats(1, 64, 64, 4), ids(1), floats(1, 77, 1024)))
    yield ("mapper", 0.01017, lambda rngs: FeatureMapper(MINIGPT5_MAPPER, rngs=rngs),
           lambda tower, vokens: tower(vokens), (floats(1, 8, 4096),))
    yield ("vae_encode", 1.1167, lambda rngs: AutoencoderKL(SD21_VAE, rngs=rngs),
           lambda tower, pixels: tower.encode(pixels), (floats(1, 512, 512, 3),))
    yield ("vae_decode", 2.5145, lambda rngs: AutoencoderKL(SD21_VAE, rngs=rngs),
           lambda tower, latents: tower.decode(latents), (floats(1, 64, 64, 4),))
    yield ("clip_text", 0.0451, lambda rngs: ClipTextModel(SD21_TEXT, rngs=rngs),
           lambda tower, tokens: tower(tokens), (ids(1, 77),))
    yield ("eva_vit", 0.5207, lambda rngs: EvaVit(EVA_VIT_G, rngs=rngs),
           lambda tower, pixels: tower(pixels), (floats(1, 224, 224, 3),))
    yield ("qformer", 0.0127, lambda rngs: QFormer(BLIP2_QFORMER, rngs=rngs),
           lambda tower, patches: tower(patches), (floats(1, 257, 1408),))


def measure(tower: Tower) -> dict[str, object]:
    """Parameters and forward TFLOP of one tower."""
    name, published, make, call, inputs = tower
    template = Template.of(make)
    count = count_flops(lambda params, *xs: call(template.bind(params), *xs), template.shapes, *inputs)
    return {
        "tower": name,
        "parameters": sum(math.prod(shape.shape) for shape in template.shapes.values()),
        "tflop": round(count.total / 1e12, 6),
        "published": published,
        "by_primitive": {key: round(value / 1e12, 6) for key, value in count.by_primitive.items()},
    }


if __name__ == "__main__":
    for tower in towers():
        print(json.dumps(measure(tower)), flush=True)
