"""The papers' feature mapper behind the Mapper protocol (fidelity 1.11)."""

from __future__ import annotations

from minigpt5_jax.models.mapper.model import FeatureMapper
from minigpt5_jax.models.mapper.weights import TABLE
from minigpt5_jax.parts.contracts import Key
from minigpt5_jax.parts.mappers._transformer import make_part

PART = make_part(
    "encoder_decoder",
    FeatureMapper,
    TABLE,
    "torch_mapper.py",
    depths={
        "num_encoder_layers": Key(4, "layers over the voken states", low=1),
        "num_decoder_layers": Key(4, "layers over the learned queries", low=1),
    },
    fixed=r"(fc|queries)(/.*)?",
)
