"""Noise schedule against diffusers, torch-computed values and the reference's golden numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from minigpt5_jax.diffusion.schedule import SD21_BASE, NoiseSchedule

HF_FIELDS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_golden_values():
    abar = SD21_BASE.alphas_cumprod
    assert abar.dtype == np.float32 and abar.shape == (1000,)
    np.testing.assert_allclose(abar[[0, 999]], [0.99914998, 0.00466010], rtol=0, atol=5e-9)
    np.testing.assert_allclose(SD21_BASE.snr(jnp.array([0, 999])), [1175.44, 0.00468191], rtol=2e-5)
    weight = np.asarray(SD21_BASE.min_snr_weight(jnp.arange(1000)))
    np.testing.assert_allclose(weight[[0, 100]], [0.004254, 0.591445], rtol=1e-4)
    assert (weight[147:] == 1).all() and (weight[:147] < 1).all()
    assert weight.mean() == pytest.approx(0.916571, abs=1e-6)
    assert (SD21_BASE.min_snr_weight(jnp.arange(5), None) == 1).all()


@pytest.mark.parametrize(
    "fields", [HF_FIELDS, {}, HF_FIELDS | {"num_train_timesteps": 77}], ids=["sd", "linear", "short"]
)
def test_alphas_equal_diffusers_bit_for_bit(fields):
    theirs = PNDMScheduler(**fields).alphas_cumprod.numpy()
    np.testing.assert_array_equal(NoiseSchedule(**fields).alphas_cumprod, theirs)


def test_add_noise_equals_diffusers_and_traces():
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 4, 3, 3, 2), np.float32)
    steps = np.array([0, 60, 700, 999])
    theirs = PNDMScheduler(**HF_FIELDS).add_noise(
        torch.tensor(latents), torch.tensor(noise), torch.tensor(steps)
    )
    ours = jax.jit(SD21_BASE.add_noise)(latents, noise, jnp.asarray(steps))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_from_hf_reads_the_recorded_scheduler(oracle_configs):
    schedule = NoiseSchedule.from_hf(oracle_configs["scheduler"])
    assert schedule == SD21_BASE and hash(schedule) == hash(SD21_BASE)


@pytest.mark.parametrize(
    "field, value",
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("clip_sample", True),
        ("trained_betas", [0.1]),
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("timestep_spacing", "log"),
        ("beta_end", 1.5),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        NoiseSchedule.from_hf(HF_FIELDS | {field: value})


def test_v_prediction_is_explained():
    with pytest.raises(ValueError, match="stable-diffusion-2-1-base"):
        NoiseSchedule(prediction_type="v_prediction")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [50, 7, 1])
def test_inference_timesteps_equal_diffusers(spacing, count):
    theirs = DDIMScheduler(**HF_FIELDS, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(count)
    ours = NoiseSchedule(**HF_FIELDS, timestep_spacing=spacing, steps_offset=1).inference_timesteps(count)
    np.testing.assert_array_equal(ours[::-1], theirs.timesteps.numpy())


def test_too_many_inference_steps_are_refused():
    with pytest.raises(ValueError, match="1001 is not between 1 and 1000"):
        SD21_BASE.inference_timesteps(1001)
    with pytest.raises(ValueError, match="reaches timestep 1000"):
        SD21_BASE.inference_timesteps(1000)
