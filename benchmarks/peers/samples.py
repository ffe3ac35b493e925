"""A batch of ours taken apart into samples, as the peers read them.  Numpy only."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of t tokens and, where ``draws``, its image.

    Attributes:
      ids, labels: i64[t]; -100 where nothing is predicted.
      voken: position of [IMG0].
      caption_ids, caption_mask: i64[c].
      timestep, noise, posterior_noise, dropped: the draws of this step; f32[h w c].
      image: u8[H W 3].
      images: number of input images and first positions of their slots.
    """

    ids: np.ndarray
    labels: np.ndarray
    voken: int | None
    caption_ids: np.ndarray
    caption_mask: np.ndarray
    timestep: int
    noise: np.ndarray
    posterior_noise: np.ndarray
    dropped: bool
    image: np.ndarray
    images: tuple[int, ...] = ()


def take_apart(batch: Any, draws: Any, images: np.ndarray) -> list[Sample]:
    """The items of a numpy batch without accumulation, packed or not, in the order of their numbers.

    Args:
      draws: timesteps, noise, posterior_noise and cfg_drop of every item, by its number.
      images: u8[m H W 3] of the batch's items.
    """
    found = []
    for item in np.flatnonzero(batch.item_mask):
        row, start = int(batch.voken_row[item]), int(batch.voken_start[item])
        inside = np.flatnonzero(batch.segment_ids[row] == batch.segment_ids[row, start])
        number = int(batch.item_id[item])
        sample = Sample(
            ids=batch.tokens[row, inside].astype(np.int64),
            labels=batch.labels[row, inside].astype(np.int64),
            voken=start - int(inside[0]),
            caption_ids=batch.caption_ids[item].astype(np.int64),
            caption_mask=batch.caption_mask[item].astype(np.int64),
            timestep=int(draws.timesteps[number]),
            noise=draws.noise[number],
            posterior_noise=draws.posterior_noise[number],
            dropped=bool(draws.cfg_drop[number]),
            image=images[item],
        )
        found.append((number, sample))
    return [sample for _, sample in sorted(found, key=lambda pair: pair[0])]
