"""The README.md of a saved model: how to use it, what it stands on, and the licences of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config import PACKAGED, weight_sources
from minigpt5_jax.training.provenance import Meta, stage_of
from minigpt5_jax.wiring.weight_paths import needed_sources, uses_of

_CARD = """---
library_name: minigpt5_jax
pipeline_tag: any-to-any
license: {licence}
tags: [minigpt5, interleaved-generation, jax]
---

# {name}

A [MiniGPT-5](https://arxiv.org/abs/2310.02239) of stage {stage}, trained with minigpt5_jax to step {step} on
`{data}` data: a frozen language model that answers with text and images in one sequence.  This folder holds
what was trained, {parameters:,} parameters; the frozen towers are read from their own sources, listed below.

```python
from minigpt5_jax import MiniGPT5

model = MiniGPT5.from_pretrained("PATH/OF/THIS/FOLDER")
answer = model.generate({prompt!r}, seed=0)
print(answer.parts)  # texts and PIL images, in order
```

Where a source lies elsewhere: `from_pretrained(..., weights={{"NAME": "PATH"}})`.

## What it stands on

The frozen weights must be the ones of the training; they are compared by SHA-256 when the model is opened.

| name | source | licence |
|---|---|---|
{sources}

| frozen | SHA-256 of its parameters |
|---|---|
{hashes}

What was trained is a derivative of these weights and of the training data, so **the terms of all of them hold
for it too**; the strictest decides.  The code of minigpt5_jax is under Apache-2.0.

## Trained by

Revision `{revision}` with {packages}.
All settings are in `config.json`.
"""


def model_card(config: ConfigDict, meta: Meta, step: int, params: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
      config: of the run.  meta: its description.  step: updates done.
      params: what the folder holds.
    """
    stage = stage_of(config.to_dict())
    packaged = set(weight_sources(config).values()) <= {PACKAGED, ""}
    count = sum(math.prod(value.shape) for value in params.values())
    return _CARD.format(
        licence="apache-2.0" if packaged else "other",
        name=config.run.name,
        stage=stage,
        step=step,
        data=config.data.format,
        parameters=count,
        prompt=["a large red circle" if stage == 1 else "please draw: a large red circle."],
        sources="\n".join(_sources(config)),
        hashes="\n".join(f"| `{tower}` | `{value}` |" for tower, value in sorted(meta["frozen"].items())),
        revision=meta.get("git_revision", "unknown"),
        packages=", ".join(f"{name} {version}" for name, version in meta.get("packages", {}).items()),
    )


def _sources(config: ConfigDict) -> Iterator[str]:
    """A row of the table for each source that is used."""
    given, uses = weight_sources(config), uses_of(config)
    for name in needed_sources(config):
        origin = uses[name][1].origin
        if given[name] == PACKAGED:
            yield f"| `{name}` | packaged with minigpt5_jax (the small world) | Apache-2.0 |"
        else:
            where = f" (`{origin.repos[0]}`)" if origin.repos else ""
            yield f"| `{name}` | {origin.title}{where}; here `{given[name]}` | {origin.licence} |"
