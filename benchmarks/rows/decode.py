"""Row 13: greedy decoding against transformers' ``generate``, images by DDIM against diffusers' loop.

The reduced model in fp32.  Both sides must write the same tokens, and draw the same images up to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import generate
from benchmarks.reduced import Reduced, make_reduced
from benchmarks.report import line
from benchmarks.rows.step import torch_device
from benchmarks.timing import alternate, matmul_rate, read_rate
from minigpt5_jax.inference.decode import decode
from minigpt5_jax.inference.images import sample_images
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.models.abstract import take_layers_apart
from minigpt5_jax.training.flops import count_flops
from minigpt5_jax.wiring.session import decoder_layers

PROMPT, NEW = 32, 128
BATCHES = (1, 8)
IMAGE_BATCHES = (1, 4)
DDIM_STEPS, GUIDANCE = 20, 7.5
GREEDY = SamplingConfig(
    max_new_tokens=NEW,
    do_sample=False,
    repetition_penalty=1.0,
    top_k=0,
    top_p=1.0,
    max_images=0,
    eos_ids=(),
    stop_sequences=(),
)


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decoding at each batch, then images."""
    model = make_reduced(device=torch_device(options.device))
    for batch in BATCHES:
        yield _decoding(model, batch, options.blocks)
    for batch in IMAGE_BATCHES:
        yield _images(model, batch, options.blocks)


def _decoding(model: Reduced, batch: int, blocks: int) -> dict[str, Any]:
    prompts = np.random.default_rng(1).integers(3, model.towers.sizes.vocabulary, (batch, PROMPT))
    ours, theirs = decoder(model, prompts), generate.text(model.towers, prompts, NEW)
    same = float((ours() == theirs()).mean())
    times = alternate({"ours": ours, "transformers": theirs}, blocks)
    # Every token reads the language model once.
    weights = sum(v.nbytes for path, v in model.params.items() if path.startswith("backbone/"))
    limit = NEW * weights / read_rate()
    told = times.compared("transformers")
    return line(
        13,
        f"decode, batch {batch}",
        **told,
        limit=limit,
        unit=f"s for {NEW} tokens",
        same_tokens=same,
        tokens_per_s=batch * NEW / times.median("ours"),
    )


def decoder(model: Reduced, prompts: np.ndarray) -> Callable[[], np.ndarray]:
    """Our greedy continuation of prompts i64[b t], compiled: i32[b NEW]."""
    template, backbone = model.spec.template, model.spec.backbone
    first, count = backbone.vocab_size, backbone.num_vokens

    def run(params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> jax.Array:
        llm = template.bind(params).backbone.decoder
        answer = decode(llm, llm.embed(tokens), lengths, keys, GREEDY, first_voken_id=first, num_vokens=count)
        return answer.tokens

    batch, params = len(prompts), dict(model.params)
    take_layers_apart(params, decoder_layers(template))  # inference.layers=apart
    keys = jax.random.split(jax.random.key(0), batch)
    arguments = (params, jnp.asarray(prompts, jnp.int32), jnp.full(batch, PROMPT, jnp.int32), keys)
    compiled = jax.jit(run).lower(*arguments).compile()
    return lambda: np.asarray(compiled(*arguments))


def _images(model: Reduced, batch: int, blocks: int) -> dict[str, Any]:
    generator = model.spec.generator
    condition, negative, latents = (
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        for seed, shape in (
            (2, (batch, *generator.condition_shape)),
            (3, generator.condition_shape),
            (4, (batch, *generator.latent_shape)),
        )
    )
    sampler, template = generator.make_sampler("ddim", DDIM_STEPS), model.spec.template

    def run(params: Any, *inputs: jax.Array) -> jax.Array:
        return sample_images(template.bind(params).generator, sampler, *inputs, GUIDANCE)

    arguments = (model.params, *map(jnp.asarray, (condition, negative[None], latents)))
    compiled = jax.jit(run).lower(*arguments).compile()
    ours = lambda: np.asarray(compiled(*arguments))  # noqa: E731
    theirs = generate.images(model.towers, condition, negative, latents, DDIM_STEPS, GUIDANCE)
    difference = float(np.abs(ours().astype(int) - theirs().astype(int)).mean())
    times = alternate({"ours": ours, "diffusers": theirs}, blocks)
    flops = count_flops(run, *arguments).total
    return line(
        13,
        f"image, batch {batch}",
        **times.compared("diffusers"),
        limit=flops / matmul_rate(),
        unit=f"s for {batch} of 256 pixels, DDIM {DDIM_STEPS}",
        difference=difference,
        gflop=flops / 1e9,
    )
