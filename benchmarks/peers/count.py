"""TFLOP of P1's step by torch's own counter, full size, on meta tensors: nothing is allocated.

A micro-batch costs a polynomial of second degree in its padded length (attention), plus a constant for each
image drawn and each image read.  A few micro-batches give the numbers; the rest is a sum over drawn samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import lengths
from benchmarks.peers.p1 import MICRO_BATCH, P1
from benchmarks.peers.samples import Sample
from benchmarks.peers.towers import FULL, Sizes, make_towers

PROBES = (48, 96, 144)  # lengths of the micro-batches that are counted
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a micro-batch.

    Attributes:
      length: coefficients of the padded length, highest power first.
      drawn: of each image drawn.  read: of each image read.
    """

    length: tuple[float, float, float]
    drawn: int
    read: int

    def of(self, padded: int, drawn: int, read: int) -> float:
        """FLOPs of a micro-batch."""
        return float(np.polyval(self.length, padded)) + drawn * self.drawn + read * self.read


def stage1_tflop(captions: np.ndarray) -> float:
    """TFLOP for a sample of stage 1, captions of so many tokens in micro-batches as they come."""
    cost, padded = measure(lora=False), [lengths.caption_sequence(int(count)) for count in captions]
    return _mean(cost, padded, [1] * len(padded), [0] * len(padded))


def stage2_tflop(texts: np.ndarray) -> float:
    """TFLOP for a sample of stage 2, stories of ``texts`` one after another, neighbours in a micro-batch."""
    cost = measure(lora=True)
    padded = [lengths.story_sequence(story, sample) for story in texts for sample in lengths.SAMPLES]
    drawn = [int(lengths.draws(sample)) for sample in lengths.SAMPLES] * len(texts)
    read = [lengths.input_images(sample) for sample in lengths.SAMPLES] * len(texts)
    return _mean(cost, padded, drawn, read)


def _mean(cost: Cost, padded: Sequence[int], drawn: Sequence[int], read: Sequence[int]) -> float:
    total = 0.0
    for first in range(0, len(padded), MICRO_BATCH):
        part = slice(first, first + MICRO_BATCH)
        total += cost.of(max(padded[part]), sum(drawn[part]), sum(read[part]))
    return total / len(padded) / TERA


def measure(*, lora: bool, sizes: Sizes = FULL) -> Cost:
    """What micro-batches of P1 cost."""
    p1 = full_size_p1(lora=lora, sizes=sizes)

    def flops(length: int, drawn: int = 0, read: int = 0) -> int:
        samples = [blank_sample(sizes, length, draws=i < drawn, reads=i < read) for i in range(MICRO_BATCH)]
        return count(p1, samples)

    totals = [flops(length) for length in PROBES]
    power = np.linalg.solve(np.vander(PROBES, 3).astype(np.float64), np.asarray(totals, np.float64))
    # Of two images the mapper's and the UNet's work is twice that of one.
    drawn = (flops(PROBES[0], drawn=2) - totals[0]) // 2
    read = flops(PROBES[0], read=1) - totals[0] if p1.towers.vision else 0
    return Cost(tuple(power.tolist()), drawn, read)


def full_size_p1(*, lora: bool, sizes: Sizes = FULL) -> P1:
    """P1 on meta tensors; with image towers in stage 2 (``lora``), as captions have no input images."""
    towers = make_towers(
        dataclasses.replace(sizes, vision=sizes.vision if lora else None),
        "meta",
        new_rows=lengths.VOKENS + 1,
    )
    ids = np.zeros(sizes.clip["max_position_embeddings"], np.int64)
    return P1(towers, None, None, (ids, ids + 1), lora=lora, share=True)


def count(p1: P1, samples: Sequence[Sample]) -> int:
    """FLOPs of the losses of a micro-batch and their gradients, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        p1.loss(samples).backward()
    return counter.get_total_flops()


def blank_sample(sizes: Sizes, length: int, *, draws: bool, reads: bool = False) -> Sample:
    """A sample of ``length`` positions of which nothing but shapes matters; it may draw or read an image."""
    latent, pixels = sizes.unet["sample_size"], sizes.vae["sample_size"]
    ids = np.zeros(length, np.int64)
    noise = np.zeros((latent, latent, 4), np.float32)
    caption = np.zeros(sizes.clip["max_position_embeddings"], np.int64)
    image = np.zeros((pixels, pixels, 3), np.uint8)
    voken, slots = 9 if draws else None, (1,) if reads else ()
    return Sample(ids, ids, voken, caption, caption + 1, 0, noise, noise, False, image, slots)
