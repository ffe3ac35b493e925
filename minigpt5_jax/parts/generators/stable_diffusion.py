"""Stable Diffusion 2.1: UNet, VAE and text encoder behind the Generator protocol.

Reference sections 1.7-1.10, 3.3, 3.4.  All three towers are frozen in every stage; the gradient
only passes through the UNet on its way to the condition.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.models.clip_text import ClipTextConfig, ClipTextModel
from minigpt5_jax.models.unet import UNet2DConditionModel, UNetConfig
from minigpt5_jax.models.vae import AutoencoderKL, VaeConfig, sample_posterior
from minigpt5_jax.parts.base import GENERATORS, register


@register(GENERATORS, "stable_diffusion")
class StableDiffusion(nnx.Module):
    """Latent diffusion with a text-encoder-shaped condition.

    Args:
      unet, vae, text_encoder: tower configurations.
      schedule: noise schedule (Hugging Face scheduler config).
      image_size: side of its pictures in pixels.
      empty_caption_ids: CLIP ids of the empty string, padded to the context length: the caption
        target of a CFG-dropped item.  empty_caption_length: its real tokens (BOS and EOS: 2).
      caption_attn_mask: text encoder attends to real tokens only (Q10; the original does).
      min_snr_gamma: gamma of the min-SNR weighting, None for the plain mean (Q13).
    """

    def __init__(
        self,
        *,
        unet: UNetConfig,
        vae: VaeConfig,
        text_encoder: ClipTextConfig,
        schedule: NoiseSchedule,
        image_size: int,
        empty_caption_ids: tuple[int, ...],
        empty_caption_length: int = 2,
        caption_attn_mask: bool = True,
        min_snr_gamma: float | None = 5.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        factor = 2 ** (len(vae.block_out_channels) - 1)
        if image_size % factor:
            raise ValueError(f"image_size={image_size} does not divide by the VAE's factor {factor}")
        if unet.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"unet.cross_attention_dim={unet.cross_attention_dim} but "
                f"text_encoder.hidden_size={text_encoder.hidden_size}"
            )
        if len(empty_caption_ids) != text_encoder.max_position_embeddings:
            raise ValueError(
                f"empty_caption_ids has {len(empty_caption_ids)} ids, the text encoder reads "
                f"{text_encoder.max_position_embeddings}"
            )
        self.image_size = image_size
        self.latent_shape = (image_size // factor, image_size // factor, vae.latent_channels)
        self.condition_shape = (text_encoder.max_position_embeddings, text_encoder.hidden_size)
        self.num_train_timesteps = schedule.num_train_timesteps
        self.scaling_factor = vae.scaling_factor
        self.schedule = schedule
        self.empty_caption_ids = tuple(empty_caption_ids)
        self.empty_caption_length = empty_caption_length
        self.caption_attn_mask = caption_attn_mask
        self.min_snr_gamma = min_snr_gamma
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
        self.unet = UNet2DConditionModel(unet, rngs=rngs, **dtypes)
        self.vae = AutoencoderKL(vae, rngs=rngs, **dtypes)
        self.text_encoder = ClipTextModel(text_encoder, rngs=rngs, **dtypes)

    def moments(self, pictures: UInt8[Array, "m H W 3"]) -> Float[Array, "m h w c2"]:
        """Moments of the posterior over unscaled latents, fp32, of pixels in [-1, 1] (Q9, Q12)."""
        return self.vae.encode(pictures.astype(jnp.float32) / 127.5 - 1.0)

    def latents(
        self, moments: Float[Array, "m h w c2"], posterior_noise: Float[Array, "m h w c"]
    ) -> Float[Array, "m h w c"]:
        """One posterior sample per picture, scaled; fp32 whatever the towers' dtype (Q12)."""
        return self.scaling_factor * sample_posterior(moments, posterior_noise)

    def caption_features(
        self, caption_ids: Int[Array, "m q"], caption_mask: Int[Array, "m q"]
    ) -> Float[Array, "m q c"]:
        """Text-encoder states of captions: the caption loss's target (no gradient), fp32."""
        mask = caption_mask if self.caption_attn_mask else None
        return jax.lax.stop_gradient(self.text_encoder(caption_ids, mask)).astype(jnp.float32)

    def empty_caption_features(self) -> Float[Array, "q c"]:
        """:meth:`caption_features` of the empty string, the caption target of a CFG-dropped item."""
        ids = jnp.asarray(self.empty_caption_ids, jnp.int32)[None]
        mask = (jnp.arange(ids.shape[1]) < self.empty_caption_length).astype(jnp.int32)[None]
        return self.caption_features(ids, mask)[0]

    def empty_prompt_features(self) -> Float[Array, "q c"]:
        """Condition of the empty prompt, fp32, as Stable Diffusion knows it: never masked (Q10, Q38)."""
        ids = jnp.asarray(self.empty_caption_ids, jnp.int32)[None]
        return self.text_encoder(ids)[0].astype(jnp.float32)

    def predict_noise(
        self, latents: Float[Array, "m h w c"], timesteps: Int[Array, " m"], condition: Float[Array, "m q d"]
    ) -> Float[Array, "m h w c"]:
        """epsilon predicted by the UNet, fp32."""
        return self.unet(latents, timesteps, condition).astype(jnp.float32)

    def denoising_loss(
        self,
        latents: Float[Array, "m h w c"],
        condition: Float[Array, "m q d"],
        timesteps: Int[Array, " m"],
        noise: Float[Array, "m h w c"],
    ) -> Float[Array, " m"]:
        """min-SNR weighted squared error of each item, mean over its latent (reference 3.4)."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        error = jnp.square(self.predict_noise(noisy, timesteps, condition) - noise)
        weight = self.schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        return weight * error.mean((1, 2, 3))

    def decode(self, latents: Float[Array, "m h w c"]) -> UInt8[Array, "m H W 3"]:
        """Scaled latents -> pictures; clamp(x/2 + 0.5) x 255, rounded (reference 6.3)."""
        pixels = self.vae.decode(latents / self.scaling_factor).astype(jnp.float32)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
