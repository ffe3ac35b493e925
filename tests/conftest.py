"""Shared fixtures: the oracle's recorded numbers (tests/oracle/README.md) and strictness of the suite."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in public signatures are checked while testing, and only then.
install_import_hook("minigpt5_jax", "beartype.beartype")

import jax  # noqa: E402  (after the hook and XLA_FLAGS)

jax.config.update("jax_debug_key_reuse", True)

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Folder with the files recorded from the original code."""
    return ORACLE


@pytest.fixture(scope="session")
def oracle_configs() -> dict:
    """Tiny configurations in Hugging Face field names."""
    return json.loads((ORACLE / "configs.json").read_text())


@pytest.fixture(scope="session")
def oracle_weights() -> dict[str, np.ndarray]:
    """The full stage-1 state dict under the original's key names."""
    from safetensors.numpy import load_file

    return load_file(ORACLE / "weights.safetensors")


@pytest.fixture(scope="session")
def oracle_cases() -> dict[str, np.ndarray]:
    """Recorded inputs, draws, intermediates, losses, gradients and updates."""
    with np.load(ORACLE / "cases.npz", allow_pickle=False) as cases:
        return {name: cases[name] for name in cases.files}


@pytest.fixture(scope="session")
def tiny_template():
    """Composite small enough for any test; 8 heads and widths that divide over 8 devices."""
    import dataclasses

    from minigpt5_jax.diffusion.schedule import NoiseSchedule
    from minigpt5_jax.models.llama import LlamaConfig
    from minigpt5_jax.models.mapper import MapperConfig
    from minigpt5_jax.models.unet import UNetConfig
    from minigpt5_jax.models.vae import VaeConfig

    from minigpt5_jax.minigpt5 import make_template
    from minigpt5_jax.models.clip_text import ClipTextConfig

    configs = json.loads((ORACLE / "configs.json").read_text())
    llm = LlamaConfig.from_hf(
        configs["llama"]
        | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8,
           "num_hidden_layers": 2}
    )  # fmt: skip
    text = dataclasses.replace(
        ClipTextConfig.from_hf(configs["sd_text_encoder"]), vocab_size=64, max_position_embeddings=12
    )
    unet = UNetConfig.from_hf(
        configs["unet"]
        | {"block_out_channels": [16, 32], "attention_head_dim": [2, 4], "layers_per_block": 1,
           "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
           "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    )  # fmt: skip
    vae = VaeConfig.from_hf(
        configs["vae"]
        | {"block_out_channels": [8, 8], "layers_per_block": 1,
           "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    )  # fmt: skip
    mapper = MapperConfig(
        llm_hidden_size=32, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1,
        dim_feedforward=64, num_queries=12,
    )  # fmt: skip
    return make_template(
        ("minigpt4", {"llm": llm, "num_vokens": 8}),
        ("encoder_decoder", {"config": mapper}),
        ("stable_diffusion",
         {"unet": unet, "vae": vae, "text_encoder": text, "image_size": 16,
          "schedule": NoiseSchedule.from_hf(configs["scheduler"]),
          "empty_caption_ids": (62, 63) + (0,) * 10}),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_params(tiny_template):
    """Random parameters of ``tiny_template``, every leaf perturbed so that none is zero or one."""
    params = tiny_template.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        path: params[path] + 0.02 * jax.random.normal(key, params[path].shape)
        for path, key in zip(sorted(params), keys, strict=True)
    }


@pytest.fixture(scope="session")
def tiny_batch():
    """``make(rows, seed) -> Batch``: stage-1 rows of different lengths with one picture each."""
    from minigpt5_jax.batch import Batch

    def make(rows: int = 8, seed: int = 0, length: int = 24) -> Batch:
        random = np.random.default_rng(seed)
        tokens = np.full((rows, length), 2, np.int32)
        labels = np.full((rows, length), -100, np.int32)
        segments = np.zeros((rows, length), np.int32)
        label_positions = np.zeros((rows, 4), np.int32)
        starts = random.integers(3, length - 9, rows).astype(np.int32)
        for row, start in enumerate(starts):
            tokens[row, 0] = 1
            tokens[row, 1:start] = random.integers(3, 64, start - 1)
            tokens[row, start : start + 8] = 64 + np.arange(8)
            tokens[row, start + 8] = 5
            segments[row, : start + 9] = 1
            targets = np.array([start, start + 7, start + 8])
            labels[row, targets] = tokens[row, targets]
            label_positions[row, :3] = targets
        caption_mask = (np.arange(12) < random.integers(3, 12, rows)[:, None]).astype(np.int32)
        return Batch(
            tokens=tokens, labels=labels, label_positions=label_positions,
            positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
            segment_ids=segments, row_id=np.arange(rows, dtype=np.int32),
            images=np.zeros((0, 0, 0, 3), np.uint8), image_row=np.zeros(0, np.int32),
            image_start=np.zeros(0, np.int32), image_mask=np.zeros(0, bool),
            target=random.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8),
            voken_row=np.arange(rows, dtype=np.int32), voken_start=starts,
            item_id=100 + np.arange(rows, dtype=np.int32), item_mask=np.ones(rows, bool),
            caption_ids=random.integers(0, 62, (rows, 12)).astype(np.int32) * caption_mask,
            caption_mask=caption_mask, has_caption=np.ones(rows, bool),
        )  # fmt: skip

    return make
