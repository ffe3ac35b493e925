"""The small world's backbones on disk: the files of LLaMA, MiniGPT-4 and Stable Diffusion, in 16 bit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minigpt5_jax.models.clip_text.weights import TOWER as TEXT_ENCODER
from minigpt5_jax.models.common import Params
from minigpt5_jax.models.eva_vit.weights import TOWER as EVA_VIT
from minigpt5_jax.models.llama.weights import TOWER as LLAMA
from minigpt5_jax.models.llama_proj.weights import TOWER as LLAMA_PROJ
from minigpt5_jax.models.qformer.weights import TOWER as QFORMER
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.models.unet.weights import TOWER as UNET
from minigpt5_jax.models.vae.weights import TOWER as VAE
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.foreign.rewrite import SCHEDULER
from minigpt5_jax.weights.formats.load import load_tower, open_weights
from minigpt5_jax.weights.formats.save import save_safetensors, write_json

ASSETS = Path(__file__).parent / "assets"
PROVENANCE = "PROVENANCE.json"
TRAINED = Path(__file__).parent / "trained"
"""The trained run that ships, as ``save_pretrained`` wrote it; it says and checks its own hashes."""
STORED = np.float16

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


@dataclasses.dataclass(frozen=True)
class TowerFiles:
    """Where a tower lies and how.

    Attributes:
      tower: sizes and tables, the same as of the full-size tower.  folder: of the weights.
      extra: what its ``config.json`` says besides its sizes.
    """

    tower: Tower
    folder: str
    extra: Mapping[str, Any]


TOWERS = {
    "llama": TowerFiles(
        LLAMA,
        "llama",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
    ),
    "vit": TowerFiles(EVA_VIT, "eva_vit", {"model_type": "blip_2_vision_model"}),
    "qformer": TowerFiles(QFORMER, "qformer", {"model_type": "blip_2_qformer"}),
    "llama_proj": TowerFiles(LLAMA_PROJ, "llama_proj", {}),
    "text_encoder": TowerFiles(
        TEXT_ENCODER,
        "sd/text_encoder",
        {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "pad_token_id": 0,
            "attention_dropout": 0.0,
            "torch_dtype": "float16",
        },
    ),
    "unet": TowerFiles(
        UNET,
        "sd/unet",
        {"_class_name": "UNet2DConditionModel", "use_linear_projection": True, "act_fn": "silu"},
    ),
    "vae": TowerFiles(VAE, "sd/vae", {"_class_name": "AutoencoderKL"}),
}


def write_tower(assets: Path, name: str, params: Params, config: Any, prefix: str = "") -> None:
    """Configuration and weights of one tower, found below ``prefix``; rows of new tokens are left out."""
    files = TOWERS[name]
    values = files.extra | dataclasses.asdict(config)
    if name == "text_encoder":  # the tokenizer's last two
        values |= {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    if name == "vae":
        values |= files.tower.describe(config)
    write_json(assets / files.folder / "config.json", values)
    kept = {
        path.removeprefix(prefix): np.asarray(value, STORED)
        for path, value in params.items()
        if path.startswith(prefix) and not path.endswith("/voken")
    }
    like = (files.tower.bare_prefix,)  # tells a tower with two tables which names are written
    source = files.tower.table(like, config).to_source(kept)
    save_safetensors(assets / files.folder / files.tower.file, source, {"format": "pt"})


def write_scheduler(assets: Path) -> None:
    """Scheduler and index of the diffusers folder."""
    write_json(assets / "sd/scheduler/scheduler_config.json", SCHEDULER)
    write_json(assets / "sd/model_index.json", MODEL_INDEX)


def read_config(assets: Path, name: str) -> Any:
    """Configuration of a written tower.

    Raises:
      FileNotFoundError: naming the part that is to be trained first.
    """
    path = assets / TOWERS[name].folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: train that part first (python -m minigpt5_jax.shapes.backbones.pretrain)"
        )
    return TOWERS[name].tower.read_sizes(path)


def read_tower(assets: Path, name: str, prefix: str = "") -> Params:
    """Parameters of a written tower in float32, below ``prefix``."""
    files, config = TOWERS[name], read_config(assets, name)
    source = open_weights(assets / files.folder)
    params = load_tower(files.tower.table(source, config), source, files.tower.shapes(config), np.float32)
    return {prefix + path: jnp.asarray(value) for path, value in params.items()}


def hashes(assets: Path) -> dict[str, str]:
    """SHA-256 of every file but the provenance itself, by path."""
    files = sorted(path for path in assets.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {p.relative_to(assets).as_posix(): _sha256(p) for p in files}


def genuine(assets: Path, name: str) -> Path:
    """A file or folder of the assets, every file of it as ``PROVENANCE.json`` has it.

    Raises:
      WeightFileError: one is missing or altered: its path, both hashes, and how to have it again.
    """
    for path, known in _recorded(assets).items():
        if path != name and not path.startswith(f"{name}/"):
            continue
        file = assets / path
        if not file.is_file():
            raise WeightFileError(f"packaged file {file} is missing; {_AGAIN}")
        stat = file.stat()
        found = _sha256_of(file, stat.st_size, stat.st_mtime_ns)
        if found != known:
            raise WeightFileError(
                f"packaged file {file} is altered: its SHA-256 is {found}, {PROVENANCE} has {known}; {_AGAIN}"
            )
    if not (assets / name).exists():
        raise WeightFileError(f"packaged file {assets / name} is missing; {_AGAIN}")
    return assets / name


_AGAIN = (
    "reinstall minigpt5_jax, or train it again with "
    "`python -m minigpt5_jax.shapes.backbones.pretrain --config configs/shapes_backbones.py`"
)


def _recorded(assets: Path) -> dict[str, str]:
    path = assets / PROVENANCE
    try:
        return dict(json.loads(path.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightFileError(f"{path} is missing or no record of hashes ({error!r}); {_AGAIN}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Hash of a file that is asked several times; size and time of change tell that it is the same."""
    return _sha256(path)
