"""Rows 4 and 12: the whole stage-1 step on the reduced model against P1 and P2.

Row 4 compares loss and gradients; only where they agree is row 12, the time of a step, worth a line.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.peers.p1 import P1
from benchmarks.peers.p2 import P2
from benchmarks.reduced import Ours, make_data, make_reduced, peer_gradients, recorder
from benchmarks.report import line
from benchmarks.timing import alternate, matmul_rate
from minigpt5_jax.training.flops import count_flops
from minigpt5_jax.wiring.training import open_optimizer

STEPS = 100_000  # of the learning rate's schedule
FLOOR = 1e-3
"""Share of the largest gradient below which a leaf's error is measured against that share: what is left of
sums that cancel (keys' biases have no gradient at all) is rounding on both sides."""


@functools.cache
def _model_and_data(device: str) -> tuple[Any, Any]:
    model = make_reduced(device=torch_device(device))
    return model, make_data(model)


def torch_device(device: str) -> str:
    """PyTorch's name of the device."""
    return "cuda" if device == "gpu" else "cpu"


def same_result(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 4: loss, then gradients of everything that trains."""
    model, data = _model_and_data(options.device)
    p1 = P1(model.towers, model.mapper, model.rows, model.empty)
    theirs = p1.backward(data.samples)
    ours = Ours(model, data, recorder())
    loss = ours.step()
    more = {"unit": "relative error", "dtype": "float32"}
    yield line(4, "loss", ours=abs(loss / theirs - 1), peer=None, values=[loss, theirs], **more)
    error, where = worst_leaf(ours.state.opt_state, peer_gradients(p1, model))
    yield line(4, "gradients", ours=error, peer=None, worst_leaf=where, **more)


def worst_leaf(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """(largest error of a leaf relative to its largest gradient, see :data:`FLOOR`; its path).

    Raises:
      ValueError: one side has a leaf that the other has not.
    """
    mine = {
        path: np.asarray(value) for path, value in ours.items() if isinstance(value, np.ndarray | jax.Array)
    }
    if mine.keys() != theirs.keys():
        raise ValueError(f"gradients of one side only: {sorted(mine.keys() ^ theirs.keys())[:5]}")
    least = FLOOR * max(float(np.abs(value).max()) for value in theirs.values())
    errors = {
        path: float(np.abs(mine[path] - want).max()) / max(float(np.abs(want).max()), least)
        for path, want in theirs.items()
    }
    return max((error, path) for path, error in errors.items())


def timed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row 12: seconds of a step against P1, P2 eager and P2 compiled, all in turn."""
    model, data = _model_and_data(options.device)
    shared = model.towers, model.mapper, model.rows, model.empty
    ours = Ours(model, data, open_optimizer(model.config, model.spec, STEPS))
    p1 = P1(*shared)
    sides = {
        "ours": ours.step,
        "P1": lambda: p1.step(data.samples),
        "P2 eager": P2(*shared, data.samples).step,
    }
    failed = ""
    if options.compile:
        compiled = P2(*shared, data.samples, compiled=True)
        try:
            compiled.step()
            sides["P2 torch.compile"] = compiled.step
        except Exception as error:  # no C++ compiler, most likely: the row says so
            failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    flops = count_flops(ours.function, ours.state, *ours.arguments).total
    times = alternate(sides, options.blocks)
    limit = flops / matmul_rate()
    more = {"unit": "s/step", "limit": limit, "gflop": flops / 1e9, "batch": len(data.samples)}
    more["temporary_gb"] = ours.compiled.memory_analysis().temp_size_in_bytes / 1e9
    for peer in list(sides)[1:]:
        yield line(12, peer, **times.compared(peer), **more)
    if failed or not options.compile:
        yield line(
            12,
            "P2 torch.compile",
            ours=times.median("ours"),
            peer=None,
            reason=failed or "--nocompile",
            **more,
        )
