"""A session's two programs, texts and images, compiled for a topology that is not here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from minigpt5_jax.planning import hlo
from minigpt5_jax.planning.predict import UTILISATION, wire_seconds
from minigpt5_jax.planning.step import Compiled, bytes_per_chip, compile_for
from minigpt5_jax.planning.topology import Topology
from minigpt5_jax.training.flops import count_flops
from minigpt5_jax.training.sharding import ROWS, ShardingError
from minigpt5_jax.wiring.model import ModelSpec, build, parameter_layout
from minigpt5_jax.wiring.placement import open_mesh
from minigpt5_jax.wiring.session import answering, decoder_layers, takes_layers_apart

GIGA = 1e9
STOPS = ((835,), (2277, 29937))
"""``###`` as LLaMA's own tokenizer has it: another one changes nothing that costs."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a session compiles, abstract, with a place on the mesh for every argument.

    Attributes:
      longest: positions of a prompt.  batch: prompts, and images, at once.
      programs: name -> (function, its arguments); parameters are the first of them.
      counted: the images' program as it can be traced anywhere, and its arguments.
      layer_bytes: of a chip, of the language model's layers.
    """

    topology: Topology
    mesh: jax.sharding.Mesh
    longest: int
    batch: int
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
    counted: tuple[Callable[..., Any], tuple[Any, ...]]
    layer_bytes: int


def plan_programs(config: ConfigDict, topology: Topology, *, batch: int = 4, length: int = 0) -> Programs:
    """The programs that answer ``batch`` prompts of ``length`` positions (``data.max_length``) at once.

    Raises:
      ConfigError, ShardingError, PlanError: what does not go together, before anything is compiled.
    """
    config, longest = config.copy_and_resolve_references(), length or config.data.max_length
    attention = config.model.attention
    # Blocks of queries are traced anywhere; they multiply what the fused kernels do.
    config.model.attention = "blockwise" if attention == "auto" else attention
    anywhere = build(config)
    config.model.attention = topology.attention if attention == "auto" else attention
    spec = build(config)
    config, mesh = open_mesh(config, spec, topology.devices, topology.chip.memory)
    shards = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % shards:
        raise ShardingError(
            f"{batch} prompts at once do not divide over the {shards} chips of mesh data x fsdp; give "
            f"--batch_size={-(-batch // shards) * shards}"
        )
    params = _parameters(config, spec, mesh, topology.chip.platform)
    rows = NamedSharding(mesh, P(ROWS))
    given = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
    ints = lambda *shape: given(shape, np.int32)  # noqa: E731
    backbone, seeds = spec.backbone, given((batch,), np.uint32)
    images = batch if backbone.image_tokens else 0
    pixels = given((images, backbone.image_size, backbone.image_size, 3), np.uint8)
    vokens = given((batch, backbone.num_vokens, backbone.hidden_size), np.float32)
    write, draw = answering(config, spec, STOPS)
    programs = {
        "texts": (
            write,
            (params, ints(batch, longest), ints(batch), pixels, ints(images), ints(images), seeds),
        ),
        "images": (draw, (params, vokens, seeds, ints(batch))),
    }
    counted = answering(config, anywhere, STOPS)[1], programs["images"][1]
    layers = bytes_per_chip({path: params[path] for path in decoder_layers(spec.template)})
    return Programs(topology, mesh, longest, batch, programs, counted, layers)


def _parameters(
    config: ConfigDict, spec: ModelSpec, mesh: jax.sharding.Mesh, platform: str
) -> dict[str, Any]:
    """Every parameter, placed, the language model's layers taken apart where a session does so."""
    layout, apart = parameter_layout(config, spec, mesh), ()
    if takes_layers_apart(config, platform):
        apart = frozenset(decoder_layers(spec.template))
    params: dict[str, Any] = {}
    for path, shape in spec.template.shapes.items():
        place = layout.used.get(path, layout.stored[path])
        if path in apart:
            layer = NamedSharding(mesh, P(*place.spec[1:]))
            one = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype, sharding=layer)
            params[path] = (one,) * shape.shape[0]
        else:
            params[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    return params


def make_generation_plan(
    config: ConfigDict, topology: Topology, *, batch: int = 4, length: int = 0
) -> dict[str, Any]:
    """The plan of a session: what ``plan --generation --json`` prints, in GB of 10^9 bytes and seconds.

    Raises:
      ConfigError, ShardingError, PlanError: what does not go together, before anything is compiled.
    """
    planned = plan_programs(config, topology, batch=batch, length=length)
    plan: dict[str, Any] = {
        "topology": topology.name,
        "chips": len(topology.devices),
        "mesh": dict(planned.mesh.shape),
        "batch": batch,
        "prompt": planned.longest,
        "hbm_gb": topology.chip.memory / GIGA,
    }
    for name, (function, arguments) in planned.programs.items():
        with jax.set_mesh(planned.mesh):
            compiled = compile_for(topology, jax.jit(function), *arguments)
        plan[name] = _program(planned, compiled, arguments)
    return plan | _together(config, planned, [plan[name] for name in planned.programs])


def _program(planned: Programs, compiled: Compiled, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Memory and collectives of one program."""
    chip = planned.topology.chip
    told: dict[str, Any] = {
        "fits": compiled.memory is not None and compiled.needed <= chip.memory,
        "gb_per_chip": compiled.needed / GIGA,
        "weights_gb": bytes_per_chip(arguments[0]) / GIGA,
        "compile_seconds": compiled.seconds,
    }
    if compiled.memory is None:
        return told
    program = compiled.program()
    traffic = hlo.collectives(program, planned.mesh.size)
    return told | {
        "working_gb": (compiled.memory.temporary + compiled.memory.results) / GIGA,
        "collectives": {kind: dataclasses.asdict(moved) for kind, moved in traffic.items()},
        "wire_gb": sum(moved.wire for moved in traffic.values()) / GIGA,
        "wire_seconds": wire_seconds(chip, traffic),
        "loops_of_unknown_length": len(program.unknown),
    }


def _together(config: ConfigDict, planned: Programs, programs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether both fit, and the times that they cannot undercut by far."""
    chip, (draw, arguments) = planned.topology.chip, planned.counted
    flops = count_flops(
        draw, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    ).total
    return {
        "fits": all(one["fits"] for one in programs),
        "gb_per_chip": max(one["gb_per_chip"] for one in programs),
        "compile_seconds": sum(one["compile_seconds"] for one in programs),
        "seconds_a_token": planned.layer_bytes / chip.bandwidth,
        "flops_of_images": flops,
        "seconds_of_images": flops / planned.mesh.size / (UTILISATION * chip.peak_flops),
        "sampler": f"{config.inference.sampler}, {config.inference.num_inference_steps} steps",
    }


def as_text(plan: dict[str, Any], topology: Topology) -> str:
    """The plan for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [
        f"{plan['topology']}: {plan['chips']} x {topology.chip.title}, mesh {mesh}",
        f"{plan['batch']} prompts of {plan['prompt']} positions at once, as many images ({plan['sampler']})",
    ]
    for name in ("texts", "images"):
        one = plan[name]
        spare = plan["hbm_gb"] - one["gb_per_chip"]
        fits = f"fits, {spare:.2f} GB left" if one["fits"] else f"does not fit: {-spare:.2f} GB too much"
        lines.append(
            f"{name}: {one['gb_per_chip']:.2f} of {plan['hbm_gb']:.2f} GB of a chip, of which weights "
            f"{one['weights_gb']:.2f}: {fits}; compiled in {one['compile_seconds']:.0f} s"
        )
        if "collectives" in one:
            kinds = (
                ", ".join(f"{moved['count']} {kind}" for kind, moved in one["collectives"].items()) or "none"
            )
            once = " (a turn of unknown number counts once)" if one["loops_of_unknown_length"] else ""
            lines.append(f"  collectives: {kinds}; {one['wire_gb']:.4f} GB on the wire of a ring{once}")
    lines.append(
        f"predicted: {plan['seconds_a_token'] * 1e3:.2f} ms a token (the layers' weights read once), "
        f"{plan['seconds_of_images']:.2f} s for the images (work at {UTILISATION:.0%} of the matrix peak)"
    )
    return "\n".join(lines)
