"""The generator as a diffusers pipeline folder, with the mapper beside it and an example of using both."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt5_jax.models.tower import Tower
from minigpt5_jax.weights.export.model import ExportableModel, PretrainedTower
from minigpt5_jax.weights.foreign.rewrite import describe
from minigpt5_jax.weights.formats.load import cast
from minigpt5_jax.weights.formats.save import save_safetensors, write_json
from minigpt5_jax.weights.view import View

EXAMPLE = Path(__file__).with_name("torch_example.py")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
TOKENIZER = ["transformers", "CLIPTokenizer"]
ABSENT = ("feature_extractor", "image_encoder", "safety_checker")
"""Parts that diffusers' pipelines may have and ours have not."""


def write(
    model: ExportableModel, folder: Path, *, uses: Mapping[str, Any], pipeline: str, dtype: Any = None
) -> int:
    """A folder that ``DiffusionPipeline.from_pretrained`` loads, and the mapper; returns how many tensors.

    Args:
      uses: the generator's files (``parts.contracts.Use``) by their names under ``config.weights``.
      pipeline: class of diffusers that the folder is for.
      dtype: of all tensors; by default that of the frozen ones (the mapper's is float32).
    """
    count, index = 0, {"_class_name": pipeline, "requires_safety_checker": False}
    for name, use in uses.items():
        inner, tower = folder / use.subfolder, use.tower
        inner.mkdir()
        if tower is None:
            _copy_tokenizer(model.paths[name], inner)
            index[use.subfolder] = TOKENIZER
            continue
        values = describe(tower, model.sizes[name])
        if tower.library == "transformers":  # special ids of captions
            values |= model.caption_ids
        write_json(inner / tower.config_file, values)
        index[use.subfolder] = [tower.library, tower.class_name]
        if name in model.towers:
            named = _published(tower, model.towers[name], dtype)
            save_safetensors(inner / tower.file, named, {"format": "pt"})
            count += len(named)
    (folder / "mapper").mkdir()
    count += model.writers["mapper"](model, folder / "mapper", dtype=dtype)
    write_json(folder / "model_index.json", index | {name: [None, None] for name in ABSENT})
    shutil.copyfile(EXAMPLE, folder / "example.py")
    return count


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _published(tower: Tower, tensors: PretrainedTower, dtype: Any) -> View:
    """A tower's tensors under the names of published files, whose start some sources leave out."""
    readers = {}
    for key in tensors:
        name = key if key.startswith(tower.bare_prefix) else tower.bare_prefix + key
        readers[name] = lambda key=key: cast(tensors[key], dtype)
    return View(tensors, readers)
