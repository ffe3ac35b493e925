"""Deterministic diffusion samplers, the whole denoising loop in one ``lax.scan``.

PNDM (as PLMS), DDIM, DPM-Solver++ 2M and UniPC are all linear multistep rules: the next latents are a
weighted sum of latents and of the last few model outputs.  A sampler is therefore a table of weights
computed once in float64, and one loop serves them all.

Sources: PNDM arXiv 2202.09778 and fidelity 1.10, DDIM arXiv 2010.02502, DPM-Solver++
arXiv 2211.01095, UniPC arXiv 2302.04867.  Each is tested against diffusers' scheduler of the same name.
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

    At each call, with ``x`` the current latents and ``start`` those that the step before this one started
    from::

      output = prediction[0] * x + prediction[1] * denoise(x, timestep)
      outputs = [output, last outputs, newest first]
      start = correction[0] * x + correction[1] * start + corrector @ outputs
      x = carry * start + weights @ outputs

    Args:
      timesteps: [n], in the order of the calls.
      prediction: [n, 2], what is remembered: epsilon (0, 1), or a prediction of the clean latents.
      carry: [n], the weight of the latents that a step starts from.
      weights: [n, k], weights of this output and of the k - 1 before it.
      stored: [n], whether this output enters the history.
      correction: [n, 2], where a step starts: at ``x`` (1, 0), which is the default, or where the step
        before it started (0, 1), to take that one again.
      corrector: [n, k], weights of the outputs in that; zeros by default.
    """

    def __init__(
        self,
        timesteps: np.ndarray,
        *,
        prediction: np.ndarray,
        carry: np.ndarray,
        weights: np.ndarray,
        stored: np.ndarray,
        correction: np.ndarray | None = None,
        corrector: np.ndarray | None = None,
    ):
        if not len(timesteps):
            raise ValueError("num_inference_steps=0: a sampler needs at least one step")
        self.timesteps = timesteps.astype(np.int32)
        self._order = weights.shape[1]
        if correction is None:
            correction = np.tile([1.0, 0.0], (len(timesteps), 1))
        self._table = {
            "timestep": self.timesteps,
            "prediction": prediction.astype(np.float32),
            "carry": carry.astype(np.float32),
            "weights": weights.astype(np.float32),
            "stored": stored.astype(bool),
            "correction": correction.astype(np.float32),
        }
        if corrector is not None:
            self._table["corrector"] = corrector.astype(np.float32)

    def sample(self, denoise: Denoise, latents: Float[Array, "m h w c"]) -> Float[Array, "m h w c"]:
        """Denoise ``latents`` ~ N(0, I) (float32); pure, to be called inside ``jax.jit``."""
        initial = latents.astype(jnp.float32)

        def weighted(weights, outputs):
            return jnp.tensordot(weights, outputs, 1, precision=jax.lax.Precision.HIGHEST)

        def step(carry, row):
            x, start, history = carry
            epsilon = denoise(x, row["timestep"]).astype(jnp.float32)
            output = row["prediction"][0] * x + row["prediction"][1] * epsilon
            outputs = jnp.concatenate([output[None], history])
            start = row["correction"][0] * x + row["correction"][1] * start
            if "corrector" in row:
                start = start + weighted(row["corrector"], outputs)
            x = row["carry"] * start + weighted(row["weights"], outputs)
            return (x, start, jnp.where(row["stored"], outputs[:-1], history)), None

        history = jnp.zeros((self._order - 1, *latents.shape), jnp.float32)
        table = jax.tree.map(jnp.asarray, self._table)
        (x, *_), _ = jax.lax.scan(step, (initial, initial, history), table)
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
            carry=sample_weight,
            weights=weights * epsilon_weight[:, None],
            stored=stored,
            correction=np.stack([~redone, redone], 1),
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
            carry=sample_weight,
            weights=(np.sqrt(1 - b) - sample_weight * np.sqrt(1 - a))[:, None],
            stored=np.zeros(count),
        )


class DPMSolverPlusPlus(LinearMultistep):
    """DPM-Solver++ 2M (diffusers ``DPMSolverMultistepScheduler`` with its defaults), one call per step.

    Second order in the prediction of the clean latents; first and last steps are first order, the
    last one arrives at zero noise.  Good images in about 20 calls.
    """

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        levels = _Levels(schedule, num_inference_steps)
        super().__init__(
            levels.calls,
            prediction=levels.prediction,
            carry=levels.carry,
            weights=levels.clean_weight[:, None] * levels.extrapolation(),
            stored=np.ones(len(levels.calls)),
        )


