"""What the two mappers made of torch's transformer layers have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from minigpt5_jax.parts.contracts import Context, Export, Key, Keys, Sizes
from minigpt5_jax.weights.export import mapper
from minigpt5_jax.weights.table import Table

KEYS = {
    "d_model": Key(1024, "width; that of the generator's condition", low=1),
    "nhead": Key(8, "attention heads", low=1),
    "dim_feedforward": Key(4096, "width of the feed-forward layers", low=1),
}
SMALL_SIZES = {"d_model": 128, "dim_feedforward": 512}
# Mappers train, so their weights and moments are spread ZeRO-style.
SHARDING = {"": {"mlp": "fsdp"}}


def make_of(config: type) -> Callable[[Keys, Sizes, Context], dict[str, Any]]:
    """The ``make`` of a mapper whose module takes a ``config`` of this class."""

    def make(keys: Keys, sizes: Sizes, context: Context) -> dict[str, Any]:
        queries, width = context.neighbours["condition_shape"]
        if keys["d_model"] != width:
            raise ValueError(
                f"model.mapper.d_model={keys['d_model']}, the generator listens to width {width}"
            )
        hidden = context.neighbours["hidden_size"]
        return {
            "config": config(llm_hidden_size=hidden, num_queries=queries, **keys),
            "dtype": context.dtype,
        }

    return make


def conflicts(keys: Keys) -> Iterator[str]:
    """What does not go together."""
    if keys["d_model"] % keys["nhead"]:
        yield (
            f"model.mapper.d_model={keys['d_model']} does not divide into "
            f"model.mapper.nhead={keys['nhead']} heads"
        )


def exports_of(table: Table, module: str) -> dict[str, Export]:
    """The formats of a mapper: its weights by ``table`` beside the PyTorch source ``module``."""
    write = functools.partial(mapper.write, table=table, module=module)
    return {
        "mapper": Export(write, "the feature mapper and its PyTorch module"),
        "safetensors": Export(write, "another name of 'mapper'"),
    }
