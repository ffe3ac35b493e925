"""Rewriting published weights as a folder that ``config.weights`` takes: safetensors and a ``config.json``.

Nothing is computed: tensors keep their dtype; names change where a single file becomes a diffusers folder.
A folder appears whole under its name or not at all: it is made beside it as ``NAME.partial``, and one that
an interruption left there is made again.  What the parts of a model put into ``Origin.convert`` is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.models.clip_text.weights import TOWER as TEXT_ENCODER
from minigpt5_jax.models.eva_vit.weights import TOWER as EVA_VIT
from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.llama_proj.weights import TOWER as LLAMA_PROJ
from minigpt5_jax.models.qformer.weights import TOWER as QFORMER
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.models.unet.weights import TOWER as UNET
from minigpt5_jax.models.vae.weights import TOWER as VAE
from minigpt5_jax.weights.check import COVERAGE_FILE, Coverage, differing, examine, with_cause
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.foreign import ldm
from minigpt5_jax.weights.foreign.llama_tokenizer import model_of_json
from minigpt5_jax.weights.formats.files import read_json, read_small, why_missing
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.formats.save import save_safetensors, write_json
from minigpt5_jax.weights.table import Table, WeightTableError
from minigpt5_jax.weights.view import Tensors, made, rename, replaced

TOKENIZER = "tokenizer.model"
LLAMA_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "tokenizer.json",
)
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "trained_betas": None,
}
"""Scheduler of Stable Diffusion 2.1-base (fidelity 1.10); a single file has none."""
DIFFUSION: Mapping[str, Tower] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
SINGLE_FILE = {
    "unet": (ldm.UNET, ldm.unet),
    "vae": (ldm.VAE, ldm.vae),
    "text_encoder": (ldm.TEXT, ldm.text_encoder),
}
"""Tower -> start of its names in a single file, and their table."""
FOLDERS = (*DIFFUSION, "tokenizer", "scheduler")
TOWERS = {"llm": llama.TOWER, "vit": EVA_VIT, "qformer": QFORMER, "llama_proj": LLAMA_PROJ, **DIFFUSION}
"""What a file that does not fit may be instead."""


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name ``path`` when everything is in it.

    Raises:
      FileExistsError: there is something under that name.
    """
    if path.exists():
        raise FileExistsError(f"{path} is already there; delete it or choose another --output")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def convert_llama(name: str, tower: Tower, source: Path, output: Path, options: Any) -> list[Coverage]:
    """A folder of LLaMA, of MiniGPT-5's size unless ``options`` (:class:`ConvertOptions`) have sizes."""
    if options.sizes is None:
        require_preset(name, tower, tower.read_sizes(source / "config.json"))
    return [write_llm(open_weights(source), source, output, keep_rows=options.keep_rows)]


def convert_tower(name: str, tower: Tower, source: Path, output: Path, options: Any) -> list[Coverage]:
    """A folder of one tower, of MiniGPT-5's size unless ``options.sizes`` says otherwise."""
    sizes = tower.read_sizes(_sizes_file(source, options.sizes))
    if options.sizes is None:
        require_preset(name, tower, sizes)
    return [write_tower(name, tower, open_weights(source, tower.key), sizes, output)]


def _sizes_file(source: Path, given: str | None) -> Path | None:
    """The config.json with the sizes of a source; None for the preset."""
    if given not in (None, "source"):
        return Path(given)
    beside = source / "config.json" if source.is_dir() else source.parent / "config.json"
    return beside if given == "source" or (source.is_dir() and beside.is_file()) else None


def convert_diffusion(
    source: Path, output: Path, options: Any, *, open_tokenizer: Callable[[Path], Any]
) -> list[Coverage]:
    """A diffusers folder, of a diffusers folder or of one file of Stable Diffusion.

    Args:
      open_tokenizer: opens the folder of its tokenizer, so that none is passed on that cannot be read.

    Raises:
      WeightFileError: one file, and no tokenizer for it.
    """
    if source.is_dir():
        check_scheduler(source / "scheduler/scheduler_config.json")
        open_tokenizer(source / "tokenizer")
        return write_diffusers(source, output, any_size=options.sizes is not None)
    if options.tokenizer is None:
        raise WeightFileError(
            "one file holds no tokenizer: give --tokenizer FOLDER, tokenizer/ of a diffusers folder"
        )
    open_tokenizer(Path(options.tokenizer))
    weights = open_weights(source)
    sizes = Path(options.sizes) if options.sizes not in (None, "source") else None
    return write_single_file(weights, Path(options.tokenizer), output, sizes)


def check_scheduler(path: Path) -> NoiseSchedule:
    """Noise schedule in a ``scheduler_config.json`` of a diffusion model, which must predict noise.

    Raises:
      WeightFileError: it does not, as the 768-pixel Stable Diffusion 2.1; or the file is not there.
    """
    try:
        return NoiseSchedule.from_hf(read_json(path))
    except (OSError, ValueError) as error:
        raise WeightFileError(f"{path}: {error}") from None


