"""The papers' feature mapper behind the Mapper protocol (reference section 1.11)."""

from minigpt5_jax.models.mapper import FeatureMapper
from minigpt5_jax.parts.base import MAPPERS, register

register(MAPPERS, "encoder_decoder")(FeatureMapper)
