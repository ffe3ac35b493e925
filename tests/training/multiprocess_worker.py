"""One process of the multi-process test: a train step of the tiny composite on a global mesh.

Usage: python multiprocess_worker.py RANK COUNT PORT; prints ``LOSS <value> GRAD <norm>``.
"""

import os
import sys
from pathlib import Path

rank, count, port = map(int, sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (  # the devices, and quick compiling as in conftest.py
    f"--xla_force_host_platform_device_count={4 // count} "
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import jax
import numpy as np
import optax

import tiny
from minigpt5_jax.minigpt5 import LossOptions
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.sharding import batch_shardings, make_mesh, parameter_shardings
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters

if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank, initialization_timeout=60)
template = tiny.make_tiny_template()
labels = label_parameters(template.shapes, tiny.rules("stage1"))
mesh = make_mesh(data=2, fsdp=2)
shardings = parameter_shardings(template.shapes, template.axes, mesh, tiny.sharding())


def place(array, sharding):
    """A global array of which every process holds its shards of the same host value."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


params = {path: place(value, shardings[path]) for path, value in tiny.make_tiny_params(template).items()}
batch = tiny.make_tiny_batch(8)
batch = jax.tree.map(place, batch, batch_shardings(batch, mesh))
optimizer = make_optimizer(
    labels, {"llm": optax.constant_schedule(1e-2), "mapper": optax.constant_schedule(1e-2)}
)
frozen = {path: value for path, value in params.items() if labels[path] == FROZEN}
state = init_state({p: v for p, v in params.items() if p not in frozen}, labels, optimizer, seed=0)
step = jax.jit(make_train_step(template, labels, optimizer, StepOptions(LossOptions())))
state, _ = step(state, frozen, batch)
state, metrics = step(state, frozen, batch)
print("LOSS", float(metrics["loss"]), "GRAD", float(metrics["grad_norm"]), flush=True)
