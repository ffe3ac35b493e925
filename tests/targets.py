"""Devices that are not here, to compile for; imported by processes that tests start, before JAX is."""

from __future__ import annotations

import os
from typing import Any

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
"""The published data of the card, as XLA takes them in place of a device."""


def devices(platform: str) -> list[Any]:
    """An H100 (``cuda``) or a v5e:2x2 (``tpu``), to be called before JAX is used for anything else."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    if platform == "cuda":  # small matrices are joined, as those of full size are not (over 32 MB each)
        flags = ("autotune_level=0", "enable_triton_gemm=false", "dot_merger_threshold_mb=0")
        os.environ["XLA_FLAGS"] = " ".join(f"--xla_gpu_{flag}" for flag in flags)
    from jax.experimental import topologies

    if platform == "cuda":
        return topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H100).devices
    return topologies.get_topology_desc("v5e:2x2", "tpu").devices
