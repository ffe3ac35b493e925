"""One process of the test of held-out images: each reads its rows of a batch, all get every image.

Usage: python images_worker.py RANK COUNT PORT; prints ``IMAGES <targets> <images> <noise in them>``.
"""

import dataclasses
import os
import sys
from pathlib import Path

rank, count, port = map(int, sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import jax
import numpy as np

import tiny
from minigpt5_jax.evaluation.held_out import HeldOutImages
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.wiring.inputs import make_batch_sharder

if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank, initialization_timeout=60)
colours = np.arange(8, dtype=np.uint8)
batch = dataclasses.replace(
    tiny.make_tiny_batch(8),
    target=np.broadcast_to(colours[:, None, None, None], (8, 4, 4, 3)),
    item_mask=np.array([0, 0, 1, 1, 0, 1, 0, 1], bool),
)
mine = slice(rank * 8 // count, (rank + 1) * 8 // count)
mesh = make_mesh(data=4)
placed = make_batch_sharder(mesh, 1)(jax.tree.map(lambda x: x[mine], batch))


def draw(params, batch, keys):
    """Brighter by what the parameters say, with a pixel of noise."""
    noise = jax.vmap(lambda key: jax.random.randint(key, (), 0, 9))(keys).astype(np.uint8)
    return (batch.target + params["brighter"]).at[:, 0, 0, 0].add(noise)


images = HeldOutImages(draw, [placed], {}, mesh, seed=0)
drawn = images({"brighter": np.uint8(100)})
noise = drawn[:, 0, 0, 0] - drawn[:, 1, 1, 1]
shown = images.targets[:, 0, 0, 0], drawn[:, 1, 1, 1], noise
print("IMAGES", *(values.tolist() for values in shown), flush=True)
