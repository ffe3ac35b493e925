"""Row 3: TFLOP of a training step for a real sample, ours by jaxpr and P1's by torch's counter.

The default run files as they stand, full size, on cached moments; the lengths of captions and stories are
drawn by seed (:mod:`benchmarks.lengths`), and batches are those of the project's own loader, so that padding
counts as ours.  Nothing is allocated or compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import lengths
from benchmarks.goals import P1_TFLOP
from benchmarks.report import line
from benchmarks.run_files import loader_of, on_drawn_samples, read_run_file, shapes_of
from benchmarks.samples import Captions, Stories
from minigpt5_jax.batch import Batch
from minigpt5_jax.config import num_steps
from minigpt5_jax.data.sources.base import Source
from minigpt5_jax.planning.step import abstract_step
from minigpt5_jax.training.flops import count_flops, product_shapes
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.wiring.features import plans_features
from minigpt5_jax.wiring.inputs import epoch_samples, samples_of_a_story
from minigpt5_jax.wiring.memory import fit_memory
from minigpt5_jax.wiring.model import ModelSpec, build, parameter_layout, with_micro_batches
from minigpt5_jax.wiring.placement import fewest_that_fit, fit_accumulation
from minigpt5_jax.wiring.used_towers import abstract_batch

TERA = 1e12
DEVICE_BYTES = 80 * 10**9
SEED = 0
CAPTIONS, STORIES = 4_800, 96
"""Samples drawn: whole batches of 48 captions, of 32 samples and of 3 stories."""


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one pass over a source, a sample on average.

    Attributes:
      step: on ready features.  on_images: with the image towers in the step.  once: these towers alone, on
        every image of every sample once.
      shapes: rows x length -> steps of that shape.
      remat: what is computed again in the backward pass so that the step fits the device.
      frozen_gradients: matrix products in the step with the shape of a frozen kernel.
    """

    step: float
    on_images: float
    once: float
    shapes: dict[str, int]
    remat: str
    frozen_gradients: int


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Stage 1, then stage 2."""
    from benchmarks.peers.count import stage1_tflop, stage2_tflop  # torch

    captions = lengths.caption_lengths(CAPTIONS, SEED)
    texts = lengths.story_texts(STORIES, SEED)
    p1 = stage1_tflop(captions)
    yield _line("stage 1", "stage1", Captions(captions), p1, peer_off=abs(p1 / P1_TFLOP - 1))
    yield _line("stage 2", "stage2_vist", Stories(texts), stage2_tflop(texts))


def _line(case: str, run_file: str, source: Source, peer: float, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = for_80_gb_gpu(on_drawn_samples(read_run_file(run_file), folder))
        work = measure(config, source)
    told = line(
        3, case, ours=work.step, peer=peer, unit="TFLOP/sample", **more, **_extras(case, config, work)
    )
    return told


def _extras(case: str, config: ConfigDict, work: Work) -> dict[str, Any]:
    from benchmarks.goals import GOALS

    once = plans_features(config)
    return {
        "over_minimum": work.step / GOALS[3, case].limit,
        "run_mean": work.step + work.once / config.run.epochs if once else work.on_images,
        "encodes": "once, in the first epoch" if once else "in every step",
        "frozen_gradients": work.frozen_gradients,
        "steps_by_shape": work.shapes,
        "attention": config.model.attention,
        "remat": work.remat,
    }


def for_80_gb_gpu(config: ConfigDict) -> ConfigDict:
    """The configuration as an NVIDIA GPU of 80 GB runs it.

    ``auto`` means cuDNN there.  Its calls cannot be traced without CUDA; blocks of queries are the same
    products, forward and backward (``tests/test_flops.py``).
    """
    if config.model.attention in ("auto", "cudnn"):
        config.model.attention = "blockwise"
    return config


def _input_images(batch: Batch) -> int:
    """Input images of a batch; several places of a story's tree may read one."""
    if batch.image_index is None:
        return int(batch.image_mask.sum())
    micros = zip(np.atleast_2d(batch.image_index), np.atleast_2d(batch.image_mask), strict=True)
    return sum(len(np.unique(index[there])) for index, there in micros)