class UniPC(LinearMultistep):
    """Predictor-corrector of order 2 (diffusers ``UniPCMultistepScheduler`` with its defaults).

    The predictor is DPM-Solver++ 2M; the output at the end of a step also corrects that step, so there is
    one call per step.  B(h) = exp(h) - 1; the last step is not corrected.  Good images in about 10 calls.
    """

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        levels = _Levels(schedule, num_inference_steps)
        count, carry, steps = len(levels.calls), levels.carry, levels.steps
        correction, corrector = np.tile([1.0, 0.0], (count, 1)), np.zeros((count, 3))
        for i in range(1, count):
            correction[i] = [0, carry[i - 1]]
            corrector[i] = levels.clean_weight[i - 1] * _corrected(
                steps[i - 1], steps[i - 2] if i > 1 else None
            )
        super().__init__(
            levels.calls,
            prediction=levels.prediction,
            carry=carry,
            weights=levels.clean_weight[:, None] * np.pad(levels.extrapolation(), ((0, 0), (0, 1))),
            stored=np.ones(count),
            correction=correction,
            corrector=corrector,
        )


def _corrected(step: float, before: float | None) -> np.ndarray:
    """Weights [3] in UniC's mean over a ``step`` of the outputs at its end, at its start and before it.

    ``before`` is the length of the step before it, None for the first step, whose correction is of first
    order.
    """
    if before is None:
        return np.array([0.5, 0.5, 0])
    ratio = -before / step
    phi = np.expm1(-step) / -step - 1
    moments = np.array([phi, 2 * (phi / -step - 0.5)]) / np.expm1(-step)
    past, end = np.linalg.solve([[1, 1], [ratio, 1]], moments)
    return np.array([end, 1 - end - past / ratio, past / ratio])


class _Levels:
    """The noise levels of the calls of solvers that integrate over log(alpha / sigma) to no noise.

    Attributes:
      calls: [n], timesteps.
      steps: [n - 1], lengths of the steps but the last, which is infinite.
      prediction: [n, 2], that of the clean latents.
      carry: [n], weight of the latents in a step; clean_weight: [n], that of the mean clean latents over it.
    """

    def __init__(self, schedule: NoiseSchedule, num_inference_steps: int):
        if schedule.timestep_spacing == "trailing":
            self.calls = schedule.inference_timesteps(num_inference_steps)[::-1]
        else:  # the grid ends at timestep 0 or steps_offset, which needs no call
            self.calls = schedule.inference_timesteps(num_inference_steps + 1)[:0:-1]
        a = np.append(_abar(schedule, self.calls), 1.0)
        alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
        self.steps = np.diff(np.log(alpha[:-1] / sigma[:-1]))
        self.prediction = np.stack([1 / alpha[:-1], -sigma[:-1] / alpha[:-1]], 1)
        self.carry = sigma[1:] / sigma[:-1]
        self.clean_weight = alpha[1:] - alpha[:-1] * self.carry

    def extrapolation(self) -> np.ndarray:
        """Weights [n, 2] of the last two outputs in each step: linear, but constant at both ends."""
        half = np.zeros(len(self.calls))
        half[1:-1] = 0.5 * self.steps[1:] / self.steps[:-1]
        return np.stack([1 + half, -half], 1)


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
    "unipc": UniPC,
}


def make_sampler(name: str, schedule: NoiseSchedule, num_inference_steps: int) -> Sampler:
    """The sampler called ``name`` (a key of ``SAMPLERS``).

    Raises:
      ValueError: an unknown name, or a number of steps that the schedule does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name](schedule, num_inference_steps)


def guided(denoise_pair: Denoise, guidance_scale: float | jax.Array) -> Denoise:
    """Classifier-free guidance (fidelity 3.5): ``e_u + guidance_scale * (e_c - e_u)``.

    ``denoise_pair`` sees the latents twice, [2m h w c], and returns epsilon without the condition
    for the first m and with it for the last m: both branches share one batch.
    """

    def denoise(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        both = denoise_pair(jnp.concatenate([latents, latents]), timestep)
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise
