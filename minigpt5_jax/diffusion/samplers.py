"""Deterministic diffusion samplers, the whole denoising loop in one ``lax.scan``.

PNDM (as PLMS), DDIM and DPM-Solver++ 2M are all linear multistep rules: the next latents are a
weighted sum of the current latents and of the last few model outputs.  A sampler is therefore a
table of weights computed once in float64, and one loop serves them all.

Sources: PNDM arXiv 2202.09778 and fidelity 1.10, DDIM arXiv 2010.02502, DPM-Solver++
arXiv 2211.01095.  Each is tested against diffusers' scheduler of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minigpt5_jax.diffusion.schedule import NoiseSchedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""``(latents f32[m h w c], timestep i32[]) -> epsilon f32[m h w c]``."""


@runtime_checkable
class Sampler(Protocol):
    """Noise -> latents."""

    def sample(self, denoise: Denoise, latents: Float[Array, "m h w c"]) -> Float[Array, "m h w c"]:
        """Denoise ``latents`` ~ N(0, I); pure, to be called inside ``jax.jit``."""


class LinearMultistep:
    """The loop over a table of weights, one row per call of the denoiser.

    At each call, with ``x`` the current latents and ``x_init`` those it started from::

      output = prediction[0] * x + prediction[1] * denoise(x, timestep)
      x = carry[0] * x + carry[1] * x_init + weights @ [output, last outputs, newest first]

    Args:
      timesteps: [n], in the order of the calls.
      prediction: [n, 2], what is remembered: epsilon (0, 1), or a prediction of the clean latents.
      carry: [n, 2], weights of ``x`` and ``x_init``.
      weights: [n, k], weights of this output and of the k - 1 before it.
      stored: [n], whether this output enters the history.
    """

    def __init__(
        self,
        timesteps: np.ndarray,
        *,
        prediction: np.ndarray,
        carry: np.ndarray,
        weights: np.ndarray,
        stored: np.ndarray,
    ):
        if not len(timesteps):
            raise ValueError("num_inference_steps=0: a sampler needs at least one step")
        self.timesteps = timesteps.astype(np.int32)
        self._order = weights.shape[1]
        self._table = {
            "timestep": self.timesteps,
            "prediction": prediction.astype(np.float32),
            "carry": carry.astype(np.float32),
            "weights": weights.astype(np.float32),
            "stored": stored.astype(bool),
        }

    def sample(self, denoise: Denoise, latents: Float[Array, "m h w c"]) -> Float[Array, "m h w c"]:
        """Denoise ``latents`` ~ N(0, I) (float32); pure, to be called inside ``jax.jit``."""
        initial = latents.astype(jnp.float32)

        def step(carry, row):
            x, history = carry
            epsilon = denoise(x, row["timestep"]).astype(jnp.float32)
            output = row["prediction"][0] * x + row["prediction"][1] * epsilon
            outputs = jnp.concatenate([output[None], history])
            x = row["carry"][0] * x + row["carry"][1] * initial
            x = x + jnp.tensordot(row["weights"], outputs, 1, precision=jax.lax.Precision.HIGHEST)
            return (x, jnp.where(row["stored"], outputs[:-1], history)), None

        history = jnp.zeros((self._order - 1, *latents.shape), jnp.float32)
        table = jax.tree.map(jnp.asarray, self._table)
        (x, _), _ = jax.lax.scan(step, (initial, history), table)
        return x


class PNDM(LinearMultistep):
    """Pseudo numerical methods, PLMS only (diffusers ``PNDMScheduler(skip_prk_steps=True)``).

    The sampler of Stable Diffusion and MiniGPT-5.  ``num_inference_steps + 1`` calls: the first step
    is taken twice, the second time with the mean of the outputs at both of its ends.
    """

    _ADAMS_BASHFORTH: ClassVar = np.array(
        [
            [1, 0, 0, 0],
            [3 / 2, -1 / 2, 0, 0],
            [23 / 12, -16 / 12, 5 / 12, 0],
            [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        ]
    )

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        ascending = schedule.inference_timesteps(num_inference_steps)
        stride = schedule.num_train_timesteps // num_inference_steps
        calls = np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]
        count = len(calls)
        start, end = calls.copy(), calls - stride
        order = np.clip(np.arange(count) - 1, 0, 3)
        weights, stored = self._ADAMS_BASHFORTH[order], np.ones(count, bool)
        redo = slice(1, 2)  # empty when a single step leaves nothing to redo
        start[redo], end[redo] = calls[redo] + stride, calls[redo]
        weights[redo], stored[redo] = [0.5, 0.5, 0, 0], False
        sample_weight, epsilon_weight = _pndm_transfer(_abar(schedule, start), _abar(schedule, end))
        redone = np.arange(count) == 1
        super().__init__(
            calls,
            prediction=_epsilon(count),
            carry=np.stack([np.where(redone, 0, sample_weight), np.where(redone, sample_weight, 0)], 1),
            weights=weights * epsilon_weight[:, None],
            stored=stored,
        )


