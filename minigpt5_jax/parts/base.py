"""The three contracts a model is put together from, and the registries of their implementations.

A variant of the papers is one file behind one of these protocols, one registry line and one
configuration line.  The composite (:mod:`minigpt5_jax.minigpt5`) and the train step know the
protocols only and never compare a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from minigpt5_jax.batch import Batch


class Backbone(Protocol):
    """Pictures and text -> hidden states; a language model with eyes.

    Attributes:
      hidden_size: width of its hidden states.
      vocab_size: rows of the frozen vocabulary V; voken ids are V ... V + num_vokens - 1 and the
        picture placeholder is V + num_vokens.
      num_vokens: number of generative vokens.
      image_tokens: slots one input picture takes in the sequence (0: it cannot see).
      image_size: side in pixels of an input picture.
      max_positions: positions of a sequence that the language model was made for.
    """

    hidden_size: int
    vocab_size: int
    num_vokens: int
    image_tokens: int
    image_size: int
    max_positions: int

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with picture features in their slots, f32[b t d]."""

    def hidden(self, embeds: jax.Array, batch: Batch, dropout_keys: jax.Array | None) -> jax.Array:
        """Final-layer hidden states [b t d]; ``dropout_keys`` (key[b]) switches LoRA dropout on."""

    def logit_blocks(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the frozen vocabulary and of the new rows, f32[... V] and f32[... n]."""


class Mapper(Protocol):
    """Voken states [n m d] -> condition of the generator [n q c].

    Attributes:
      config_class: dataclass of its sizes: the keys of its variant in ``config_keys.PARTS``,
        ``llm_hidden_size`` (d) and ``num_queries`` (q).
    """

    config_class: type

    def __call__(self, vokens: jax.Array) -> jax.Array: ...


class Generator(Protocol):
    """Condition -> loss against a picture, or a picture.

    Attributes:
      image_size: side in pixels of its pictures.
      latent_shape: (h, w, c) of its latents.
      condition_shape: (q, c) of the condition it listens to.
      num_train_timesteps: timesteps are drawn from 0 ... num_train_timesteps - 1.
    """

    image_size: int
    latent_shape: tuple[int, int, int]
    condition_shape: tuple[int, int]
    num_train_timesteps: int

    def moments(self, pictures: jax.Array) -> jax.Array:
        """u8[m H W 3] -> moments of the posterior over latents, f32[m h w 2c]; may be made beforehand."""

    def latents(self, moments: jax.Array, posterior_noise: jax.Array) -> jax.Array:
        """Moments -> scaled latents f32[m h w c], one posterior sample per picture."""

    def caption_features(self, caption_ids: jax.Array, caption_mask: jax.Array) -> jax.Array:
        """Text features of captions, [m q c]: the target of the caption loss."""

    def empty_caption_features(self) -> jax.Array:
        """Text features of the empty string, [q c]: the caption target of a CFG-dropped item."""

    def empty_prompt_features(self) -> jax.Array:
        """Condition of the empty prompt as the generator was trained with it, [q c]."""

    def denoising_loss(
        self, latents: jax.Array, condition: jax.Array, timesteps: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Weighted denoising error of each item, f32[m]."""


BACKBONES: dict[str, Callable[..., Any]] = {}
MAPPERS: dict[str, Callable[..., Any]] = {}
GENERATORS: dict[str, Callable[..., Any]] = {}


def register(registry: dict[str, Callable[..., Any]], name: str):
    """Class decorator: one line that makes an implementation available to configurations."""

    def add(cls):
        if name in registry:
            raise ValueError(f"{name!r} is registered twice ({registry[name]} and {cls})")
        registry[name] = cls
        return cls

    return add


def lookup(registry: dict[str, Callable[..., Any]], name: str, what: str) -> Callable[..., Any]:
    """The implementation registered under ``name``; ValueError listing the known names."""
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(registry))}")
    return registry[name]
