"""FLOPs of every full-size tower, one JSON line each, counted without allocating or compiling.

    JAX_PLATFORMS=cpu python benchmarks/flops.py            # about a minute

In TFLOP per sample: a 512-pixel image, a 224-pixel image, a caption of 77 tokens, eight voken
states, or 24 tokens through the language model and its head.  ``torch`` is what torch's counter gives
for the original's towers.  Where training goes through a tower, ``with_gradient`` adds the backward
pass: through frozen towers to their input or condition only, through the mapper to its weights too.

XLA's own cost analysis counts a loop body once and depends on the backend.  :func:`count_flops` reads the
jaxpr: loops are multiplied out, and what no output needs is removed first, so that counts answer questions
such as "does the train step compute gradients of frozen weights?" on any machine (tests/training ask it).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.clip_text.model import SD21_TEXT, ClipTextModel
from minigpt5_jax.models.eva_vit.model import EVA_VIT_G, EvaVit
from minigpt5_jax.models.llama.model import VICUNA_7B, Llama
from minigpt5_jax.models.mapper.model import MINIGPT5_MAPPER, FeatureMapper
from minigpt5_jax.models.qformer.model import BLIP2_QFORMER, QFormer
from minigpt5_jax.models.unet.model import SD21_UNET, UNet2DConditionModel
from minigpt5_jax.models.vae.model import SD21_VAE, AutoencoderKL

# Higher-order primitives that run their body exactly once.
_CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "checkpoint",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_lin",
    }
)


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Floating-point operations, two per multiply-add.

    Attributes:
      total: sum over primitives.
      by_primitive: ``dot_general`` and ``conv_general_dilated``, where they occur.
      counted_once: loops of unknown length (``while``) and other bodies with FLOPs whose number of
        runs the jaxpr does not tell; if not empty, ``total`` is a lower bound.
    """

    total: int
    by_primitive: dict[str, int]
    counted_once: tuple[str, ...] = ()


def count_flops(fn: Callable[..., Any], *args: Any) -> FlopCount:
    """FLOPs of ``fn(*args)``; arguments may be arrays or ``jax.ShapeDtypeStruct``s, nothing is run.

    Counted are dot products and convolutions after dead-code elimination, with scans multiplied by
    their length, the dearest branch of a ``cond``, and ``shard_map`` bodies by the number of devices.
    A convolution over a dilated input (the gradient of a strided one) is counted without the zeros;
    taps that fall on padding are counted.
    """
    closed = jax.make_jaxpr(fn)(*args)
    live, _ = dce_jaxpr(_open(closed), True)
    counts, counted_once = _count(live)
    return FlopCount(sum(counts.values()), dict(counts), tuple(sorted(counted_once)))


def _open(jaxpr: Any) -> Jaxpr:
    """The jaxpr inside a closed one (newer versions of JAX do not tell them apart)."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _count(jaxpr: Jaxpr) -> tuple[Counter[str], set[str]]:
    """FLOPs by primitive, and the names of bodies whose number of runs is unknown."""
    counts: Counter[str] = Counter()
    counted_once: set[str] = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _LEAVES:
            counts[name] += _LEAVES[name](eqn)
            continue
        bodies = [_count(_open(body)) for body in jaxprs_in_params(eqn.params)]
        if name == "cond":
            bodies = [max(bodies, key=lambda body: sum(body[0].values()))]
        runs = _runs(eqn)
        for body, inner in bodies:
            counts.update({key: value * (runs or 1) for key, value in body.items()})
            counted_once |= inner
            if runs is None and body:
                counted_once.add(name)
    return counts, counted_once


def _runs(eqn: JaxprEqn) -> int | None:
    """How often the bodies of a higher-order primitive run; None if the jaxpr does not tell."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1 if name == "cond" or name in _CALLS else None


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _conv_general_dilated(eqn: JaxprEqn) -> int:
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = kernel.size // out_features
    return 2 * eqn.outvars[0].aval.size * taps // math.prod(eqn.params["lhs_dilation"])


_LEAVES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
}


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
