"""Sides that take turns, and what the machine could do at best."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

BLOCKS = 5


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of each side, block by block.

    Attributes:
      seconds: on the clock.
      cpu_seconds: of all threads together, which a busy machine changes less.
    """

    seconds: Mapping[str, list[float]]
    cpu_seconds: Mapping[str, list[float]]

    def median(self, side: str) -> float:
        """Seconds of a side."""
        return statistics.median(self.seconds[side])

    def ratios(self, peer: str, ours: str = "ours") -> list[float]:
        """Peer's time over ours, in each block."""
        return [theirs / own for own, theirs in zip(self.seconds[ours], self.seconds[peer])]

    def compared(self, peer: str, ours: str = "ours") -> dict[str, object]:
        """``ours``, ``peer``, ``ratio`` and ``spread`` of a line."""
        ratios = self.ratios(peer, ours)
        return {
            "ours": self.median(ours),
            "peer": self.median(peer),
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "blocks": len(ratios),
            "cpu_ratio": statistics.median(self.cpu_seconds[peer])
            / statistics.median(self.cpu_seconds[ours]),
        }


def alternate(sides: Mapping[str, Callable[[], object]], blocks: int = BLOCKS) -> Times:
    """Run the sides in turn, A B A B; each must return only when its work is done.

    They run once before, unmeasured.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(blocks):
        for name, run in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return Times(seconds, cpu)


def fastest(run: Callable[[], object], tries: int = 5) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of an fp32 product of two ``size`` x ``size`` matrices: the most a step could reach."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.dot)
    return 2 * size**3 / fastest(lambda: product(x, x).block_until_ready())


def read_rate(megabytes: int = 256) -> float:
    """Bytes/s at which the device reads an array that no cache holds."""
    x = jnp.ones((megabytes, 2**20 // 4), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / fastest(lambda: total(x).block_until_ready())
