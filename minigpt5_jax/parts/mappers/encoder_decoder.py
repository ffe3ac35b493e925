"""The papers' feature mapper behind the Mapper protocol (fidelity 1.11)."""

from __future__ import annotations

from minigpt5_jax.models.mapper.model import FeatureMapper, MapperConfig
from minigpt5_jax.models.mapper.weights import TABLE
from minigpt5_jax.parts.contracts import FROZEN, SMALL, Key, Part
from minigpt5_jax.parts.mappers._transformer import (
    KEYS,
    SHARDING,
    SMALL_SIZES,
    conflicts,
    exports_of,
    make_of,
)

PART = Part(
    kind="mapper",
    name="encoder_decoder",
    module=FeatureMapper,
    make=make_of(MapperConfig),
    keys={
        **KEYS,
        "num_encoder_layers": Key(4, "layers over the voken states", low=1),
        "num_decoder_layers": Key(4, "layers over the learned queries", low=1),
    },
    trainable={
        "stage1": ((r".*", "mapper"),),
        # Stage 2 leaves the MLP and the queries as stage 1 left them (fidelity 4.2, 4.5).
        "stage2": ((r"(fc|queries)(/.*)?", FROZEN), (r".*", "mapper")),
    },
    sharding=SHARDING,
    conflicts=conflicts,
    settings={SMALL: SMALL_SIZES},
    exports=exports_of(TABLE, "torch_mapper.py"),
)
