"""The small world's UNet, driven by the finished text encoder's features of captions.

Latents of some thousand training scenes are computed once, features of their captions in every batch
again.  The UNet learns from features that were disturbed the way a mapper disturbs them: noise, and
real-token positions that belong to another caption or say nothing, so that it listens to the padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.diffusion.schedule import SD21_BASE
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.models.unet.model import UNet2DConditionModel, UNetConfig
from minigpt5_jax.shapes.backbones import train_text
from minigpt5_jax.shapes.backbones.fit import fit
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.world import Scene

CONFIG = UNetConfig.from_hf(
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [48, 96],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 128,
        "norm_num_groups": 8,
        "norm_eps": 1e-5,
        "use_linear_projection": True,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
)
EMPTY_SHARE = 0.1
FEATURE_NOISE = 0.6  # largest standard deviation of noise on features of about unit variance
SNR_RANGE = (0.1, 5.0)  # of the weights in front of the clean latents' error


@dataclasses.dataclass(frozen=True)
class Examples:
    """Scenes with their scaled moments f16[s 8 8 8], and what turns a caption into features.

    Attributes:
      encode: (scenes, random) -> features f32[n 77 128] and masks [n 77] of one wording of each.
      empty: f32[77 128], features of the empty caption.
    """

    scenes: tuple[Scene, ...]
    moments: np.ndarray
    encode: Callable[[Sequence[Scene], np.random.Generator], tuple[np.ndarray, np.ndarray]]
    empty: np.ndarray

    @classmethod
    def make(
        cls,
        text: Params,
        tokenizer: ClipTokenizer,
        moments: Callable[[np.ndarray], np.ndarray],
        count: int,
        seed: int,
    ) -> Examples:
        """``moments`` encodes and scales images u8[n 64 64 3]; it is called once."""
        scenes = tuple(train_text.draw_scenes(np.random.default_rng(seed), count))
        features = train_text.make_features(text)

        def encode(chosen, random):
            ids, mask = train_text.encode(tokenizer, chosen, random)
            return features(ids, mask), mask

        empty = features(*tokenizer.encode([""]))[0]
        return cls(scenes, moments(render(scenes)).astype(np.float16), encode, empty)


def batches(examples: Examples, size: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Latents f32[n 8 8 4] (posterior samples) and contexts f32[n 77 128] for training."""

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((seed, step))
        chosen = random.integers(len(examples.scenes), size=size)
        mean, logvar = np.split(examples.moments[chosen].astype(np.float32), 2, axis=-1)
        noise = random.standard_normal(mean.shape, np.float32)
        context, mask = examples.encode([examples.scenes[i] for i in chosen], random)
        kind = random.random(size)[:, None, None]
        other = np.where(kind < 0.3, np.roll(context, 1, 0), context.mean(0))
        context = np.where((mask[..., None] > 0) & (kind < 0.6), other, context)
        scale = FEATURE_NOISE * random.random((size, 1, 1), np.float32)
        context += scale * random.standard_normal(context.shape, np.float32)
        context[random.random(size) < EMPTY_SHARE] = examples.empty
        return {"latents": mean + np.exp(0.5 * logvar) * noise, "context": context}

    return batch


def train(
    examples: Examples, steps: int, seed: int, size: int = 32, checkpoint: Path | None = None
) -> tuple[Params, float]:
    """(parameters, seconds)."""
    tower = Template.of(lambda rngs: UNet2DConditionModel(CONFIG, rngs=rngs))

    def loss(params, batch, key):
        first, second = jax.random.split(key)
        timesteps = jax.random.randint(first, (size,), 0, SD21_BASE.num_train_timesteps)
        noise = jax.random.normal(second, batch["latents"].shape)
        noisy = SD21_BASE.add_noise(batch["latents"], noise, timesteps)
        error = jnp.square(tower.bind(params)(noisy, timesteps, batch["context"]) - noise).mean((1, 2, 3))
        snr = SD21_BASE.snr(timesteps)
        clean = error / snr  # the error as one of the clean latents
        return (jnp.clip(snr, *SNR_RANGE) * clean).mean(), {
            "epsilon": error.mean(),
            "clean": jnp.minimum(clean, 1.0).mean(),
        }

    return fit(
        loss,
        tower.init(jax.random.key(seed)),
        batches(examples, size, seed),
        steps=steps,
        learning_rate=1.5e-3,
        seed=seed,
        name="unet",
        ema_decay=0.995,
        checkpoint=checkpoint,
    )
