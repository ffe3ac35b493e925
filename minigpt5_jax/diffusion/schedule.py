"""Noise schedule of the diffusion model: forward process and the min-SNR loss weight.

Sources: fidelity 1.10 and 3.4; min-SNR: Hang et al., arXiv 2303.09556.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minigpt5_jax.models.common import PublishedSizes

_REASONS = {
    "trained_betas": " (explicit betas)",
    "clip_sample": " (clipping the predicted sample)",
    "thresholding": " (dynamic thresholding)",
    "rescale_betas_zero_snr": " (zero-terminal-SNR betas)",
}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule(PublishedSizes):
    """A discrete variance-preserving schedule; fields and defaults of diffusers' ``PNDMScheduler``.

    Hashable and free of arrays, so that modules may hold it as static metadata.

    Attributes:
      steps_offset: added to inference timesteps (1 for Stable Diffusion).
      set_alpha_to_one: noise-free level after the last step; False: that of timestep 0.
      timestep_spacing: how inference timesteps are laid out (leading, trailing or linspace).

    Raises:
      ValueError: naming a field whose value is not implemented.
    """

    implemented = dict.fromkeys(_REASONS, (False, None))
    reasons = _REASONS

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        if self.prediction_type != "epsilon":
            raise ValueError(
                f"prediction_type={self.prediction_type!r} is not implemented, only 'epsilon'. The 768-pixel "
                "stable-diffusion-2-1 predicts v; MiniGPT-5 uses the 512-pixel stable-diffusion-2-1-base"
            )
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule={self.beta_schedule!r} is not 'scaled_linear' or 'linear'")
        if self.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"timestep_spacing={self.timestep_spacing!r} is not 'leading', 'trailing' or 'linspace'"
            )
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"num_train_timesteps={self.num_train_timesteps}, beta_start={self.beta_start}, "
                f"beta_end={self.beta_end}: need at least one step and 0 < beta_start <= beta_end < 1"
            )

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, f32[num_train_timesteps], bit-equal to diffusers' schedulers."""
        return _alphas_cumprod(self)

    def add_noise(
        self, latents: Float[Array, "m h w c"], noise: Float[Array, "m h w c"], timesteps: Int[Array, " m"]
    ) -> Float[Array, "m h w c"]:
        """``sqrt(abar_t) latents + sqrt(1 - abar_t) noise`` with one timestep per item, float32."""
        abar = jnp.asarray(self.alphas_cumprod)[timesteps][:, None, None, None]
        return jnp.sqrt(abar) * latents + jnp.sqrt(1.0 - abar) * noise

    def snr(self, timesteps: Int[Array, " m"]) -> Float[Array, " m"]:
        """Signal-to-noise ratio ``abar_t / (1 - abar_t)``, float32."""
        abar = self.alphas_cumprod
        return jnp.asarray(abar / (1.0 - abar))[timesteps]

    def min_snr_weight(self, timesteps: Int[Array, " m"], gamma: float | None = 5.0) -> Float[Array, " m"]:
        """Loss weight of each item for epsilon prediction: ``min(SNR, gamma) / SNR``; ones for None.

        Nearly clean latents have an SNR in the thousands: without the cap the few low timesteps would make
        most of the gradient.  SNR is never 0 here (beta < 1), so the ratio is always defined.
        """
        if gamma is None:
            return jnp.ones(timesteps.shape, jnp.float32)
        return jnp.minimum(1.0, gamma / self.snr(timesteps))

    def inference_timesteps(self, num_inference_steps: int) -> np.ndarray:
        """Timesteps of an ``num_inference_steps``-step sampler, i32 and ascending.

        Raises:
          ValueError: the schedule does not have that many steps.
        """
        total, count = self.num_train_timesteps, num_inference_steps
        if not 1 <= count <= total:
            raise ValueError(f"num_inference_steps={count} is not between 1 and {total}")
        if self.timestep_spacing == "leading":
            steps = np.arange(count) * (total // count) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / count))[::-1] - 1
        else:
            steps = np.linspace(0, total - 1, count).round()
        if steps[-1] >= total:
            raise ValueError(
                f"num_inference_steps={count} with steps_offset={self.steps_offset} reaches timestep "
                f"{steps[-1]:.0f}, the schedule ends at {total - 1}"
            )
        return steps.astype(np.int32)


SD21_BASE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
"""Schedule of ``stabilityai/stable-diffusion-2-1-base``."""


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """torch's float32 linspace bit for bit: from both ends, step in float32, one rounding per value."""
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = start + step * index, end - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
    root = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    betas = _linspace(schedule.beta_start**root, schedule.beta_end**root, schedule.num_train_timesteps)
    alphas = np.float32(1) - (betas * betas if root == 0.5 else betas)
    # torch accumulates the product in float64 and rounds each term.
    abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    abar.setflags(write=False)
    return abar
