"""Scores of sets of features: FID, Inception Score, KID and CMMD, in float64 on the host."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.torch import read_torch

IS_CHUNKS = ("torchmetrics", "fidelity")
BLOCK = 2048  # rows that are worked on at a time


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and covariance (divided by n - 1) of a set of features, float64."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


class Sums:
    """What :class:`Moments` are made of, gathered batch by batch: ``[d]`` and ``[d, d]``, float64."""

    def __init__(self, width: int):
        self.n, self.total, self.outer = 0, np.zeros(width), np.zeros((width, width))

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Take any number, a block at a time in memory."""
        self.n += len(features)
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK].astype(np.float64)
            self.total += block.sum(0)
            self.outer += block.T @ block

    def moments(self) -> Moments:
        """Mean and covariance of everything that was taken.

        Raises:
          ValueError: fewer than two features.
        """
        if self.n < 2:
            raise ValueError(f"FID needs at least 2 images on each side, here is {self.n}")
        mean = self.total / self.n
        return Moments(self.n, mean, (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1))


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Number, mean and covariance of features.

    Raises:
      ValueError: fewer than two.
    """
    sums = Sums(features.shape[1])
    sums.add(features)
    return sums.moments()


def read_moments(path: str | Path) -> Moments:
    """Statistics of real images in the form that MiniGPT-5 ships (``fid_real_feaures.pt``).

    The file holds the sum of the features, the sum of their outer products, and their number.

    Raises:
      WeightFileError: it is another file, or of fewer than two images.
    """
    content = read_torch(Path(path))
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise WeightFileError(f"{path} does not hold [sum, sum of outer products, number of images]")
    total, outer, n = (np.asarray(value, np.float64) for value in values)
    if total.ndim != 1 or outer.shape != (len(total), len(total)) or n.size != 1:
        raise WeightFileError(f"{path} has shapes {total.shape}, {outer.shape}, {n.shape}: no sums for FID")
    sums = Sums(len(total))
    sums.n, sums.total, sums.outer = int(n.reshape(())), total, outer
    try:
        return sums.moments()
    except ValueError as error:
        raise WeightFileError(f"{path}: {error}") from None


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(one: Moments, other: Moments) -> float:
    """Frechet distance of two normal distributions, the formula of FID.

    ``|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2``, the last by the eigenvalues of ``S1^1/2 S2 S1^1/2``,
    which are real.

    Raises:
      ValueError: features of different widths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of width {len(one.mean)} and of width {len(other.mean)} do not compare")
    root = _root(one.covariance)
    values = np.linalg.eigvalsh(root @ other.covariance @ root)
    cross = np.sqrt(values.clip(0)).sum()
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(np.square(one.mean - other.mean).sum() + traces - 2 * cross)


def frechet_distance_of_few(one: Float[np.ndarray, "m d"], other: Float[np.ndarray, "n d"]) -> float:
    """FID of sets with fewer features than dimensions, as those of one story.

    The trace of the root is the nuclear norm of the product of both centred sets, an ``m x n`` matrix: exact,
    and no eigenproblem of 2048 dimensions.

    Raises:
      ValueError: fewer than two features on a side.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"FID needs at least 2 images on each side, here are {len(one)} and {len(other)}")
    one, other = one.astype(np.float64), other.astype(np.float64)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, other))
    cross = np.linalg.norm(a @ b.T, "nuc")
    return float(np.square(one.mean(0) - other.mean(0)).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean over chunks or subsets, and standard deviation between them (None for one only).

    The deviation is no interval of the mean.
    """

    mean: float
    std: float | None
    n: int


def inception_score(
    logits: Float[np.ndarray, "n classes"],
    chunks: str = "torchmetrics",
    *,
    seed: int = 2020,
    splits: int = 10,
) -> Spread:
    """Inception Score: mean over chunks of exp of the mean divergence from the chunk's mean prediction.

    Args:
      logits: without the classifier's bias.
      chunks: ``torchmetrics`` cuts into pieces of ``ceil(n / splits)``, so that there may be fewer, and
        divides the variance by one less than their number; ``fidelity`` cuts at ``i n // splits``.
      seed: of the permutation before; with ``fidelity`` and 2020 it is torch-fidelity's.  torchmetrics draws
        it from a generator that it does not seed (Q51).

    Raises:
      ValueError: an unknown rule, or fewer images than it needs.
    """
    if chunks not in IS_CHUNKS:
        raise ValueError(f"is_chunks={chunks!r} is not one of {', '.join(IS_CHUNKS)}")
    n = len(logits)
    if n < (splits if chunks == "fidelity" else 1):
        raise ValueError(f"the Inception Score of {n} images cannot be cut into {splits} chunks")
    logits = logits[np.random.RandomState(seed).permutation(n)].astype(np.float64)
    logs = logits - logits.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    if chunks == "fidelity":
        cuts = [i * n // splits for i in range(splits + 1)]
    else:
        size = -(-n // splits)
        cuts = [*range(0, n, size), n]
    scores = []
    for start, stop in itertools.pairwise(cuts):
        log_p = logs[start:stop]
        p = np.exp(log_p)
        scores.append(np.exp((p * (log_p - np.log(p.mean(0)))).sum(1).mean()))
    ddof = 0 if chunks == "fidelity" else 1
    std = float(np.std(scores, ddof=ddof)) if len(scores) > ddof else None
    return Spread(float(np.mean(scores)), std, len(scores))


def kernel_distance(
    one: Float[np.ndarray, "m d"],
    other: Float[np.ndarray, "n d"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> Spread:
    """KID: unbiased squared distance under the kernel ``(x.y / d + 1)^3``, over random subsets.

    Subsets are drawn as torch-fidelity draws them.  Unlike FID it has no bias that falls with n.

    Raises:
      ValueError: fewer features than a subset has, or subsets of one.
    """
    if min(len(one), len(other)) < size or size < 2:
        raise ValueError(
            f"KID draws subsets of {size} from {len(one)} and {len(other)} features; choose a smaller size"
        )
    rng, width = np.random.RandomState(seed), one.shape[1]
    one, other = one.astype(np.float64), other.astype(np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = (side[rng.choice(len(side), size, replace=False)] for side in (one, other))
        within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        values.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return Spread(float(np.mean(values)), float(np.std(values)), subsets)


def _mean_kernel(x: np.ndarray, y: np.ndarray, gamma: float) -> float:
    """Mean of exp(-gamma |x - y|^2) over all pairs, a block of rows at a time."""
    squares, total = (y**2).sum(1), 0.0
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        distance = (rows**2).sum(1)[:, None] + squares - 2 * rows @ y.T
        total += np.exp(-gamma * distance).sum()
    return total / (len(x) * len(y))


def cmmd(one: Float[np.ndarray, "m d"], other: Float[np.ndarray, "n d"], *, sigma: float = 10.0) -> float:
    """CMMD: squared distance of CLIP features of unit length under a Gaussian kernel, times 1000.

    Pairs of a feature with itself count, as in the authors' code.

    Raises:
      ValueError: a side without features.
    """
    if not len(one) or not len(other):
        raise ValueError(f"CMMD of {len(one)} and {len(other)} features")
    one, other, gamma = one.astype(np.float64), other.astype(np.float64), 0.5 / sigma**2
    within = _mean_kernel(one, one, gamma) + _mean_kernel(other, other, gamma)
    return 1000 * (within - 2 * _mean_kernel(one, other, gamma))
