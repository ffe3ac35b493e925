"""Speed of the evaluation: Inception beside torch-fidelity, FID of stored features, memory; JSON lines.

    JAX_PLATFORMS=cpu python -m benchmarks.evaluation                # ten minutes on two cores
    JAX_PLATFORMS=cpu python -m benchmarks.evaluation --only fid     # a minute

Rows:

* ``inception``: features of 200 images of 512 x 512, resized by the rule of the papers (``tf1``), ours and
  those of torch-fidelity 0.4.0 in the same process on the same cores, in turns; their largest difference
  beside the time.  Where torch-fidelity cannot be loaded, the row says why.  Random weights in the published
  form.
* ``fid``: FID of two sets of 30,000 stored features.
* ``memory``: the process's peak after one batch and after all images: it is bounded by the batch.

``machine_load`` is that of the whole machine, over five minutes: what others compute makes both sides slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

GOALS = {"inception": 1.2, "fid": 60.0}
"""Ours over torch-fidelity's time, at most; seconds, at most."""
BATCH, SIDE, STORED = 32, 512, 30_000


def make_images(count: int) -> list[np.ndarray]:
    """Blurred random images u8[512 512 3]."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
        found.append(np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return found


def make_weights(path: Path) -> None:
    """Random weights under the published names, as PyTorch writes them."""
    import torch

    from minigpt5_jax.models.inception_v3.model import FID_INCEPTION
    from minigpt5_jax.models.inception_v3.weights import TOWER, table

    rng, params = np.random.default_rng(0), {}
    for name, shape in TOWER.shapes(FID_INCEPTION).items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("kernel"):
            params[name] = values * math.sqrt(2 / math.prod(shape[:-1]))
        else:
            params[name] = 1 + 0.05 * values if name.endswith(("scale", "var")) else 0.1 * values
    source = table(FID_INCEPTION).to_source(params)
    torch.save({name: torch.tensor(value) for name, value in source.items()}, path)


def peak() -> float:
    """The most memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def inception(count: int, blocks: int, threads: int) -> Iterator[dict[str, object]]:
    """The rows ``memory`` and ``inception``."""
    from benchmarks.peers import fidelity
    from minigpt5_jax.evaluation.metrics.networks import InceptionNetwork

    images = make_images(count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pt_inception-2015-12-05-6726825d.pth"
        make_weights(path)
        ours = InceptionNetwork(path, "tf1", batch=BATCH)
        ours(images[:BATCH])
        before = peak()
        try:
            theirs = fidelity.load(path, threads, BATCH)
        except ImportError as error:
            theirs, why = None, f"{error}; {fidelity.INSTALL}"
        seconds: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
        found = {}
        for block in range(blocks):
            for side, run in (("ours", ours), ("torch-fidelity", theirs)):
                if run is not None:
                    start = time.perf_counter()
                    found[side] = run(images)
                    seconds[side].append(time.perf_counter() - start)
                if block == 0 and side == "ours":
                    memory = {"after_one_batch": before, "after_all": peak(), "unit": "MiB"}
                    yield {"row": "memory", "images": count, "batch": BATCH, **memory}
    row = {"row": "inception", "images": count, "batch": BATCH, "threads": threads, "seconds": seconds}
    if theirs is None:
        yield {**row, "skipped": why}
        return
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["torch-fidelity"])
    goal = {"ours_over_theirs": ratio, "goal": GOALS["inception"], "met": ratio <= GOALS["inception"]}
    pairs = zip(("pool3", "logits"), found["ours"], found["torch-fidelity"], strict=True)
    differences = {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, a, b in pairs}
    yield {**row, **goal, "relative_difference": differences, "machine_load": os.getloadavg()[1]}


def fid() -> dict[str, object]:
    """The row ``fid``."""
    from minigpt5_jax.evaluation.metrics.statistics import frechet_distance, moments

    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((STORED, 2048), np.float32) * scale for scale in (1.0, 1.1))
    start, cpu = time.perf_counter(), time.process_time()
    value = frechet_distance(moments(one), moments(other))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    found = {"value": value, "seconds": seconds, "cpu_seconds": cpu, "machine_load": os.getloadavg()[1]}
    return {"row": "fid", "features": STORED, **found, "goal": GOALS["fid"], "met": seconds < GOALS["fid"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("inception", "fid"), help="one row")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=1, help="turns of each side")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="cores for both sides"
    )
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX counts them
    if args.only != "fid":
        for row in inception(args.images, args.blocks, args.threads):
            print(json.dumps(row), flush=True)
    if args.only != "inception":
        print(json.dumps(fid()), flush=True)


if __name__ == "__main__":
    main()
