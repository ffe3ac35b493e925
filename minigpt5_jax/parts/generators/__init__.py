"""Generators: condition -> loss or picture."""

from minigpt5_jax.parts.generators import stable_diffusion  # noqa: F401
