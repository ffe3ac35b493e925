"""What both peers share: arrays to tensors, the noise schedule and the weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SCALING = 0.18215  # of Stable Diffusion's latents
TEXT, IMAGE, CAPTION = 0.01, 1.0, 0.1  # weights of the losses (paper)
GAMMA = 5.0  # of the min-SNR weights
LLM_RATE, MAPPER_RATE, DECAY = 2e-5, 2e-4, 0.01


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's noise schedule, f32[1000]."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)


def to_nchw(images: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """``[h w c]`` each -> ``[n c h w]``."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Latents at the timesteps whose cumulated alphas are ``alpha`` [n]."""
    alpha = alpha[:, None, None, None]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def image_loss(predicted: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """min-SNR weighted squared error, mean over items."""
    snr = alpha / (1 - alpha)
    error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
    return (error * snr.clamp(max=GAMMA) / snr).mean()


def optimizer(llm: Sequence[nn.Parameter], mapper: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the paper's rates."""
    groups = [{"params": list(llm), "lr": LLM_RATE}, {"params": list(mapper.parameters()), "lr": MAPPER_RATE}]
    return torch.optim.AdamW(groups, weight_decay=DECAY)
