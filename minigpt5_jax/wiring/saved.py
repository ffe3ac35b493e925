"""A trained model as a folder that describes itself: what ``save_pretrained`` writes and every reader takes.

    config.json        format, step, configuration, hashes of the frozen towers it stands on
    model.safetensors  what was trained, by the paths of the parameters
    tokenizer.model    the language model's tokenizer
    README.md          model card: how to use it, what it stands on, and the licences of that

Frozen towers are not in it: they are read from their sources (``config.weights``) and compared by hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from minigpt5_jax.config import PACKAGED, ConfigError, get_config, keys_of, parts_of
from minigpt5_jax.config.paths import local_path
from minigpt5_jax.shapes.files import TRAINED
from minigpt5_jax.training.checkpoint import first_lines
from minigpt5_jax.training.provenance import CheckpointError, Meta, plain, stage_of
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json
from minigpt5_jax.weights.formats.hub import resolve
from minigpt5_jax.weights.formats.load import cast, open_weights
from minigpt5_jax.weights.formats.save import save_sharded, write_json
from minigpt5_jax.wiring.model import not_pretrained
from minigpt5_jax.wiring.model_card import model_card
from minigpt5_jax.wiring.session import LoadedModel
from minigpt5_jax.wiring.weight_paths import find_source

CONFIG, CARD = "config.json", "README.md"
MODEL_TYPE = "minigpt5_jax"
DTYPES = (None, "float32", "float16", "bfloat16")
VERSION = 1
"""Of the format; a folder of a newer one is refused."""
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder is one of these."""
    file = folder / CONFIG
    try:
        return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE
    except (WeightFileError, AttributeError):  # the configuration of something else
        return False


def find_folder(path: str | Path) -> Path:
    """The folder that a name means: ``shapes`` for the packaged run, a local folder, else a Hugging Face id.

    Nothing is downloaded.

    Raises:
      ConfigError: an address of object storage.
      CheckpointError: a Hugging Face id that is not in the local cache, and how to fetch it; the packaged run
        is not there.
    """
    if str(path) == PACKAGED:
        if not is_saved(TRAINED):
            raise CheckpointError(f"the packaged model {TRAINED} is missing; reinstall minigpt5_jax")
        return TRAINED
    folder = Path(local_path(str(path)))
    if folder.exists():
        return folder
    try:
        return resolve(path, fetch=False)
    except FileNotFoundError:  # not of the form of an id
        return folder
    except WeightFileError as error:
        raise CheckpointError(f"no run or saved model: {error}") from None


class SavedModel:
    """Reads such a folder as :class:`~minigpt5_jax.training.checkpoint.Checkpoints` reads a run's.

    Args:
      folder: one for which :func:`is_saved` holds.

    Raises:
      CheckpointError: it was written by a newer version, or its configuration lacks something.
    """

    def __init__(self, folder: Path):
        self.directory = folder.absolute()
        self._about: Mapping[str, Any] = read_json(folder / CONFIG)
        version = self._about.get("format_version")
        if not isinstance(version, int):
            raise CheckpointError(f"{folder / CONFIG} does not say its format_version; save the model again")
        if version > VERSION:
            raise CheckpointError(
                f"{folder} was saved by a newer version of minigpt5_jax (format {version}; this one reads up "
                f"to {VERSION}): update your checkout of minigpt5_jax and install it again"
            )
        if missing := {"step", "run", "inherited", "sha256"} - self._about.keys():
            raise CheckpointError(
                f"{folder / CONFIG} lacks {', '.join(sorted(missing))}; save the model again"
            )
        _check_code(self._about["run"], self.directory)
        self.latest_step: int = self._about["step"]
        self.steps = [self.latest_step]

    def newest_readable(self) -> int:
        """Its only step."""
        return self.latest_step

    def meta(self, step: int | None = None) -> Meta:
        """Description of the run, its tokenizer that of the folder; CheckpointError for another step."""
        self._check(step)
        meta = plain(self._about["run"])
        # Programs that are kept there are run: not from where somebody else's file says.
        meta["config"]["run"]["compile_cache"] = keys_of(get_config())["run.compile_cache"].default
        if name := self._about.get("tokenizer"):
            meta["config"]["weights"][name] = str(self.directory)
        return meta

    def fingerprint(self, step: int) -> str:
        """SHA-256 of its weights."""
        self._check(step)
        return hashlib.sha256("".join(sorted(self._about["sha256"].values())).encode()).hexdigest()

    def paths(self, part: str, step: int | None = None) -> tuple[str, ...]:
        """Paths of ``inherited`` parameters: pretrained ones that the run had in a form of its own."""
        self._check(step)
        return tuple(self._about["inherited"]) if part == "inherited" else ()

    def restore(
        self, like: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]], step: int | None = None
    ) -> tuple[dict[str, dict[str, jax.Array]], int, Meta]:
        """(parts as ``like``, 0, description of the run); arrays in the dtypes and places of ``like``.

        Raises:
          CheckpointError: files are not those that were written, or of another model.
        """
        self._check(step)
        for name, known in self._about["sha256"].items():
            file = self.directory / name
            if not file.is_file() or _sha256(file) != known:
                what = "is missing" if not file.is_file() else "is not what was saved: its SHA-256 differs"
                raise CheckpointError(f"{file} {what}; take the folder from a copy")
        tensors = open_weights(self.directory)
        wanted = {path: leaf for part in like.values() for path, leaf in part.items()}
        problems = [f"{path} is in the folder only" for path in tensors.keys() - wanted.keys()]
        problems += [f"{path} is not in the folder" for path in wanted.keys() - tensors.keys()]
        problems += [
            f"{path} is {list(tensors[path].shape)} in the folder, {list(leaf.shape)} here"
            for path, leaf in wanted.items()
            if path in tensors and tensors[path].shape != leaf.shape
        ]
        if problems:
            raise CheckpointError(f"{self.directory} is of another model:\n" + first_lines(sorted(problems)))

        def placed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.asarray(tensors[path]).astype(leaf.dtype), leaf.sharding)

        parts = {
            name: {path: placed(path, leaf) for path, leaf in part.items()} for name, part in like.items()
        }
        return parts, 0, self.meta()

    def close(self) -> None:
        """Nothing is held open."""

    def _check(self, step: int | None) -> None:
        if step not in (None, self.latest_step):
            raise CheckpointError(f"{self.directory} has no step {step}; it has [{self.latest_step}]")


