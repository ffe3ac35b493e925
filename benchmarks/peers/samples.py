"""One sample as the peers read it.  Numpy only."""

from __future__ import annotations

import dataclasses

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
