"""Weight table of MiniGPT-4's projection from the Q-Former to the language model (reference 1.4, 7.6)."""

from __future__ import annotations

import dataclasses

from minigpt5_jax.weights.table import Table, linear_rules


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Widths of the projection."""

    in_features: int = 768
    out_features: int = 4096


TABLE = Table(
    tuple(
        dataclasses.replace(rule, target=rule.targets[0].removeprefix("llama_proj/"))
        for rule in linear_rules("llama_proj", "llama_proj")
    ),
    {r"(?!llama_proj\.).*": "a buffer of another part that MiniGPT-4's saver left in"},
)
"""``llama_proj.weight`` and ``.bias`` of ``prerained_minigpt4_7b.pth``."""
