"""The feature mapper with a PyTorch module that needs nothing but torch and safetensors."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.weights.export.model import ExportableModel
from minigpt5_jax.weights.formats.load import cast
from minigpt5_jax.weights.formats.save import save_safetensors, write_json
from minigpt5_jax.weights.table import Table

MODULE = "torch_mapper.py"
"""Name under which the PyTorch source of a mapper goes out."""
README = """\
Feature mapper of MiniGPT-5, exported from minigpt5_jax.
`torch_mapper.py` is all the code it needs besides torch and safetensors:
`from torch_mapper import FeatureMapper; mapper = FeatureMapper.from_folder(".")`
`mapper(states)`, [n, {num_vokens}, {width}] -> [n, {num_queries}, {d_model}]: the generator's prompt_embeds;
`mapper.unconditional()`, T(0) [1, {num_queries}, {d_model}]: its negative_prompt_embeds.
"""


def write(model: ExportableModel, folder: Path, *, table: Table, module: str, dtype: Any = None) -> int:
    """``mapper.safetensors`` under PyTorch's names, its module and sizes; returns the number of tensors.

    Args:
      table: names of the mapper's tensors.  module: its PyTorch source, a file beside this one.
    """
    sizes = model.made["mapper"]["config"]
    named = table.to_source(model.below("mapper/"))
    values = {name: cast(np.asarray(value), dtype or np.float32) for name, value in named.items()}
    save_safetensors(folder / "mapper.safetensors", values, {"format": "pt"})
    shape = {"num_vokens": model.num_vokens, "voken_state_shift": model.voken_state_shift}
    write_json(folder / "config.json", {**dataclasses.asdict(sizes), **shape})
    shutil.copyfile(Path(__file__).with_name(module), folder / MODULE)
    text = README.format(
        num_vokens=model.num_vokens,
        width=sizes.llm_hidden_size,
        num_queries=sizes.num_queries,
        d_model=sizes.d_model,
    )
    (folder / "README.md").write_text(text)
    return len(values)