class DDIM(LinearMultistep):
    """Denoising diffusion implicit models without added noise (eta 0), one call per step."""

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        calls = schedule.inference_timesteps(num_inference_steps)[::-1]
        a = _abar(schedule, calls)
        b = _abar(schedule, calls - schedule.num_train_timesteps // num_inference_steps)
        sample_weight = np.sqrt(b / a)
        count = len(calls)
        super().__init__(
            calls,
            prediction=_epsilon(count),
            carry=np.stack([sample_weight, np.zeros(count)], 1),
            weights=(np.sqrt(1 - b) - sample_weight * np.sqrt(1 - a))[:, None],
            stored=np.zeros(count),
        )


class DPMSolverPlusPlus(LinearMultistep):
    """DPM-Solver++ 2M (diffusers ``DPMSolverMultistepScheduler`` with its defaults), one call per step.

    Second order in the prediction of the clean latents; first and last steps are first order, the
    last one arrives at zero noise.  Good images in about 20 calls.
    """

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        if schedule.timestep_spacing == "trailing":
            calls = schedule.inference_timesteps(num_inference_steps)[::-1]
        else:  # the grid ends at timestep 0 or steps_offset, which needs no call
            calls = schedule.inference_timesteps(num_inference_steps + 1)[:0:-1]
        count = len(calls)
        a = np.append(_abar(schedule, calls), 1.0)
        alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
        shrink = (sigma[1:] / alpha[1:]) / (sigma[:-1] / alpha[:-1])  # exp(-h), h the step in log-SNR / 2
        clean_weight = alpha[1:] * (1 - shrink)
        # Linear extrapolation of the clean latents to the middle of the step: 1 + half, -half.
        half = np.zeros(count)
        log_snr = np.log(alpha[:-1] / sigma[:-1])
        steps = np.diff(log_snr)
        half[1:-1] = 0.5 * steps[1:] / steps[:-1]
        super().__init__(
            calls,
            prediction=np.stack([1 / alpha[:-1], -sigma[:-1] / alpha[:-1]], 1),
            carry=np.stack([sigma[1:] / sigma[:-1], np.zeros(count)], 1),
            weights=clean_weight[:, None] * np.stack([1 + half, -half], 1),
            stored=np.ones(count),
        )


def _abar(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """abar at ``timesteps`` in float64; before timestep 0 stands the schedule's final value."""
    abar = schedule.alphas_cumprod.astype(np.float64)
    final = 1.0 if schedule.set_alpha_to_one else abar[0]
    return np.where(timesteps < 0, final, abar[np.maximum(timesteps, 0)])


def _epsilon(count: int) -> np.ndarray:
    return np.tile([0.0, 1.0], (count, 1))


def _pndm_transfer(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of sample and epsilon in a step from level ``a`` to ``b`` (equation 9 of the paper)."""
    return np.sqrt(b / a), -(b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], Sampler]] = {
    "pndm": PNDM,
    "ddim": DDIM,
    "dpm_solver++": DPMSolverPlusPlus,
}


def make_sampler(name: str, schedule: NoiseSchedule, num_inference_steps: int) -> Sampler:
    """The sampler called ``name`` (a key of ``SAMPLERS``).

    Raises:
      ValueError: an unknown name, or a number of steps that the schedule does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name](schedule, num_inference_steps)


def guided(denoise_pair: Denoise, guidance_scale: float) -> Denoise:
    """Classifier-free guidance (fidelity 3.5): ``e_u + guidance_scale * (e_c - e_u)``.

    ``denoise_pair`` sees the latents twice, [2m h w c], and returns epsilon without the condition
    for the first m and with it for the last m: both branches share one batch.
    """

    def denoise(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        both = denoise_pair(jnp.concatenate([latents, latents]), timestep)
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise
