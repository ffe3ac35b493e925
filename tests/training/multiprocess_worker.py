"""One process of the multi-process test: two train steps of the tiny composite on a global mesh.

Usage: python multiprocess_worker.py RANK COUNT PORT FILE; prints ``LOSS <value> GRAD <norm>``, and the first
process writes the draws of each item, the gradients of the first step and both losses to FILE.
"""

import dataclasses
import os
import sys
from pathlib import Path

rank, count, port = map(int, sys.argv[1:4])
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
from minigpt5_jax.training import sharding
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.sharding import batch_shardings, lay_out, make_mesh, replicated, state_shardings
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_draw, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters

if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank, initialization_timeout=60)
sharding.LARGE = 512  # the tiny composite has no large matrices
template = tiny.make_tiny_template()
labels = label_parameters(template.shapes, tiny.rules("stage1"))
mesh = make_mesh(data=2, fsdp=2)
trainable = tiny.trainable_paths(labels)
layout = lay_out(template.shapes, template.axes, trainable, mesh, tiny.sharding())
assert any(len(place.device_set) == 4 and not place.is_fully_replicated for place in layout.stored.values())


def place(array, sharding):
    """A global array of which every process holds its shards of the same host value."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


params = {p: place(value, layout.stored[p]) for p, value in tiny.make_tiny_params(template).items()}
frozen = {path: value for path, value in params.items() if labels[path] == FROZEN}
batch = jax.tree.map(lambda x: x.reshape(2, x.shape[0] // 2, *x.shape[1:]), tiny.make_tiny_batch(8))
batch = dataclasses.replace(batch, voken_row=batch.voken_row % 4)
batch = jax.tree.map(place, batch, batch_shardings(batch, mesh, 2))
optimizer = make_optimizer(
    labels, {"llm": optax.constant_schedule(1e-2), "mapper": optax.constant_schedule(1e-2)}
)
options = StepOptions(LossOptions(), cfg_dropout=0.3, accumulation=2)


def start(values):
    return init_state(values, labels, optimizer, seed=0)


values = {path: params[path] for path in trainable}
places = state_shardings(jax.eval_shape(start, values), layout.stored, mesh)
with jax.set_mesh(mesh):
    state = jax.jit(start, out_shardings=places)(values)
    step = jax.jit(
        make_train_step(template, labels, optimizer, options, layout=layout), out_shardings=(places, None)
    )
    after, first = step(state, frozen, batch)
    _, second = step(after, frozen, batch)
    draw, key = make_draw(template, options), jax.random.fold_in(state.rng, 0)
    whole = jax.jit(
        lambda batch, moments: (jax.vmap(lambda micro: draw(key, micro))(batch), moments),
        out_shardings=replicated(mesh),
    )
    moments = after.opt_state.inner_states
    moments = [moments[group].inner_state[0].mu for group in ("llm", "mapper")]
    drawn, moments = jax.device_get(whole(batch, moments))
found = {f"draw {name}": value for name, value in vars(drawn).items() if value is not None}
for group in moments:
    found |= {f"gradient {p}": m / (1 - 0.9) for p, m in group.items() if isinstance(m, np.ndarray)}
found |= {"loss 1": np.asarray(first["loss"]), "loss 2": np.asarray(second["loss"])}
if rank == 0:
    np.savez(sys.argv[4], **found)
print("LOSS", float(second["loss"]), "GRAD", float(second["grad_norm"]), flush=True)
