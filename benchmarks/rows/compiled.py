"""Rows 5b, 6 and 7b: the real programs at full size, compiled for chips that are not here.

What the compiler plans (memory) and what the program reads and writes (bytes) are exact for these versions of
the compilers; nothing is run.  A case whose compiler is not installed prints ``met: null`` and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.report import line
from benchmarks.run_files import read_run_file
from minigpt5_jax.config import ConfigError
from minigpt5_jax.inference.decode import decode
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import VICUNA_7B, Llama
from minigpt5_jax.models.unet.model import SD21_UNET, UNet2DConditionModel
from minigpt5_jax.planning import hlo
from minigpt5_jax.planning.step import Compiled, compile_for, plan_step
from minigpt5_jax.planning.topology import PlanError, Topology, open_topology
from minigpt5_jax.training.sharding import ShardingError
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.session import LoadedModel, decoder_layers

GIGA = 1e9
BF16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
UNET_BATCH = 4
PROMPT, NEW, VOKENS = 32, 64, 8
STEPS: tuple[tuple[str, str, str, str, int, int | None], ...] = (
    ("stage 1, int8, v5e", "stage1", "int8", "v5e:1x1", 1, None),
    ("stage 2, int8, v5e", "stage2_vist", "int8", "v5e:1x1", 13, None),
    ("stage 1, bf16, GPU", "stage1", "", "h100:1", 1, 24 * 10**9),
)
"""Row 6: case, run file, variant, topology, samples, and bytes of a chip where the named one has more."""


def on_topology(
    row: int | str, case: str, name: str, measure: Callable[[Topology], dict[str, Any]]
) -> dict[str, Any]:
    """The line of a case; one without a number, and the reason, where it cannot be compiled here."""
    try:
        return line(row, case, peer=None, **measure(open_topology(name)))
    except (PlanError, ConfigError, ShardingError) as error:
        return line(row, case, ours=None, peer=None, reason=str(error))


def unet_bytes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 5b."""
    yield on_topology("5b", "UNet, v5e", "v5e:1x1", _unet)


def _unet(topology: Topology) -> dict[str, Any]:
    make = lambda rngs: UNet2DConditionModel(SD21_UNET, rngs=rngs, **BF16)  # noqa: E731
    template = Template.of(make, attention=topology.attention)
    latents = jax.ShapeDtypeStruct((UNET_BATCH, 64, 64, 4), jnp.bfloat16)
    steps = jax.ShapeDtypeStruct((UNET_BATCH,), jnp.int32)
    context = jax.ShapeDtypeStruct((UNET_BATCH, 77, 1024), jnp.bfloat16)

    def run(params: Any, latents: jax.Array, steps: jax.Array, context: jax.Array) -> Any:
        def loss(context: jax.Array) -> jax.Array:
            return template.bind(params)(latents, steps, context).astype(jnp.float32).sum()

        return jax.value_and_grad(loss)(context)

    compiled = compile_for(topology, jax.jit(run), *_here(topology, template.shapes, latents, steps, context))
    counted = hlo.count_bytes(_program(compiled), compiled.compiler_bytes)
    return {
        "ours": counted.total / GIGA / UNET_BATCH,
        "unit": "GB/sample",
        "compiler_gb": counted.compiler / GIGA,
        "custom_calls_gb": counted.custom_calls / GIGA,
        "loops_gb": counted.loops / GIGA,
        **_memory(compiled, topology),
    }


