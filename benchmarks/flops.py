"""FLOPs of every full-size tower, one JSON line each, counted without allocating or compiling.

    JAX_PLATFORMS=cpu python benchmarks/flops.py            # about a minute

In TFLOP per sample: a 512-pixel image, a 224-pixel image, a caption of 77 tokens, eight voken
states, or 24 tokens through the language model and its head.  ``torch`` is what torch's counter gives
for the original's towers.  Where training goes through a tower, ``with_gradient`` adds the backward
pass: through frozen towers to their input or condition only, through the mapper to its weights too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text.model import SD21_TEXT, ClipTextModel
from minigpt5_jax.models.eva_vit.model import EVA_VIT_G, EvaVit
from minigpt5_jax.models.llama.model import VICUNA_7B, Llama
from minigpt5_jax.models.mapper.model import MINIGPT5_MAPPER, FeatureMapper
from minigpt5_jax.models.qformer.model import BLIP2_QFORMER, QFormer
from minigpt5_jax.models.unet.model import SD21_UNET, UNet2DConditionModel
from minigpt5_jax.models.vae.model import SD21_VAE, AutoencoderKL
from minigpt5_jax.training.flops import count_flops

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tower and one way to call it.

    Attributes:
      torch: its forward TFLOP by torch's counter.
      gradient: (arguments to differentiate, 0 being the weights; torch's TFLOP of both passes).
    """

    name: str
    torch: float
    make: Callable[[nnx.Rngs], nnx.Module]
    call: Callable[..., jax.Array]
    inputs: tuple[Shape, ...]
    gradient: tuple[tuple[int, ...], float] | None = None


def floats(*shape: int) -> Shape:
    """Abstract float32 input."""
    return Shape(shape, jnp.float32)


def ids(*shape: int) -> Shape:
    """Abstract int32 input."""
    return Shape(shape, jnp.int32)


def llama_logits(tower: Llama, embeds: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Logits at every position, as the original computes them."""
    hidden = tower(embeds, positions=positions, segment_ids=segment_ids)
    return jnp.concatenate(tower.logit_blocks(hidden), -1)


def towers() -> Iterator[Tower]:
    """Every tower with a batch of one."""
    yield Tower(
        "unet",
        0.8043,
        lambda rngs: UNet2DConditionModel(SD21_UNET, rngs=rngs),
        lambda tower, *inputs: tower(*inputs),
        (floats(1, 64, 64, 4), ids(1), floats(1, 77, 1024)),
        gradient=((3,), 1.6711),
    )
    yield Tower(
        "mapper",
        0.01017,
        lambda rngs: FeatureMapper(MINIGPT5_MAPPER, rngs=rngs),
        lambda tower, vokens: tower(vokens),
        (floats(1, 8, 4096),),
        gradient=((0, 1), 0.03052),
    )
    yield Tower(
        "llama",
        0.317,
        lambda rngs: Llama(VICUNA_7B, rngs=rngs),
        llama_logits,
        (floats(1, 24, 4096), ids(1, 24), ids(1, 24)),
        gradient=((1,), 0.635),
    )
    yield Tower(
        "vae_encode",
        1.1167,
        lambda rngs: AutoencoderKL(SD21_VAE, rngs=rngs),
        lambda tower, pixels: tower.encode(pixels),
        (floats(1, 512, 512, 3),),
    )
    yield Tower(
        "vae_decode",
        2.5145,
        lambda rngs: AutoencoderKL(SD21_VAE, rngs=rngs),
        lambda tower, latents: tower.decode(latents),
        (floats(1, 64, 64, 4),),
    )
    yield Tower(
        "clip_text",
        0.0451,
        lambda rngs: ClipTextModel(SD21_TEXT, rngs=rngs),
        lambda tower, tokens: tower(tokens),
        (ids(1, 77),),
    )
    yield Tower(
        "eva_vit",
        0.5207,
        lambda rngs: EvaVit(EVA_VIT_G, rngs=rngs),
        lambda tower, pixels: tower(pixels),
        (floats(1, 224, 224, 3),),
    )
    yield Tower(
        "qformer",
        0.0127,
        lambda rngs: QFormer(BLIP2_QFORMER, rngs=rngs),
        lambda tower, patches: tower(patches),
        (floats(1, 257, 1408),),
    )


def measure(tower: Tower) -> dict[str, object]:
    """Parameters, forward TFLOP, and both passes' where the tower is trained or trained through."""
    template = Template.of(tower.make)

    def forward(params, *inputs):
        return tower.call(template.bind(params), *inputs)

    def loss(*args):
        return forward(*args).sum()

    count = count_flops(forward, template.shapes, *tower.inputs)
    line: dict[str, object] = {
        "tower": tower.name,
        "parameters": sum(math.prod(shape.shape) for shape in template.shapes.values()),
        "forward": tflop(count.total),
        "torch": tower.torch,
        "by_primitive": {name: tflop(value) for name, value in count.by_primitive.items()},
    }
    if tower.gradient:
        arguments, published = tower.gradient
        both = count_flops(jax.value_and_grad(loss, arguments), template.shapes, *tower.inputs)
        line |= {"with_gradient": tflop(both.total), "torch_with_gradient": published}
    return line


def tflop(count: int) -> float:
    """FLOP -> TFLOP, to the MFLOP."""
    return round(count / 1e12, 6)


if __name__ == "__main__":
    for tower in towers():
        print(json.dumps(measure(tower)), flush=True)