def write_tower(
    name: str,
    tower: Tower,
    source: Tensors,
    sizes: Any,
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> Coverage:
    """The tensors a tower uses, its sizes and the coverage, into ``folder``.

    Args:
      name: of the tower under ``config.weights``.  tower: its record.  source: its tensors.
      sizes: the tower's.  config: the published ``config.json``; made of ``sizes`` where there is none.

    Raises:
      WeightTableError: keys, shapes or values that do not fit.
    """
    view, coverage = examine(name, tower, source, sizes, others=TOWERS, notes=notes)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / tower.file, view, {"format": "pt"})
    write_json(folder / "config.json", describe(tower, sizes) if config is None else config)
    write_json(folder / COVERAGE_FILE, coverage.to_json())
    return coverage


def require_preset(name: str, tower: Tower, sizes: Any) -> None:
    """Refuse sizes that are not those MiniGPT-5 stands on.

    Raises:
      WeightTableError: each number that differs, and what the file probably is.
    """
    if other := differing(sizes, tower.preset):
        width = getattr(sizes, "hidden_size", None)
        known = tower is llama.TOWER and width in llama.SIZES
        cause = f"\nlikely cause: LLaMA-{llama.SIZES[width]} in place of 7B" if known else ""
        raise WeightTableError(
            f"{name}: {'; '.join(other)}{cause}\nto convert it all the same: --sizes=source"
        )


def describe(tower: Tower, sizes: Any) -> dict[str, Any]:
    """A ``config.json`` of sizes, in the published field names."""
    of_diffusers = tower.library == "diffusers"
    return ({"_class_name": tower.class_name} if of_diffusers else {}) | tower.describe(sizes)


def write_llm(source: Tensors, folder: Path, output: Path, *, keep_rows: bool = False) -> Coverage:
    """A LLaMA folder: weights, configuration and tokenizer.

    Where there is ``tokenizer.json`` alone, ``tokenizer.model`` is made of it.

    Args:
      source: tensors of ``folder``.  output: folder to fill.
      keep_rows: keep rows that the tokenizer has no entry for.  By default they are left out, such as
        the ``[PAD]`` row that Vicuna v0's delta adds.

    Raises:
      WeightFileError: no ``config.json`` or ``tokenizer.model``, or one of another generation.
    """
    made = not os.path.lexists(folder / TOKENIZER) and (folder / "tokenizer.json").is_file()
    for name in ("config.json", "tokenizer.json" if made else TOKENIZER):
        if not (folder / name).is_file():
            raise WeightFileError(
                f"{folder} has no {name} ({why_missing(folder / name)}); fetch it with the weights"
            )
    refuse_vokens(folder)
    sizes, notes = llama.TOWER.read_sizes(folder / "config.json"), ()
    config = read_json(folder / "config.json")
    refuse_other_vicuna(config, folder / "config.json")
    if llama.EMBED not in source:
        raise WeightTableError(
            with_cause(f"{folder}: {llama.EMBED!r} is missing", "llm", llama.TOWER, source, TOWERS)
        )
    tokenizer = model_of_json(folder / "tokenizer.json") if made else read_small(folder / TOKENIZER)
    rows, entries = source[llama.EMBED].shape[0], tokenizer_entries(folder, tokenizer)
    if rows < entries:
        raise WeightTableError(f"{folder}: {rows} rows, but the tokenizer has {entries} entries")
    if rows > entries and not keep_rows:
        notes = (f"rows {entries} to {rows - 1} are left out: the tokenizer has {entries} entries",)
        cut = {key: lambda x: x[:entries] for key in (llama.EMBED, llama.HEAD)}  # Vicuna v0's [PAD] (1.5)
        source, rows = replaced(source, cut), entries
    sizes = dataclasses.replace(sizes, vocab_size=rows)
    coverage = write_tower(
        "llm", llama.TOWER, source, sizes, output, config={**config, "vocab_size": rows}, notes=notes
    )
    for name in LLAMA_FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, output / name)
    (output / TOKENIZER).write_bytes(tokenizer)
    return coverage


def tokenizer_entries(folder: Path, model: bytes) -> int:
    """Entries of a LLaMA tokenizer: its pieces, and what ``added_tokens.json`` puts behind them.

    Args:
      folder: of the tokenizer.  model: content of its ``tokenizer.model``.

    Raises:
      WeightFileError: a file is not what its name says.
    """
    import sentencepiece

    added, whole = folder / "added_tokens.json", folder / "tokenizer.json"
    try:
        more = list(read_json(added).values()) if added.is_file() else []
        if not (folder / TOKENIZER).exists():
            more += [token["id"] for token in read_json(whole).get("added_tokens", ())]
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        return max([pieces.vocab_size(), *(number + 1 for number in more)])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{folder}: its tokenizer cannot be read ({error}); fetch it again") from None


def refuse_vokens(path: Path) -> None:
    """Refuse a language model whose tokenizer has the vokens: others would be placed behind them.

    Args:
      path: its folder, or a file in it.

    Raises:
      WeightFileError: naming the file that lists ``[IMG0]``, and where to start from instead.
    """
    folder = path if path.is_dir() else path.parent
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file() and '"[IMG0]"' in read_small(folder / name).decode("utf-8", "replace"):
            raise WeightFileError(
                f"{folder} holds the vokens already ({name} lists [IMG0]): it is an export of a trained run, "
                "and a second set would be added beside the trained rows.  Start from that run with "
                "--config.run.init_from=WORKDIR, or generate from its checkpoint; for this key give the "
                "language model that it was trained on"
            )


