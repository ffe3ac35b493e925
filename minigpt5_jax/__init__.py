"""minigpt5_jax: MiniGPT-5 (interleaved vision-and-language generation via generative vokens) in JAX.

Public names, imported when first used:

- ``get_config``: the base configuration, every key at its default.
- ``MiniGPT5``: the composite module; backbone, mapper and generator with their losses.
- ``Batch``: the contract between data and model.
- ``TrainState``: what training changes.
- ``load_run``: a trained model from its checkpoint.
- ``load_pretrained``: a model from pretrained weights and released checkpoints.
- ``export_torch``: a trained model as PyTorch files.

Everything else is reachable by path and not promised.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "get_config": "minigpt5_jax.config",
    "MiniGPT5": "minigpt5_jax.minigpt5",
    "Batch": "minigpt5_jax.batch",
    "TrainState": "minigpt5_jax.training.state",
    "load_run": "minigpt5_jax.restore",
    "load_pretrained": "minigpt5_jax.pretrained",
    "export_torch": "minigpt5_jax.export",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
