"""Samplers against diffusers' schedulers on a toy denoiser, and against the original's recorded run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from minigpt5_jax.diffusion.samplers import DDIM, PNDM, DPMSolverPlusPlus, guided, make_sampler
from minigpt5_jax.diffusion.schedule import SD21_BASE, NoiseSchedule

FIELDS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)
THEIRS = {
    "pndm": lambda **kw: PNDMScheduler(skip_prk_steps=True, **kw),
    "ddim": lambda **kw: DDIMScheduler(clip_sample=False, **{"set_alpha_to_one": False} | kw),
    "dpm_solver++": lambda **kw: DPMSolverMultistepScheduler(
        **{k: v for k, v in kw.items() if k != "set_alpha_to_one"}
    ),
    "unipc": lambda **kw: UniPCMultistepScheduler(**{k: v for k, v in kw.items() if k != "set_alpha_to_one"}),
}
LATENTS = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)


def toy(x, t, lib):
    """Nonlinear in x and t, of the size of real noise predictions."""
    return lib.tanh(0.8 * x + lib.sin(0.01 * t)) + 0.1 * x * lib.cos(0.003 * t)


def run_diffusers(scheduler, count: int) -> tuple[np.ndarray, list[int]]:
    scheduler.set_timesteps(count)
    x = torch.tensor(LATENTS)
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.float(), torch), t, x).prev_sample
    return x.numpy(), scheduler.timesteps.tolist()


def run_ours(sampler) -> np.ndarray:
    def denoise(x, t):
        return toy(x, t.astype(jnp.float32), jnp)

    return np.asarray(jax.jit(lambda x: sampler.sample(denoise, x))(jnp.asarray(LATENTS)))


def assert_same(name: str, count: int, **fields):
    sampler = make_sampler(name, NoiseSchedule(**fields), count)
    theirs, timesteps = run_diffusers(THEIRS[name](**fields), count)
    assert sampler.timesteps.tolist() == timesteps
    np.testing.assert_allclose(run_ours(sampler), theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("count", [50, 20, 10, 5])
@pytest.mark.parametrize("name", sorted(THEIRS))
def test_equals_diffusers(name, count):
    assert_same(name, count, **FIELDS)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(THEIRS))
def test_equals_diffusers_with_very_few_steps(name, count):
    assert_same(name, count, **FIELDS)


@pytest.mark.parametrize("name", sorted(THEIRS))
@pytest.mark.parametrize(
    "change",
    [{"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"set_alpha_to_one": True}],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_equals_diffusers_on_other_schedules(name, change):
    assert_same(name, 7, **FIELDS | change)


def test_pndm_calls_the_denoiser_in_the_published_order():
    sampler = PNDM(SD21_BASE, 50)
    assert len(sampler.timesteps) == 51
    assert sampler.timesteps.tolist() == [981, 961, *range(961, 0, -20)]
    assert len(DDIM(SD21_BASE, 50).timesteps) == len(DPMSolverPlusPlus(SD21_BASE, 50).timesteps) == 50


def test_oracle_run_step_by_step(oracle_cases, oracle_configs):
    """The recorded guided epsilons, in their order, give the recorded latents after every step."""
    image = {k.split("/")[-1]: v for k, v in oracle_cases.items() if k.startswith("s1/i1_forced/image/")}
    epsilons, wanted = (image[k].transpose(0, 2, 3, 1) for k in ("guided_eps", "latents"))
    inputs, timesteps = [], []

    def replay(x, t):
        inputs.append(np.asarray(x[0]))
        timesteps.append(int(t))
        return jnp.asarray(epsilons[len(inputs) - 1][None])

    sampler = PNDM(NoiseSchedule.from_hf(oracle_configs["scheduler"]), 5)
    initial = jnp.asarray(image["latents_init"].transpose(0, 2, 3, 1))
    with jax.disable_jit():  # runs the scan as a Python loop, so that the denoiser may keep count
        final = sampler.sample(replay, initial)
    assert timesteps == image["timesteps"].tolist()
    np.testing.assert_allclose(np.stack([*inputs[1:], final[0]]), wanted, rtol=1e-6, atol=2e-6)


def test_guidance_mixes_both_halves_of_one_batch():
    def denoise_pair(x, t):
        assert x.shape == (4, 1, 1, 1)
        return x * jnp.array([1.0, 1.0, 3.0, 3.0]).reshape(4, 1, 1, 1) + t

    x = jnp.array([1.0, 2.0]).reshape(2, 1, 1, 1)
    out = guided(denoise_pair, 7.5)(x, jnp.int32(10))
    np.testing.assert_allclose(out, x * (1 + 7.5 * 2) + 10)


def test_gradients_flow_through_the_loop():
    def loss(x):
        return PNDM(SD21_BASE, 4).sample(lambda x, t: toy(x, t.astype(jnp.float32), jnp), x).sum()

    x = jnp.asarray(LATENTS)
    direction = jnp.ones_like(x)
    numeric = (loss(x + 1e-2 * direction) - loss(x - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose((jax.grad(loss)(x) * direction).sum(), numeric, rtol=1e-2)


def test_bad_requests_are_explained():
    with pytest.raises(
        ValueError, match=r"unknown sampler 'euler'; known: ddim, dpm_solver\+\+, pndm, unipc"
    ):
        make_sampler("euler", SD21_BASE, 10)
    for name in THEIRS:
        with pytest.raises(ValueError, match="num_inference_steps=0"):
            make_sampler(name, SD21_BASE, 0)