def refuse_other_vicuna(config: Mapping[str, Any], path: Path) -> None:
    """Versions after v0 are other models with other prompts; they say so by name or by LLaMA-2's sizes.

    Raises:
      WeightFileError: ``config`` is one of them.
    """
    name = str(config.get("_name_or_path", "")).lower()
    later = next((version for version in ("v1.1", "v1.3", "v1.5") if version in name), None)
    if (positions := config.get("max_position_embeddings", 2048)) > 2048:
        later = later or f"on LLaMA-2 or later (v1.5): max_position_embeddings is {positions}, not 2048"
    if later:
        raise WeightFileError(
            f"{path}: this is Vicuna {later}; MiniGPT-4 and MiniGPT-5 stand on v0, and their weights fit no "
            "other (Vision-CAIR/vicuna-7b, or lmsys/vicuna-7b-delta-v0 applied to LLaMA-7B)"
        )


def write_diffusers(source: Path, output: Path, *, any_size: bool = False) -> list[Coverage]:
    """A diffusers folder of Stable Diffusion 2.1-base as safetensors, with today's names.

    Args:
      source: folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/, tensors in any form.
      output: folder to fill.  any_size: sizes may differ from the full-size presets.

    Raises:
      WeightFileError: a part is missing, or cannot be used.
    """
    for name in FOLDERS:
        if not (source / name).is_dir():
            raise WeightFileError(f"{source} has no {name}/; a diffusers folder has {', '.join(FOLDERS)}")
    found = []
    for name, tower in DIFFUSION.items():
        config = source / name / "config.json"
        sizes = tower.read_sizes(config)
        if not any_size:
            require_preset(name, tower, sizes)
        weights, values = open_weights(source / name), read_json(config)
        found.append(write_tower(name, tower, weights, sizes, output / name, config=values))
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(source / name, output / name)
    return found


def write_single_file(
    source: Tensors, tokenizer: Path, output: Path, sizes: Path | None = None
) -> list[Coverage]:
    """A Stable Diffusion 2.1-base checkpoint of one file as a diffusers folder.

    Args:
      source: its tensors.  tokenizer: folder of CLIP's tokenizer, which it lacks.
      output: folder to fill.  sizes: diffusers folder with the sizes; the full-size presets by default.

    Raises:
      WeightTableError: keys that belong to no part, and the likely cause.
    """
    if not tokenizer.is_dir():
        raise WeightFileError(f"{tokenizer} is no folder; give tokenizer/ of a diffusers folder")
    _refuse_other_diffusion(source)
    known, ignored = Table((), ldm.IGNORED), {}
    prefixes = {name: prefix for name, (prefix, _) in SINGLE_FILE.items()}
    parts: dict[str, list[str]] = {name: [] for name in prefixes}
    for key in source:
        owner = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), None)
        reason = known.reason(key)
        if reason is not None:
            ignored[key] = reason
        elif owner is None:
            raise WeightTableError(f"{getattr(source, 'path', 'the file')}: key {key!r} belongs to no part")
        else:
            parts[owner].append(key)
    found = []
    for name, keys in parts.items():
        numbers = DIFFUSION[name].read_sizes(sizes / name / "config.json" if sizes else None)
        table = SINGLE_FILE[name][1](numbers)
        part = rename(table, made(source, keys, source.__getitem__))
        coverage = write_tower(name, DIFFUSION[name], part, numbers, output / name)
        dropped = {key: reason for key in keys if (reason := table.reason(key)) is not None}
        found.append(dataclasses.replace(coverage, ignored={**coverage.ignored, **dropped}))
    found[0] = dataclasses.replace(found[0], ignored={**found[0].ignored, **ignored})
    (output / "scheduler").mkdir()
    scheduler = sizes / "scheduler/scheduler_config.json" if sizes else None
    values = read_json(scheduler) if scheduler else SCHEDULER
    write_json(output / "scheduler/scheduler_config.json", values)
    shutil.copytree(tokenizer, output / "tokenizer")
    return found


def _refuse_other_diffusion(source: Tensors) -> None:
    """Other generations of Stable Diffusion, told by their keys or by the file's name."""
    path = str(getattr(source, "path", ""))
    cause = ""
    if any(key.startswith("cond_stage_model.transformer.text_model.") for key in source):
        cause = "this is Stable Diffusion 1.x"
    elif any(key.startswith("conditioner.embedders.") for key in source):
        cause = "this is Stable Diffusion XL"
    elif not any(key.startswith(ldm.TEXT) for key in source):
        cause = "it has no OpenCLIP text encoder (cond_stage_model.model.*)"
    elif "768" in Path(path).name:
        cause = "its name says that it is the 768-pixel model, which predicts v"
    if cause:
        raise WeightTableError(f"{path or 'the file'}: {cause}; MiniGPT-5 draws with 2.1-base, v2-1_512-*")
