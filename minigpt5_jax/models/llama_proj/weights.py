"""Weight table of MiniGPT-4's projection from the Q-Former to the language model (fidelity 1.4, 7.6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from minigpt5_jax.models.tower import Shapes, Tower
from minigpt5_jax.weights.table import LINEAR, Rule, Table
from minigpt5_jax.weights.view import Tensors


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Widths of the projection."""

    in_features: int = 768
    out_features: int = 4096

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ProjectionConfig:
        """From the ``config.json`` that ``convert`` writes."""
        return cls(**config)


TABLE = Table(
    (Rule("llama_proj.weight", "kernel", LINEAR), Rule("llama_proj.bias", "bias")),
    {r"(?!llama_proj\.).*": "a buffer of another part that MiniGPT-4's saver left in"},
)
"""``llama_proj.weight`` and ``.bias`` of ``prerained_minigpt4_7b.pth``."""


def _shapes(config: ProjectionConfig) -> Shapes:
    return {"kernel": (config.in_features, config.out_features), "bias": (config.out_features,)}


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    if shape("llama_proj.weight")[:1] == (5120,):
        return "MiniGPT-4's projection for Vicuna-13B; MiniGPT-5 takes the one for 7B"
    return ""


TOWER = Tower(
    ProjectionConfig,
    {"minigpt4_7b": ProjectionConfig()},
    table=lambda *_: TABLE,
    shapes_of=_shapes,
    marks=("llama_proj.",),
    cause=_cause,
    key="model",
)
