"""Backbones, mappers and generators; importing this package fills the registries."""

from minigpt5_jax.parts import backbones, generators, mappers  # noqa: F401
