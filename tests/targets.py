"""Devices that are not here, to compile for; imported by processes that tests start, before JAX is."""

from __future__ import annotations

import os
from typing import Any


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
    from minigpt5_jax.planning.topology import open_topology

    return list(open_topology("h100:1" if platform == "cuda" else "v5e:2x2").devices)
