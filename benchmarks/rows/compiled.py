"""Rows 5b, 6 and 7b: the real programs at full size, compiled for chips that are not here.

What the compiler plans (memory) and what the program reads and writes (bytes) are exact for these versions of
the compilers; nothing is run.  A case whose compiler is not installed, or whose variant of a run file is not
there, prints ``met: null`` and why.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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

GIGA = 1e9
BF16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
UNET_BATCH = 4
PROMPT, NEW, VOKENS = 32, 64, 8
STEPS: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("stage 1, int8, v5e", "stage1", "int8", "v5e:1x1", {"global_batch": 1, "accumulation": 1}),
    ("stage 2, int8, v5e", "stage2_vist", "int8", "v5e:1x1", {"global_batch": 13, "accumulation": 1}),
    ("stage 1, bf16, GPU", "stage1", "", "h100:1", {"global_batch": 1, "accumulation": 1}),
)
"""Row 6: case, run file, variant, topology and what changes below ``data``."""


def on_topology(
    row: int | str, case: str, name: str, measure: Callable[[Topology], dict[str, Any]]
) -> dict[str, Any]:
    """The line of a case; one without a number, and the reason, where it cannot be compiled here."""
    try:
        return line(row, case, peer=None, **measure(open_topology(name)))
    except (PlanError, ConfigError) as error:
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
    counted = hlo.count_bytes(compiled.program(), compiled.compiler_bytes)
    return {
        "ours": counted.total / GIGA / UNET_BATCH,
        "unit": "GB/sample",
        "compiler_gb": counted.compiler / GIGA,
        "custom_calls_gb": counted.custom_calls / GIGA,
        "loops_gb": counted.loops / GIGA,
        **_memory(compiled),
    }


def step_memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 6."""
    for case, run_file, variant, name, changes in STEPS:

        def measure(topology: Topology, chosen: Any = (run_file, variant, changes)) -> dict[str, Any]:
            config = read_run_file(*chosen[:2])
            config.data.update(**chosen[2])
            compiled = plan_step(config, topology).compile()
            return {"ours": compiled.needed / GIGA, "unit": "GB", **_memory(compiled)}

        yield on_topology(6, case, name, measure)


def decode_bytes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 7b."""
    for case, name in (("decode, v5e", "v5e:1x1"), ("decode, H100", "h100:1")):
        yield on_topology("7b", case, name, _decode)


def _decode(topology: Topology) -> dict[str, Any]:
    """Greedy decoding by the whole language model in bf16, its layers apart."""
    template = Template.of(lambda rngs: Llama(VICUNA_7B, rngs=rngs, **BF16))
    params: dict[str, Any] = dict(template.shapes)
    for path, axes in template.axes.items():
        if "layers" in axes:
            shape = params[path]
            params[path] = (jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype),) * shape.shape[0]
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
    program = compiled.program()
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
        **_memory(compiled),
    }


def _here(topology: Topology, *trees: Any) -> tuple[Any, ...]:
    """Shapes on the first chip."""
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), trees)


def _memory(compiled: Compiled) -> dict[str, Any]:
    told = {
        "needed_gb": compiled.needed / GIGA,
        "compile_seconds": compiled.seconds,
        "fits": compiled.memory is not None,
    }
    if compiled.memory is not None:
        told |= {
            "arguments_gb": compiled.memory.arguments / GIGA,
            "temporary_gb": compiled.memory.temporary / GIGA,
        }
    return told
