"""minigpt5_jax: MiniGPT-5 (interleaved vision-and-language generation via generative vokens) in JAX.

Public names, imported when first used:

- ``get_config``: the base configuration, every key at its default.
- ``MiniGPT5``: a trained model to use: ``from_pretrained``, ``generate``, ``chat``, ``save_pretrained``.
- ``Batch``: the contract between data and model.
- ``TrainState``: what training changes.
- ``open_run``: a trained run, weights not yet read; ``load_run``: the model of one, with its weights.
- ``Session``: a model ready to answer; ``Prompt``: what to answer.
- ``load_pretrained``: a model from pretrained weights and released checkpoints.
- ``export_torch``: a trained model as PyTorch files.

Everything else is reachable by path and not promised.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "get_config": "minigpt5_jax.config",
    "MiniGPT5": "minigpt5_jax.wiring.pipeline",
    "Batch": "minigpt5_jax.batch",
    "TrainState": "minigpt5_jax.training.state",
    "open_run": "minigpt5_jax.wiring.restore",
    "load_run": "minigpt5_jax.wiring.restore",
    "Session": "minigpt5_jax.inference.session",
    "Prompt": "minigpt5_jax.inference.session",
    "load_pretrained": "minigpt5_jax.wiring.pretrained",
    "export_torch": "minigpt5_jax.export",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
