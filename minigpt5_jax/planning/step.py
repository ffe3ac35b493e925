"""The real train step of a configuration, compiled for a topology that is not here."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.planning import hlo
from minigpt5_jax.planning.shapes import STORY_ITEMS, STORY_SAMPLES, planned_shapes
from minigpt5_jax.planning.topology import OPTIONS, Topology
from minigpt5_jax.training.sharding import Layout, batch_shardings, state_shardings
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import make_train_step
from minigpt5_jax.wiring.features import encoder_bytes, plans_features
from minigpt5_jax.wiring.memory import fit_memory
from minigpt5_jax.wiring.model import ModelSpec, build, parameter_layout, with_micro_batches
from minigpt5_jax.wiring.placement import fewest_that_fit, fit_accumulation, open_mesh, with_accumulation
from minigpt5_jax.wiring.training import open_optimizer
from minigpt5_jax.wiring.used_towers import abstract_batch, unused_towers
from minigpt5_jax.wiring.weight_paths import check_given

STEPS = 100_000
"""Updates that the rates are made for, which change nothing that is compiled."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a program on one chip, as its compiler plans them.

    Attributes:
      arguments: what it is given.  results: what it returns, without what takes the place of an argument.
      temporary: the rest.  code: the program itself.
    """

    arguments: int
    results: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a topology.

    Attributes:
      memory: None where the compiler gave up, as it does not fit.
      needed: bytes of one chip that it takes.
      seconds: of compiling.
      text: the compiled program; '' where the compiler gave up.
      compiler_bytes: what it reads and writes, by the compiler's own count; 0 where it does not tell.
    """

    memory: Memory | None
    needed: int
    seconds: float
    text: str
    compiler_bytes: float

    def program(self) -> hlo.Program:
        """Its instructions."""
        return hlo.read(self.text)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a run of a configuration jits, abstract, with a place on the mesh for every argument.

    Attributes:
      config: as the topology settles it.  spec: without the towers that the run does not read.
      remat: what is computed again.  mesh: of the topology.  shapes: of a micro-batch.
      function, arguments: ``function(state, frozen, batch)``.  places: of the state that it returns.
      encoders: bytes of a chip that hold what writes features in the first epoch, besides the step.
      counted: configuration and model that can be traced anywhere, with the same matrix products.
    """

    topology: Topology
    config: ConfigDict
    spec: ModelSpec
    remat: str
    mesh: jax.sharding.Mesh
    shapes: BatchSpec
    function: Any
    arguments: tuple[Any, Any, Any]
    places: Any
    encoders: int
    counted: tuple[ConfigDict, ModelSpec]

    def compile(self) -> Compiled:
        """The program; minutes at full size."""
        jitted = jax.jit(self.function, donate_argnums=0, out_shardings=(self.places, None))
        with jax.set_mesh(self.mesh):
            return compile_for(self.topology, jitted, *self.arguments)


def abstract_step(config: ConfigDict, spec: ModelSpec, layout: Layout | None = None) -> tuple[Any, Any, Any]:
    """(train step, its state, frozen weights) of a configuration, shapes only."""
    optimizer = open_optimizer(config, spec, STEPS)
    shapes = {path: shape for path, shape in spec.template.shapes.items() if path not in spec.template.absent}
    trainable = {path: shape for path, shape in shapes.items() if spec.labels[path] != FROZEN}
    frozen = {path: shape for path, shape in shapes.items() if spec.labels[path] == FROZEN}
    state = jax.eval_shape(lambda values: init_state(values, spec.labels, optimizer, 0), trainable)
    step = make_train_step(spec.template, spec.labels, optimizer, spec.options, layout=layout)
    return step, state, frozen


def plan_step(
    config: ConfigDict, topology: Topology, *, length: int = 0, shapes: BatchSpec | None = None
) -> Step:
    """The step that a run of ``config`` jits on ``topology``.

    Args:
      length: positions of a row, in the place of the longest.
      shapes: of a micro-batch, where they are known.

    Raises:
      ConfigError, ShardingError, PlanError: what does not go together, before anything is compiled.
      WeightFileError: weights that are given, though none are needed, are quantised already.
    """
    check_given(config)
    config, attention = config.copy_and_resolve_references(), config.model.attention
    # Blocks of queries are traced anywhere; they keep and multiply what the fused kernels do.
    config.model.attention = "blockwise" if attention == "auto" else attention
    spec = build(config)
    spec = spec.without(unused_towers(config, spec, watched=False))
    config, mesh = open_mesh(config, spec, topology.devices, topology.chip.memory)
    layout = parameter_layout(config, spec, mesh)
    config, shapes = _settle_batch(config, spec, layout, topology, length, shapes)
    spec = with_micro_batches(spec, config)
    batch = place_batch(shapes, mesh, config.data.accumulation)
    encoders = _encoders(config, spec, layout)
    spec, remat = fit_memory(
        config, spec, abstract_batch(shapes), layout, topology.chip.memory, extra=encoders
    )
    counted = config.copy_and_resolve_references(), spec
    if attention == "auto":
        config.model.attention = topology.attention
        spec = build(config, remat=remat).without(spec.unused)
    function, state, frozen = abstract_step(config, spec, layout)
    places = state_shardings(state, layout.stored, mesh)
    arguments = (
        placed(state, places),
        placed(frozen, {path: layout.stored[path] for path in frozen}),
        batch,
    )
    return Step(topology, config, spec, remat, mesh, shapes, function, arguments, places, encoders, counted)


def _settle_batch(
    config: ConfigDict,
    spec: ModelSpec,
    layout: Layout,
    topology: Topology,
    length: int,
    shapes: BatchSpec | None,
) -> tuple[ConfigDict, BatchSpec]:
    """(configuration with its micro-batches settled, shapes of one), as a run settles them."""
    chip, story = topology.chip, {"story": STORY_SAMPLES, "items": STORY_ITEMS}
    if shapes is not None:
        return fit_accumulation(config, layout.mesh, **story), shapes

    def fewest(counts: Sequence[int]) -> int:
        whole = planned_shapes(with_accumulation(config, 1), spec, topology.devices, length)
        extra = _encoders(config, spec, layout)
        fits = fewest_that_fit(config, spec, abstract_batch(whole), layout, chip.memory, extra=extra)
        return fits(counts)

    config = fit_accumulation(config, layout.mesh, **story, fewest=fewest)
    return config, planned_shapes(config, spec, topology.devices, length)


def _encoders(config: ConfigDict, spec: ModelSpec, layout: Layout) -> int:
    writes = config.data.cache == "on" and plans_features(config)
    return encoder_bytes(config, spec, layout.stored) if writes else 0


def place_batch(shapes: BatchSpec, mesh: jax.sharding.Mesh, accumulation: int) -> Any:
    """The abstract batch of a step on a mesh; ShardingError where it does not divide."""
    batch = abstract_batch(shapes)
    if accumulation > 1:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((accumulation, *x.shape), x.dtype), batch)
    return placed(batch, batch_shardings(batch, mesh, accumulation))


def placed(tree: Any, places: Any) -> Any:
    """Shapes with the shardings that the compiler is to be told of."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def bytes_per_chip(tree: Any) -> int:
    """Bytes of placed shapes on one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * _item_bytes(x.dtype) for x in jax.tree.leaves(tree)
    )


def _item_bytes(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def compile_for(topology: Topology, jitted: Any, *arguments: Any) -> Compiled:
    """A jitted function compiled for a topology, whose devices the arguments' shardings name."""
    platform = topology.chip.platform
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=OPTIONS[platform] or None)
    except jax.errors.JaxRuntimeError as error:
        needed = _refused(str(error))
        if needed is None:
            raise
        return Compiled(None, needed, time.monotonic() - start, "", 0.0)
    seconds = time.monotonic() - start
    told = compiled.memory_analysis()
    memory = Memory(
        told.argument_size_in_bytes,
        told.output_size_in_bytes - told.alias_size_in_bytes,
        told.temp_size_in_bytes,
        told.generated_code_size_in_bytes,
    )
    cost: Mapping[str, float] = compiled.cost_analysis() or {}
    return Compiled(memory, memory.total, seconds, compiled.as_text(), cost.get("bytes accessed", 0.0))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _refused(message: str) -> int | None:
    """Bytes of a program that its compiler refused as too large; None where that was not the reason.

    Some refusals tell of the temporaries alone, which do not fit without the arguments either.
    """
    used = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", message)
    used = used or re.search(r"HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM", message)
    return int(float(used[1]) * _UNITS[used[2]]) if used else None
