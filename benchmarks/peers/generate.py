"""What generation is measured against: transformers' ``generate`` and diffusers' DDIM loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler

from benchmarks.peers import objective
from benchmarks.peers.objective import to_nchw
from benchmarks.peers.towers import Towers


def text(towers: Towers, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    """Greedy continuation of prompts i64[b t] by ``new`` tokens with a cache, i64[b new]."""
    llama, prompts = towers.llama, torch.from_numpy(prompts).to(towers.device)
    llama.set_attn_implementation("sdpa")
    rules = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}

    @torch.no_grad()
    def run() -> np.ndarray:
        mask = torch.ones_like(prompts)
        out = llama.generate(prompts, attention_mask=mask, pad_token_id=0, eos_token_id=None, **rules)
        return out[:, prompts.shape[1] :].cpu().numpy()

    return run


def images(
    towers: Towers, condition: np.ndarray, negative: np.ndarray, latents: np.ndarray, steps: int, scale: float
) -> Callable[[], np.ndarray]:
    """Images u8[b H W 3] by DDIM.

    Args:
      condition: f32[b q c].  negative: f32[q c], what they are guided away from.
      latents: f32[b h w c].
      scale: of the guidance.
    """
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    device = towers.device
    both = np.concatenate([np.broadcast_to(negative, condition.shape), condition])
    context, start = torch.from_numpy(both).to(device), to_nchw(latents, device)

    @torch.no_grad()
    def run() -> np.ndarray:
        schedule.set_timesteps(steps)
        x = start
        for timestep in schedule.timesteps:
            noise = towers.unet(torch.cat([x, x]), timestep, encoder_hidden_states=context).sample
            away, toward = noise.chunk(2)
            x = schedule.step(away + scale * (toward - away), timestep, x).prev_sample
        pixels = towers.vae.decode(x / objective.SCALING).sample
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        return pixels.byte().cpu().numpy()

    return run