def save_model(
    model: LoadedModel,
    meta: Meta,
    folder: str | Path,
    *,
    inherited: Collection[str] = (),
    dtype: str | None = None,
) -> Path:
    """Write a model's trained part with all that describes it; an earlier one in the folder is replaced.

    Args:
      model: :func:`as_stored` in ``dtype``.
      meta: its description (:func:`~minigpt5_jax.wiring.restore.describe`).
      folder: made if need be.
      inherited: pretrained parameters that the model has in a form of its own, to be written too.
      dtype: of floating tensors (``float16`` halves the file); by default as they are.

    Raises:
      FileExistsError: the folder holds other things.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and (is_saved(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} holds other things than a saved model; choose another folder")
    own = {path: model.params[path] for path in sorted(own_paths(model, inherited))}
    kind = None if dtype is None else jnp.dtype(dtype)
    files = save_sharded(
        folder,
        {path: cast(np.asarray(value), kind) for path, value in own.items()},
        {"format": "flax"},
    )
    config = portable(model.config)
    write_json(
        folder / CONFIG,
        {
            "model_type": MODEL_TYPE,
            "format_version": VERSION,
            "step": model.step,
            "tokenizer": _copy_tokenizer(model.config, folder),
            "inherited": sorted(inherited),
            "sha256": {file.name: _sha256(file) for file in files},
            "run": {**meta, "config": plain(config.to_dict())},
        },
    )
    (folder / CARD).write_text(model_card(config, meta, model.step, own), "utf-8")
    return folder


def own_paths(model: LoadedModel, inherited: Collection[str]) -> list[str]:
    """Paths of what a saved model holds: everything that no source of frozen weights has."""
    return [path for path in model.params if not_pretrained(path, model.spec) or path in inherited]


def as_stored(model: LoadedModel, inherited: Collection[str], dtype: str | None) -> LoadedModel:
    """A model as it is once it was saved: what it holds rounded to ``dtype``, so that hashes are of that.

    Layers that a session has taken apart are joined again.

    Raises:
      ConfigError: a dtype that no floating number is stored in, or whose range a number leaves.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(one) for one in DTYPES if one)
        raise ConfigError(f"dtype {dtype!r} is not one of {known}")
    params = {
        path: jnp.stack(value) if isinstance(value, tuple) else value for path, value in model.params.items()
    }
    if dtype is not None:
        params |= {
            path: params[path].astype(dtype).astype(params[path].dtype)
            for path in own_paths(model, inherited)
            if jnp.issubdtype(params[path].dtype, jnp.floating)
        }
        if wrong := [path for path in own_paths(model, inherited) if not jnp.isfinite(params[path]).all()]:
            raise ConfigError(f"{wrong[0]} does not fit into {dtype}; save it as bfloat16 or float32")
    return dataclasses.replace(model, params=params)


def portable(config: ConfigDict) -> ConfigDict:
    """A configuration whose paths are defaults, but for those of weights.

    Local weights keep their absolute paths, so that the folder opens on this machine; Hugging Face ids and
    ``shapes`` are what they are.
    """
    config = config.copy_and_resolve_references()
    config.tuning.stage = f"stage{stage_of(config.to_dict())}"  # run.init_from, which also tells, is left out
    for key, described in keys_of(config).items():
        section, _, name = key.rpartition(".")
        if section in ("run", "data") and (described.path or key == "run.compile_cache"):
            config[section][name] = described.default
    for name, value in config.weights.items():
        if value and value != PACKAGED and Path(value).expanduser().exists():
            config.weights[name] = str(Path(value).expanduser().absolute())
    return config


def _check_code(run: Meta, folder: Path) -> None:
    """Refuse a part whose code would come out of the folder itself: opening a model runs nothing of it."""
    for kind, keys in run["config"]["model"].items():
        name = keys.get("name", "") if isinstance(keys, Mapping) else ""
        package = name.partition(".")[0]
        if "." not in name or package in sys.modules:
            continue
        found = importlib.util.find_spec(package)
        origin = found.origin if found is not None else None
        if origin and Path(origin).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder}: the {kind} {name!r} is code that came with the model, which is never run; read "
                "it, and install it somewhere else if you trust it"
            )


def _copy_tokenizer(config: ConfigDict, folder: Path) -> str:
    """Name under ``weights`` of the backbone's tokenizer, whose files are copied; '' where it has none."""
    name = parts_of(config)["backbone"].tokenizer_use
    if not name:
        return ""
    source = find_source(config, name)
    files: Iterable[Path] = [source]
    if source.is_dir():
        files = sorted(file for pattern in TOKENIZER_FILES for file in source.glob(pattern))
    for file in files:
        if file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    return name


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
