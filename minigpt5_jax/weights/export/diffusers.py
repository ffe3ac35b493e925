"""The generator as a diffusers pipeline folder, with the mapper beside it and an example of using both."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from minigpt5_jax.weights.export import mapper
from minigpt5_jax.weights.export.model import PretrainedTower, Trained, cast
from minigpt5_jax.weights.maps import clip_text
from minigpt5_jax.weights.rewrite import DIFFUSERS_FILE, SCHEDULER, describe, write_json
from minigpt5_jax.weights.save import save_safetensors
from minigpt5_jax.weights.view import View

EXAMPLE = Path(__file__).with_name("torch_example.py")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def configs(model: Trained) -> dict[str, dict[str, Any]]:
    """``config.json`` of each tower."""
    vae = describe("vae", model.sizes["vae"])
    levels = len(vae["block_out_channels"])
    vae |= {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        **dataclasses.asdict(model.sizes["text_encoder"]),
        **model.caption_ids,
    }
    return {"unet": describe("unet", model.sizes["unet"]), "vae": vae, "text_encoder": text}


def write(model: Trained, folder: Path, *, dtype: Any = None) -> int:
    """A folder that ``StableDiffusionPipeline.from_pretrained`` loads, ``mapper/`` and ``example.py``.

    Args:
      dtype: of all tensors; by default that of the frozen ones (the mapper's is float32).

    Returns:
      number of tensors.
    """
    count = 0
    for name, values in configs(model).items():
        file = "model.safetensors" if name == "text_encoder" else DIFFUSERS_FILE
        named = _published(name, model.towers[name], dtype)
        save_safetensors(folder / name / file, named, {"format": "pt"})
        write_json(folder / name / "config.json", values)
        count += len(named)
    for name in ("scheduler", "tokenizer", "mapper"):
        (folder / name).mkdir()
    write_json(folder / "scheduler/scheduler_config.json", {**SCHEDULER, **model.scheduler})
    for name in TOKENIZER_FILES:
        if (model.clip_tokenizer / name).is_file():
            shutil.copyfile(model.clip_tokenizer / name, folder / "tokenizer" / name)
    count += mapper.write(model, folder / "mapper", dtype=dtype)
    write_json(folder / "model_index.json", MODEL_INDEX)
    shutil.copyfile(EXAMPLE, folder / "example.py")
    return count


def _published(name: str, tower: PretrainedTower, dtype: Any) -> View:
    """A tower's tensors under the names of published files; transformers 5 drops ``text_model.`` from the
    text encoder's."""
    readers = {}
    for key in tower:
        bare = name == "text_encoder" and not key.startswith(clip_text.PREFIX)
        readers[clip_text.PREFIX + key if bare else key] = lambda key=key: cast(tower[key], dtype)
    return View(tower, readers)
