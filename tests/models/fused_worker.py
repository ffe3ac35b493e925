"""Compiles a stage-1 step for an accelerator that is not here; prints the targets of its custom calls."""

from __future__ import annotations

import re
import sys
from pathlib import Path

platform = sys.argv[1]
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import targets

devices = targets.devices(platform)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tiny
from minigpt5_jax.minigpt5 import LossOptions
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters

mesh = make_mesh(devices=devices)
template = tiny.make_tiny_template(attends="cudnn" if platform == "cuda" else "splash")
labels = label_parameters(template.shapes, tiny.rules("stage1"))
optimizer = make_optimizer(labels, dict.fromkeys(("llm", "mapper"), optax.constant_schedule(1e-3)))
trainable = {path: shape for path, shape in template.shapes.items() if labels[path] != FROZEN}
frozen = {path: shape for path, shape in template.shapes.items() if labels[path] == FROZEN}
state = jax.eval_shape(lambda values: init_state(values, labels, optimizer, 0), trainable)
batch = tiny.make_tiny_batch(rows=8, image_size=64)


def place(x: jax.Array, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


state, frozen = jax.tree.map(lambda x: place(x, P()), (state, frozen))
batch = jax.tree.map(lambda x: place(jnp.asarray(x), P(("data",)) if x.shape[0] else P()), batch)
step = make_train_step(template, labels, optimizer, StepOptions(LossOptions()))
with jax.set_mesh(mesh):
    lowered = (
        jax.jit(step, donate_argnums=0).trace(state, frozen, batch).lower(lowering_platforms=(platform,))
    )
    text = lowered.compile().as_text()
print(sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))))
