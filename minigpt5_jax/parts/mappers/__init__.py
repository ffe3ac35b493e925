"""Mappers: voken states -> condition."""

from minigpt5_jax.parts.mappers import decoder_only, encoder_decoder  # noqa: F401
