"""How long a step will take, by simple rules that are told with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from minigpt5_jax.config import num_steps
from minigpt5_jax.planning.hlo import Traffic
from minigpt5_jax.planning.step import Step, abstract_step, bytes_per_chip
from minigpt5_jax.planning.topology import Chip
from minigpt5_jax.training.flops import count_flops

UTILISATION = 0.55
"""Share of the matrix peak that work is expected to reach."""
OPTIMIZER_BYTES = 28
"""Bytes that AdamW reads and writes for each fp32 parameter: value, gradient and two moments."""
EPOCH_SAMPLES = {"cc3m": 2_222_400, "cc3m_tar": 2_222_400, "vist": 34_428 * 13}
"""``data.format`` -> samples of the published data set, as the run files count them."""


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step on all chips, and bytes of frozen weights on each, of the backbone and of the rest.

    ``*_passes``: how often a micro-batch reads those weights.
    """

    backbone_flops: int
    other_flops: int
    backbone_bytes: int
    other_bytes: int
    trainable_bytes: int
    micro_batches: int
    backbone_passes: int = 2
    other_passes: int = 2

    @property
    def flops(self) -> int:
        return self.backbone_flops + self.other_flops

    def seconds(self, chip: Chip, chips: int) -> float:
        """Of one step without collectives."""

        def part(flops: int, size: int, passes: int) -> float:
            reads = passes * self.micro_batches * size / chip.bandwidth
            return max(flops / chips / (UTILISATION * chip.peak_flops), reads)

        work = part(self.backbone_flops, self.backbone_bytes, self.backbone_passes)
        work += part(self.other_flops, self.other_bytes, self.other_passes)
        return work + self.trainable_bytes / 4 * OPTIMIZER_BYTES / chip.bandwidth


def count_work(step: Step) -> Work:
    """The work of a step, counted on its jaxpr."""
    config, spec = step.counted
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), step.arguments[2])
    total = count_flops(*abstract_step(config, spec), batch).total
    text = {name: weight for name, weight in spec.options.loss.weights.items() if name == "text"}
    backbone = 0
    if text:  # what the other losses do not need is what they do not cost
        options = dataclasses.replace(spec.options, loss=dataclasses.replace(spec.options.loss, weights=text))
        alone = dataclasses.replace(spec, options=options)
        backbone = count_flops(*abstract_step(config, alone), batch).total
    state, frozen, _ = step.arguments
    sizes = {
        own: bytes_per_chip({p: x for p, x in frozen.items() if p.startswith("backbone/") == own})
        for own in (True, False)
    }
    trainable, micro = bytes_per_chip(state.trainable), step.config.data.accumulation
    passes = weight_passes(step.remat, step.shapes.split)
    return Work(backbone, total - backbone, sizes[True], sizes[False], trainable, micro, *passes)


def weight_passes(remat: str, split: bool) -> tuple[int, int]:
    """How often a micro-batch reads the frozen weights of (the backbone, the rest).

    Forward and backward, and forward once more where layers are computed again.  Where prompts are split off
    (``model.continuations``), the forward pass of the backbone is two.
    """
    backbone = 2 + split + (remat in ("all", "backbone"))
    return backbone, 2 + (remat in ("all", "generator"))


def assumptions(work: Work, chip: Chip) -> str:
    """What a prediction rests on, in words."""
    told = (
        f"work at {UTILISATION:.0%} of the matrix peak, or the frozen weights read {work.backbone_passes} "
        f"(backbone) and {work.other_passes} times (generator) a micro-batch where that is longer; the "
        "optimizer's bytes; collectives on rings at the links' full rate; nothing overlaps"
    )
    if chip.platform == "cuda":
        told += "; compiled without autotuning and without Triton's matrix products, which need a card"
    return told


def wire_seconds(chip: Chip, traffic: Mapping[str, Traffic]) -> float:
    """Time of a step's collectives."""
    return sum((moved.wire for moved in traffic.values()), 0.0) / (chip.links * chip.link_bandwidth)


def run_steps(config: ConfigDict) -> int | None:
    """Updates of the run; None where they follow from data that is not known."""
    samples = EPOCH_SAMPLES.get(config.data.format)
    if config.data.format.startswith("shapes"):
        samples = config.data.shapes_train
    if samples is None and config.run.num_steps is None:
        return None
    return math.ceil(num_steps(config, samples or 0))
