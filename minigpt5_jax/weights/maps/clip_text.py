"""Weight table of the CLIP text encoder (Hugging Face ``CLIPTextModel``; SD 2.1 ``text_encoder``)."""

from __future__ import annotations

from collections.abc import Iterable

from minigpt5_jax.weights.table import LINEAR, Rule, Table

PREFIX = "text_model."

_LAYER = "encoder.layers.{i}."


def _affine(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}/kernel", LINEAR), Rule(f"{source}.bias", f"{target}/bias")


_BARE = Table(
    (
        Rule("embeddings.token_embedding.weight", "token_embedding/embedding"),
        Rule("embeddings.position_embedding.weight", "position_embedding/embedding"),
        *(rule for name in ("q_proj", "k_proj", "v_proj", "out_proj")
          for rule in _linear(f"{_LAYER}self_attn.{name}", f"layers/self_attn/{name}")),
        *(rule for name in ("fc1", "fc2") for rule in _linear(f"{_LAYER}mlp.{name}", f"layers/mlp/{name}")),
        *(rule for name in ("layer_norm1", "layer_norm2")
          for rule in _affine(_LAYER + name, f"layers/{name}")),
        *_affine("final_layer_norm", "final_layer_norm"),
    ),
    ignored={r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ..."},
)

TABLE = _BARE.prefixed(source=PREFIX)
"""Names of every published file (``text_model.encoder.layers.0...``); exports use these."""


def table_for(keys: Iterable[str]) -> Table:
    """The table that fits a source: transformers 5 writes the same names without ``text_model.``."""
    return TABLE if any(key.startswith(PREFIX) for key in keys) else _BARE
