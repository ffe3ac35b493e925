"""The mapper ablation behind the Mapper protocol (fidelity 9.1)."""

from __future__ import annotations

from minigpt5_jax.models.decoder_only_mapper.model import DecoderOnlyMapper
from minigpt5_jax.models.decoder_only_mapper.weights import TABLE
from minigpt5_jax.parts.contracts import Key
from minigpt5_jax.parts.mappers._transformer import make_part

PART = make_part(
    "decoder_only",
    DecoderOnlyMapper,
    TABLE,
    "torch_decoder_only_mapper.py",
    depths={
        "num_layers": Key(8, "layers over the voken states; as many as the papers' mapper has", low=1),
    },
    fixed=r"fc/.*",
)
