"""The feature mapper with a PyTorch module that needs nothing but torch and safetensors."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5_jax.models.decoder_only_mapper import DecoderOnlyMapperConfig
from minigpt5_jax.models.mapper import MapperConfig
from minigpt5_jax.weights.export.model import Trained, cast
from minigpt5_jax.weights.maps import decoder_only_mapper, mapper
from minigpt5_jax.weights.rewrite import write_json
from minigpt5_jax.weights.save import save_safetensors

MODULE = "torch_mapper.py"
FORMS = {
    MapperConfig: (mapper.TABLE, MODULE),
    DecoderOnlyMapperConfig: (decoder_only_mapper.TABLE, "torch_decoder_only_mapper.py"),
}
"""Kind of mapper -> its names in PyTorch, and the source of its module, which goes out as ``MODULE``."""
README = """\
Feature mapper of MiniGPT-5, exported from minigpt5_jax.
`torch_mapper.py` is all the code it needs besides torch and safetensors:
`from torch_mapper import FeatureMapper; mapper = FeatureMapper.from_folder(".")`
`mapper(states)`, [n, {num_vokens}, {width}] -> [n, {num_queries}, {d_model}]: the generator's prompt_embeds;
`mapper.unconditional()`, T(0) [1, {num_queries}, {d_model}]: its negative_prompt_embeds.
"""


def write(model: Trained, folder: Path, *, dtype: Any = None) -> int:
    """``mapper.safetensors`` under PyTorch's names (the original's 129 at full size), its module and sizes.

    Returns:
      number of tensors.
    """
    sizes, num_vokens = model.sizes["mapper"], model.num_vokens
    table, module = FORMS[type(sizes)]
    named = table.to_source(model.below("mapper/"))
    values = {name: cast(np.asarray(value), dtype or np.float32) for name, value in named.items()}
    save_safetensors(folder / "mapper.safetensors", values, {"format": "pt"})
    shape = {"num_vokens": num_vokens, "voken_state_shift": model.voken_state_shift}
    write_json(folder / "config.json", {**dataclasses.asdict(sizes), **shape})
    shutil.copyfile(Path(__file__).with_name(module), folder / MODULE)
    text = README.format(
        num_vokens=num_vokens,
        width=sizes.llm_hidden_size,
        num_queries=sizes.num_queries,
        d_model=sizes.d_model,
    )
    (folder / "README.md").write_text(text)
    return len(values)
