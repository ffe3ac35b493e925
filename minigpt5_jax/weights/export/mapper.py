"""The feature mapper with a PyTorch module that needs nothing but torch and safetensors."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.weights.export.model import Trained, cast
from minigpt5_jax.weights.maps import mapper
from minigpt5_jax.weights.rewrite import write_json
from minigpt5_jax.weights.save import save_safetensors

MODULE = Path(__file__).with_name("torch_mapper.py")
README = """\
Feature mapper of MiniGPT-5, exported from minigpt5_jax.
`torch_mapper.py` is all the code it needs besides torch and safetensors:
`from torch_mapper import FeatureMapper; mapper = FeatureMapper.from_folder(".")`
`mapper(states)`, [n, {num_vokens}, {width}] -> [n, {num_queries}, {d_model}]: the generator's prompt_embeds;
`mapper.unconditional()`, T(0) [1, {num_queries}, {d_model}]: its negative_prompt_embeds.
"""


def write(model: Trained, folder: Path, *, dtype: Any = None) -> int:
    """``mapper.safetensors`` under the original's names (129 tensors at full size), its module and sizes.

    Returns:
      number of tensors.
    """
    sizes, num_vokens = model.sizes["mapper"], model.num_vokens
    named = mapper.TABLE.to_source(model.below("mapper/"))
    values = {name: cast(np.asarray(value), dtype or np.float32) for name, value in named.items()}
    save_safetensors(folder / "mapper.safetensors", values, {"format": "pt"})
    shape = {"num_vokens": num_vokens, "voken_state_shift": model.voken_state_shift}
    write_json(folder / "config.json", {**dataclasses.asdict(sizes), **shape})
    shutil.copyfile(MODULE, folder / MODULE.name)
    text = README.format(num_vokens=num_vokens, width=sizes.llm_hidden_size, num_queries=sizes.num_queries,
                         d_model=sizes.d_model)  # fmt: skip
    (folder / "README.md").write_text(text)
    return len(values)
