"""Backbones: pictures and text -> hidden states."""

from minigpt5_jax.parts.backbones import minigpt4  # noqa: F401
