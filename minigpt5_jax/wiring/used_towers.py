"""Which towers a run uses, found by tracing what it will do; the others are neither looked for nor loaded.

Nothing is said by hand: start values, losses on a batch of the run's shapes and, where the run does them,
validation and images are traced with abstract values (nothing is compiled), and a tower is used where the
trace reads one of its parameters.  It is then loaded whole, for its hash in a checkpoint is that of the whole
tower.  What trains is always loaded.  Should the trace ever be wrong, the run ends in an
:class:`~minigpt5_jax.models.abstract.AbsentParameterError` that names the parameter.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.spec import BatchSpec, empty_arrays
from minigpt5_jax.inference.images import make_batch_sampler
from minigpt5_jax.parts.contracts import FROZEN, Part
from minigpt5_jax.shapes.render import IMAGE_SIZE
from minigpt5_jax.training.step import make_draw
from minigpt5_jax.training.validation import make_validation_step
from minigpt5_jax.wiring.features import plans_features, with_planned_features
from minigpt5_jax.wiring.inputs import SHAPES, batch_spec, micro_batch
from minigpt5_jax.wiring.model import ModelSpec
from minigpt5_jax.wiring.session import open_sampler

Reader = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of all parameters and of abstract inputs, which are the second."""


def unused_towers(
    config: ConfigDict, spec: ModelSpec, *, watched: bool, features: bool | None = None
) -> frozenset[str]:
    """Names under ``config.weights`` of the towers that the steps of this configuration never read.

    Args:
      spec: the whole model.
      watched: whether the run validates and draws held-out samples, as its configuration says.
      features: whether steps read features in the place of images; by default as the configuration plans.

    Raises:
      ConfigError: batches that the model cannot have, or an unknown sampler.
    """
    towers = {name: frozenset(spec.paths_of(part, use)) for name, part, use in spec.towers()}
    read = {path for path in spec.pretrained if spec.labels[path] != FROZEN}
    unused = {name for name, paths in towers.items() if not paths & read}
    with _without_garbage_collection():
        ready = plans_features(config) if features is None else features
        for reader in _readers(config, spec, watched, ready):
            if not unused:
                break
            read = paths_read(spec, *reader)
            unused = {name for name in unused if not towers[name] & read}
    return frozenset(unused)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Looking for garbage takes a third of the time of these traces (1.6 s of 5), which leave little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def paths_read(spec: ModelSpec, function: Callable[..., Any], inputs: tuple[Any, ...]) -> set[str]:
    """The parameters that ``function(parameters, *inputs)`` reads, whatever it computes of them."""
    shapes = spec.template.shapes
    # Not only what reaches an output: a tower must be there for a computation whose result is then dropped.
    jaxpr = jax.make_jaxpr(function)(shapes, *inputs).jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read |= {id(variable) for variable in jaxpr.outvars}
    return {path for path, variable in zip(sorted(shapes), jaxpr.invars) if id(variable) in read}


def _readers(config: ConfigDict, spec: ModelSpec, watched: bool, ready: bool) -> Iterator[Reader]:
    """Everything that a run does with parameters, the cheapest to trace first."""
    for part in spec.parts.values():
        if part.initial is not None:
            yield _start_values(spec, part), ()
    samples = micro_batch(config)
    shapes = batch_spec(config, spec, samples, max(config.data.pack, 1))
    yield _losses(spec), (abstract_batch(with_planned_features(config, spec, shapes) if ready else shapes),)
    if not (watched and holds_out(config)):
        return
    batch = abstract_batch(batch_spec(config, spec, samples))  # held-out images are never precomputed
    if draws_held_out(config):
        yield _images(config, spec), (batch,)
    if config.run.eval_every:
        validate = make_validation_step(spec.template, spec.options.loss)
        yield lambda params, batch: validate({}, params, batch), (batch,)


def _start_values(spec: ModelSpec, part: Part) -> Callable[[dict[str, Any]], Any]:
    """Start values of what a part trains, which may be made of its pretrained parameters."""

    def read(params: dict[str, Any]) -> Any:
        own: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for path, value in params.items():
            if path.startswith(part.prefix):
                own[path in spec.pretrained][path.removeprefix(part.prefix)] = value
        return part.initial(*own, spec.keys[part.kind], jax.random.key(0))

    return read


def _losses(spec: ModelSpec) -> Callable[[dict[str, Any], Batch], Any]:
    """Losses of a micro-batch; their gradients read nothing else."""
    options, draw = spec.options, make_draw(spec.template, spec.options)

    def read(params: dict[str, Any], batch: Batch) -> Any:
        draws = draw(jax.random.key(0), batch)
        return spec.template.bind(params).losses(batch, draws, options.loss)

    return read


def _images(config: ConfigDict, spec: ModelSpec) -> Callable[[dict[str, Any], Batch], Any]:
    """Images of held-out samples."""
    inference = config.inference
    sampler = open_sampler(config, spec)
    sample = make_batch_sampler(spec.template, sampler, inference.guidance_scale, inference.cfg_negative)

    def read(params: dict[str, Any], batch: Batch) -> Any:
        return sample(params, batch, jax.random.split(jax.random.key(0), batch.item_id.shape[0]))

    return read


def abstract_batch(shapes: BatchSpec) -> Batch:
    """A batch of these shapes without values."""
    arrays = empty_arrays(shapes)
    return Batch(**{name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()})


def holds_out(config: ConfigDict) -> bool:
    """Whether a run has held-out samples."""
    return config.data.format in SHAPES or bool(config.data.validation)


def draws_held_out(config: ConfigDict) -> bool:
    """Whether a run draws images of its held-out samples: for grids, or for the oracle at each validation."""
    return bool(config.run.grid_every or (config.run.eval_every and readable(config)))


def readable(config: ConfigDict) -> bool:
    """Whether the oracle can read the images: of the small world, in the size it draws them."""
    return config.data.format in SHAPES and config.model.generator.image_size == IMAGE_SIZE
