"""Images from conditions: guided sampling with the whole scheduler loop compiled (fidelity 3.5, 6.3)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from minigpt5_jax.batch import Batch
from minigpt5_jax.diffusion.samplers import Sampler, guided
from minigpt5_jax.minigpt5 import Composite
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.parts.contracts import Generator


def initial_latents(keys: Key[Array, " m"], latent_shape: tuple[int, int, int]) -> Float[Array, "m h w c"]:
    """N(0, I), one key per image, so that an image does not depend on the batch it is made in."""
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)


def sample_images(
    generator: Generator,
    sampler: Sampler,
    condition: Float[Array, "m q c"],
    negative: Float[Array, "#m q c"],
    latents: Float[Array, "m h w l"],
    guidance_scale: float | Float[Array, " m"],
) -> UInt8[Array, "m H W 3"]:
    """Denoise ``latents`` under ``condition`` and decode them.

    ``epsilon = e(negative) + guidance_scale * (e(condition) - e(negative))``; both run in one UNet
    batch.  At ``guidance_scale=1`` the negative is not evaluated at all.  An array is a scale for each image.
    """
    each = isinstance(guidance_scale, jax.Array)
    if not each and guidance_scale == 1.0:
        denoise = generator.denoiser(condition)
    else:
        guidance_scale = guidance_scale[:, None, None, None] if each else guidance_scale
        both = jnp.concatenate([jnp.broadcast_to(negative, condition.shape), condition])
        denoise = guided(generator.denoiser(both), guidance_scale)
    return generator.decode(sampler.sample(denoise, latents))


def negative_condition(model: Composite, cfg_negative: str) -> Float[Array, "1 q c"]:
    """What images are guided away from: T(0), or the empty prompt (``CFG_NEGATIVES``, Q38)."""
    if cfg_negative == "empty_prompt":
        return model.generator.empty_prompt_features()[None]
    return model.unconditional()


def make_batch_sampler(
    template: Template, sampler: Sampler, guidance_scale: float, cfg_negative: str = "voken_zero"
) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """``f(params, batch, keys[m]) -> u8[m H W 3]``: images of a batch whose vokens are already written.

    The states are those that decoding would give (fidelity 2.5).
    """

    def sample(params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        model = template.bind(params)
        hidden = model.backbone.hidden(model.backbone.embed(batch), batch, None)
        condition = model.condition(model.voken_states(hidden, batch.voken_row, batch.voken_start))
        latents = initial_latents(keys, model.generator.latent_shape)
        return sample_images(
            model.generator,
            sampler,
            condition,
            negative_condition(model, cfg_negative),
            latents,
            guidance_scale,
        )

    return sample
