"""What the two mappers made of torch's transformer layers have in common: everything but their layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from minigpt5_jax.parts.contracts import FROZEN, SMALL, Context, Export, Key, Keys, Part, Sizes
from minigpt5_jax.weights.export import mapper
from minigpt5_jax.weights.table import Table

KEYS = {
    "d_model": Key(1024, "width; that of the generator's condition", low=1),
    "nhead": Key(8, "attention heads", low=1),
    "dim_feedforward": Key(4096, "width of the feed-forward layers", low=1),
}


def make_part(
    name: str, module: Any, table: Table, torch_module: str, depths: Mapping[str, Key], fixed: str
) -> Part:
    """The record of a mapper.

    Args:
      module: has ``config_class``, the dataclass of its sizes.  table: names of its tensors.
      torch_module: its PyTorch source, beside the export.  depths: keys that say how many layers it has.
      fixed: pattern of what stage 2 leaves as stage 1 left it (fidelity 4.2, 4.5).
    """
    write = functools.partial(mapper.write, table=table, module=torch_module)
    return Part(
        kind="mapper",
        name=name,
        module=module,
        make=functools.partial(make, module.config_class),
        keys={**KEYS, **depths},
        trainable={"stage1": ((r".*", "mapper"),), "stage2": ((fixed, FROZEN), (r".*", "mapper"))},
        conflicts=conflicts,
        settings={SMALL: {"d_model": 128, "dim_feedforward": 512}},
        exports={
            "mapper": Export(write, "the feature mapper and its PyTorch module"),
            "safetensors": Export(write, "another name of 'mapper'"),
        },
    )


def make(config: type, keys: Keys, sizes: Sizes, context: Context) -> dict[str, Any]:
    """Keyword arguments of a mapper whose sizes are of the class ``config``."""
    queries, width = context.neighbours["condition_shape"]
    if keys["d_model"] != width:
        raise ValueError(f"model.mapper.d_model={keys['d_model']}, the generator listens to width {width}")
    hidden = context.neighbours["hidden_size"]
    return {"config": config(llm_hidden_size=hidden, num_queries=queries, **keys), "dtype": context.dtype}


def conflicts(keys: Keys) -> Iterator[str]:
    """What does not go together."""
    if keys["d_model"] % keys["nhead"]:
        yield (
            f"model.mapper.d_model={keys['d_model']} does not divide into "
            f"model.mapper.nhead={keys['nhead']} heads"
        )
