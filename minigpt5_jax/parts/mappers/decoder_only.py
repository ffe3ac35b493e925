"""The mapper ablation behind the Mapper protocol (fidelity 9.1)."""

from __future__ import annotations

from minigpt5_jax.models.decoder_only_mapper.model import DecoderOnlyMapper, DecoderOnlyMapperConfig
from minigpt5_jax.models.decoder_only_mapper.weights import TABLE
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
    name="decoder_only",
    module=DecoderOnlyMapper,
    make=make_of(DecoderOnlyMapperConfig),
    keys={
        **KEYS,
        "num_layers": Key(8, "layers over the voken states; as many as the papers' mapper has", low=1),
    },
    trainable={
        "stage1": ((r".*", "mapper"),),
        # Stage 2 leaves the MLP as stage 1 left it (fidelity 4.2, 4.5).
        "stage2": ((r"fc/.*", FROZEN), (r".*", "mapper")),
    },
    sharding=SHARDING,
    conflicts=conflicts,
    settings={SMALL: SMALL_SIZES},
    exports=exports_of(TABLE, "torch_decoder_only_mapper.py"),
)