def measure(config: ConfigDict, source: Source) -> Work:
    """One epoch of the configured training, counted."""
    spec, mesh = build(config), make_mesh(devices=jax.devices()[:1])
    layout = parameter_layout(config, spec, mesh)
    whole = abstract_batch(loader_of(config, spec, source).largest)
    story = samples_of_a_story(config, source) if config.data.packing == "tree" else 1
    fewest = fewest_that_fit(config, spec, whole, layout, DEVICE_BYTES)
    config = fit_accumulation(config, mesh, story=story, fewest=fewest)
    spec = with_micro_batches(spec, config)
    loader = loader_of(config, spec, source)
    spec, remat = fit_memory(config, spec, abstract_batch(loader.largest), layout, DEVICE_BYTES)
    steps = num_steps(_one_epoch(config), epoch_samples(config, source))
    batches: Counter[str] = Counter()
    kept: dict[str, Batch] = {}
    items = images = 0
    for _ in range(steps):
        batch = next(loader)
        items, images = items + int(batch.item_mask.sum()), images + _input_images(batch)
        shapes = shapes_of(batch)
        name = str(jax.tree.leaves(shapes))
        kept[name], batches[name] = shapes, batches[name] + 1
    step, *arguments = abstract_step(config, spec)
    counted = {name: count_flops(step, *arguments, batch).total for name, batch in kept.items()}
    pixels = {
        name: count_flops(step, *arguments, on_images(spec, batch)).total for name, batch in kept.items()
    }
    target, image = encode_flops(spec)
    samples = len(source) * TERA
    return Work(
        step=sum(counted[name] * count for name, count in batches.items()) / samples,
        on_images=sum(pixels[name] * count for name, count in batches.items()) / samples,
        once=(items * target + images * image) / samples,
        remat=remat,
        shapes={_described(kept[name]): count for name, count in batches.items()},
        frozen_gradients=frozen_gradients(spec, step, *arguments, next(iter(kept.values()))),
    )


def _one_epoch(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.run.update(epochs=1.0, num_steps=None)
    return config


def _described(batch: Batch) -> str:
    return "x".join(map(str, batch.tokens.shape))


def on_images(spec: ModelSpec, batch: Batch) -> Batch:
    """A batch of shapes with images in the place of their features."""

    def pixels(like: Any, size: int) -> Any:
        return jax.ShapeDtypeStruct((*like.shape[:-3], size, size, 3), jnp.uint8)

    changes: dict[str, Any] = {"target_moments": None, "image_states": None}
    if batch.target_moments is not None:
        changes["target"] = pixels(batch.target, spec.generator.image_size)
    if batch.image_states is not None:
        changes["images"] = pixels(batch.images, spec.backbone.image_size)
    return dataclasses.replace(batch, **changes)


def encode_flops(spec: ModelSpec) -> tuple[int, int]:
    """FLOPs of the towers that make one target's moments, and one input image's states."""

    def image(size: int) -> Any:
        return jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)

    shapes, bind = spec.template.shapes, spec.template.bind
    target = count_flops(lambda p, x: bind(p).generator.moments(x), shapes, image(spec.generator.image_size))
    if not spec.backbone.image_tokens:
        return target.total, 0
    states = count_flops(
        lambda p, x: bind(p).backbone.image_states(x), shapes, image(spec.backbone.image_size)
    )
    return target.total, states.total


def frozen_gradients(spec: ModelSpec, step: Any, state: Any, frozen: Any, batch: Batch) -> int:
    """Products in the step whose result has the shape of a frozen kernel, and of no trainable parameter."""

    def forms(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
        """As a gradient of it may be laid out: a layer of a stack, or transposed."""
        return {shape, shape[1:], shape[::-1], shape[1:][::-1]}

    kernels: set[tuple[int, ...]] = set()
    for path, shape in frozen.items():
        if len(shape.shape) >= 2 and path.endswith("kernel"):
            stacked = spec.template.axes[path][0] == "layers"
            kernels |= {form for form in forms(shape.shape) if len(form) >= len(shape.shape) - stacked}
    for shape in state.trainable.values():
        kernels -= forms(shape.shape)
    made = product_shapes(step, state, frozen, batch)
    return sum(count for shape, count in made.items() if shape in kernels)