def step_memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 6."""
    for case, run_file, variant, name, samples, limit in STEPS:
        config = read_run_file(run_file, variant)
        config.data.update(global_batch=samples, accumulation=1)
        yield on_topology(6, case, name, functools.partial(_step, config, limit))
    yield on_topology(6, "generation, int8, v5e", "v5e:1x1", _generation)


def _step(config: ConfigDict, limit: int | None, topology: Topology) -> dict[str, Any]:
    """The training step; what it computes again follows from the memory of the chip."""
    if limit:
        topology = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=limit))
    step = plan_step(config, topology)
    compiled = step.compile()
    return {
        "ours": compiled.needed / GIGA,
        "unit": "GB",
        "remat": step.remat,
        **_memory(compiled, topology),
    }


def _generation(topology: Topology) -> dict[str, Any]:
    """One answer to a prompt with an image, and all that a session loads: its text, then its image."""
    config = read_run_file("stage2_vist", "int8")
    config.model.attention = topology.attention
    spec = build(config)
    params = _apart(spec.template.shapes, decoder_layers(spec.template))
    sizes = spec.template.bind(spec.template.shapes).backbone
    tokenizer = types.SimpleNamespace(
        first_voken_id=sizes.vocab_size, num_vokens=VOKENS, encode=lambda text: list(text.encode())
    )
    session = LoadedModel(config, spec, params, tokenizer, 0).session(batch_size=1)
    one, seed = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.uint32)
    tokens = jax.ShapeDtypeStruct((1, config.data.max_length), jnp.int32)
    images = jax.ShapeDtypeStruct((1, sizes.image_size, sizes.image_size, 3), jnp.uint8)
    asked = (params, tokens, one, images, one, one, seed)
    states = jax.eval_shape(session._write, *asked).voken_states
    vokens = jax.ShapeDtypeStruct((1, *states.shape[2:]), states.dtype)
    programs = {
        "text": compile_for(topology, session._write, *_here(topology, *asked)),
        "image": compile_for(topology, session._draw, *_here(topology, params, vokens, seed, one)),
    }
    resident = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    beside = {}
    for name, compiled in programs.items():
        _program(compiled)
        beside[name] = compiled.needed - compiled.memory.arguments
    needed = resident + max(beside.values())
    return {
        "ours": needed / GIGA,
        "unit": "GB",
        "resident_gb": resident / GIGA,
        **{f"{name}_gb": size / GIGA for name, size in beside.items()},
        "compile_seconds": sum(compiled.seconds for compiled in programs.values()),
        "fits": needed <= topology.chip.memory,
    }


def _apart(shapes: Mapping[str, Any], stacked: Iterable[str]) -> dict[str, Any]:
    """Shapes with the layers of ``stacked`` apart, as decoding on an accelerator has them."""
    params = dict(shapes)
    for path in stacked:
        shape = params[path]
        params[path] = (jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype),) * shape.shape[0]
    return params


def decode_bytes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 7b."""
    for case, name in (("decode, v5e", "v5e:1x1"), ("decode, H100", "h100:1")):
        yield on_topology("7b", case, name, _decode)


def _decode(topology: Topology) -> dict[str, Any]:
    """Greedy decoding by the whole language model in bf16, its layers apart."""
    template = Template.of(lambda rngs: Llama(VICUNA_7B, rngs=rngs, **BF16))
    params = _apart(template.shapes, [path for path, axes in template.axes.items() if "layers" in axes])
    greedy = SamplingConfig(max_new_tokens=NEW, do_sample=False, stop_sequences=(), max_images=1)

    def run(params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array) -> jax.Array:
        llm = template.bind(params)
        first = VICUNA_7B.vocab_size
        answer = decode(
            llm, llm.embed(tokens), lengths, keys, greedy, first_voken_id=first, num_vokens=VOKENS
        )
        return answer.tokens

    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, PROMPT), (1,)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    compiled = compile_for(topology, jax.jit(run), *_here(topology, params, tokens, lengths, keys))
    program = _program(compiled)
    bodies = [
        body
        for instruction, _ in program.executed()
        if instruction.op == "while"
        for body in [instruction.rest.partition("body=%")[2].partition(",")[0]]
    ]
    token = max(hlo.loop_bytes(program, body) for body in bodies)
    # A token reads one row of the embedding, and all else.
    read = {path: value for path, value in params.items() if "embed" not in path}
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(read))
    return {
        "ours": token / weights,
        "unit": "bytes read / weights",
        "token_gb": token / GIGA,
        **_memory(compiled, topology),
    }


def _program(compiled: Compiled) -> hlo.Program:
    """What was compiled; PlanError where the compiler gave up."""
    if compiled.memory is None:
        raise PlanError(f"does not fit: {compiled.needed / GIGA:.2f} GB")
    return compiled.program()


def _here(topology: Topology, *trees: Any) -> tuple[Any, ...]:
    """Shapes on the first chip."""
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), trees)


def _memory(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    told = {
        "needed_gb": compiled.needed / GIGA,
        "compile_seconds": compiled.seconds,
        "fits": compiled.memory is not None and compiled.needed <= topology.chip.memory,
    }
    if compiled.memory is not None:
        told |= {
            "arguments_gb": compiled.memory.arguments / GIGA,
            "temporary_gb": compiled.memory.temporary / GIGA,
        }
    return told
