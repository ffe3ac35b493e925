"""Weight table of the decoder-only mapper: 102 names at full size.

No file of the papers' has one, so the names are ours: those of the papers' mapper with torch's
``nn.TransformerEncoder`` in the place of its ``nn.Transformer``
(``weights/export/torch_decoder_only_mapper.py``).
"""

from __future__ import annotations

from minigpt5_jax.models.mapper.weights import FC_RULES, stack_rules
from minigpt5_jax.weights.table import Table

TABLE = Table((*FC_RULES, *stack_rules("llm_to_t2i_mapping.", "", ("self_attn",))))
