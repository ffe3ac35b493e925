"""The mapper ablation behind the Mapper protocol (reference section 9.1)."""

from minigpt5_jax.models.decoder_only_mapper import DecoderOnlyMapper
from minigpt5_jax.parts.base import MAPPERS, register

register(MAPPERS, "decoder_only")(DecoderOnlyMapper)
