"""Mappers: voken states -> condition."""

from minigpt5_jax.parts.mappers import encoder_decoder  # noqa: F401
