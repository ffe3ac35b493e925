"""Compiles a stage-1 step for an accelerator that is not here; prints the targets of its custom calls."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

platform = sys.argv[1]
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
if platform == "cuda":
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tiny
from minigpt5_jax.minigpt5 import LossOptions
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.sharding import make_mesh
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


if platform == "cuda":
    devices = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H100).devices
else:
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
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
