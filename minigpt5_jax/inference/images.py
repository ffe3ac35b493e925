"""Pictures from conditions: guided sampling with the whole scheduler loop compiled (reference 3.5, 6.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.parts.generators.stable_diffusion import StableDiffusion


def initial_latents(keys: Key[Array, " m"], latent_shape: tuple[int, int, int]) -> Float[Array, "m h w c"]:
    """N(0, I), one key per picture, so that a picture does not depend on the batch it is made in."""
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)


def sample_pictures(
    generator: StableDiffusion,
    sampler: Sampler,
    condition: Float[Array, "m q c"],
    negative: Float[Array, "#m q c"],
    latents: Float[Array, "m h w c"],
    guidance_scale: float,
) -> UInt8[Array, "m H W 3"]:
    """Denoise ``latents`` under ``condition`` and decode them.

    ``epsilon = e(negative) + guidance_scale * (e(condition) - e(negative))``; both run in one UNet
    batch.  At ``guidance_scale=1`` the negative is not evaluated at all.
    """
    count = latents.shape[0]
    guided = guidance_scale != 1.0
    context = condition
    if guided:
        context = jnp.concatenate([jnp.broadcast_to(negative, condition.shape), condition])

    def denoise(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        repeated = jnp.concatenate([noisy, noisy]) if guided else noisy
        steps = jnp.full((repeated.shape[0],), timestep, jnp.int32)
        epsilon = generator.predict_noise(repeated, steps, context)
        if not guided:
            return epsilon
        unconditional, conditional = epsilon[:count], epsilon[count:]
        return unconditional + guidance_scale * (conditional - unconditional)

    return generator.decode(sampler.sample(denoise, latents))
