"""Where the frozen weights of a model lie, and whether they are those that its configuration means.

Nothing of a tower is read here but the small JSON files beside it, so a wrong or missing source is reported
before anything is built or compiled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config import PACKAGED, ConfigError, part_settings, parts_of, weight_sources
from minigpt5_jax.parts.contracts import Use
from minigpt5_jax.shapes.files import ASSETS, genuine
from minigpt5_jax.weights.check import differing, quantized_already
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json, why_missing
from minigpt5_jax.weights.formats.hub import resolve

SINGLE_FILES = (".pth", ".pt", ".ckpt")  # published alone; a config.json beside one may be another tower's


def uses_of(config: ConfigDict) -> dict[str, tuple[str, Use]]:
    """Name under ``weights`` -> (kind of the part, files) of everything the chosen parts know."""
    return {name: (kind, use) for kind, part in parts_of(config).items() for name, use in part.uses.items()}


def needed_sources(config: ConfigDict) -> tuple[str, ...]:
    """Names under ``weights`` that this configuration cannot train without."""
    settings = part_settings(config)
    return tuple(name for kind, part in parts_of(config).items() for name, _ in part.used(settings[kind]))


def source_path(use: Use, value: str) -> Path:
    """Where a source lies: a local path, else a Hugging Face id that is in the local cache.

    ``shapes`` is the packaged small world.  Nothing is downloaded; what is nowhere keeps its name.

    Raises:
      WeightFileError: a packaged file is missing or altered.
    """
    if value == PACKAGED:
        return genuine(ASSETS, use.packaged)
    try:
        return resolve(value, fetch=False)
    except (FileNotFoundError, WeightFileError):
        return Path(value).expanduser()


def why_absent(value: str) -> str:
    """Why nothing is found where a source is said to be."""
    try:
        return f"{resolve(value, fetch=False)} has just appeared"
    except FileNotFoundError:
        return why_missing(Path(value).expanduser())
    except WeightFileError as error:  # of a name that may be one on the hub
        return f"{value} does not exist here; {str(error).partition(chr(10))[0]}"


def find_source(config: ConfigDict, name: str) -> Path:
    """Where the source called ``name`` lies, whether it is there or not; a file that is meant in a folder."""
    _, use = uses_of(config)[name]
    path = source_path(use, weight_sources(config)[name])
    return path / use.file if use.file and path.is_dir() else path


def find_sources(config: ConfigDict, names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """(path of each source that is there, a line or two on each that is not and how to get it)."""
    given, uses = weight_sources(config), uses_of(config)
    paths: dict[str, Path] = {}
    problems = []
    for name in names:
        path = source_path(uses[name][1], given[name]) if given[name] else None
        if path is None or not path.exists():
            where = "not given" if path is None else why_absent(given[name])
            problems.append(f"  weights.{name}: {where}\n      {uses[name][1].get}")
        else:
            paths[name] = find_source(config, name)
    return paths, problems


def check_sources(
    config: ConfigDict, unused: Collection[str] = (), only: Collection[str] | None = None, remedy: str = ""
) -> dict[str, Path]:
    """Path of every needed source.

    Args:
      unused: names under ``weights`` that are not looked for.
      only: the only ones that are, whether ``unused`` or not.
      remedy: how to say where sources are, for the message; by default the flags of training.

    Raises:
      ConfigError: naming each source that is not given or not there, and how to get it; or a file beside a
        source that is not the preset's (:func:`check_preset`).
      WeightFileError: a source is of another model, as its part says (``Use.check``).
    """
    names = [name for name in needed_sources(config) if name not in unused] if only is None else only
    paths, problems = find_sources(config, names)
    if problems:
        folders = "".join(
            f" (weights.{group}=FOLDER: {', '.join(name for name, use in part.uses.items() if use.group)})"
            for part in parts_of(config).values()
            for group in part.groups
        )
        raise ConfigError(
            "these weights are missing:\n"
            + "\n".join(problems)
            + "\n"
            + (
                remedy
                or "Set each with --config.weights.NAME=PATH, or =ORG/NAME once `hf download ORG/NAME` has "
                f"downloaded it{folders}, or look at the model without weights: --dry_run"
            )
        )
    for name, path in paths.items():
        check_preset(config, name, path, remedy)
    return paths


def check_given(config: ConfigDict) -> None:
    """Errors as :func:`check_preset`, of the sources that are there; those that are not given are none."""
    for name, path in find_sources(config, needed_sources(config))[0].items():
        check_preset(config, name, path)


def sizes_file(use: Use, path: Path) -> Path:
    """The JSON file with the sizes of a source."""
    return (path if path.is_dir() else path.parent) / use.tower.config_file


def check_preset(config: ConfigDict, name: str, path: Path, remedy: str = "") -> None:
    """Compare the sizes that lie beside a source with the preset that is chosen for it.

    Shapes of tensors do not say everything: another epsilon, number of heads or noise schedule fits too.

    Args:
      name: as under ``config.weights``.  path: where the source lies.
      remedy: what to do where the preset cannot be changed any more; by default the flag of training.

    Raises:
      ConfigError: the file, each field that differs with both values, and what to do.
      WeightFileError: the file is no JSON, or has a value that is not implemented; or the source is quantised
        already, or holds what a run adds to it (``Use.refuse``).
    """
    kind, use = uses_of(config)[name]
    if use.refuse is not None:
        use.refuse(path)
    chosen = config.model[kind].get(name)
    if use.tower is None or chosen is None or path.suffix in SINGLE_FILES:
        return
    file = sizes_file(use, path)
    if not file.is_file():
        return
    if "quantization_config" in (values := read_json(file)):
        raise WeightFileError(f"{file}: {quantized_already(values['quantization_config'])}")
    if use.tower.table is None:  # it is nothing but sizes: what is not implemented is refused in any case
        use.tower.read_sizes(file)
    if chosen in ("source", "none"):
        return
    problems = differing(use.tower.read_sizes(file), use.tower.presets[chosen])
    if use.check is not None:
        try:
            use.check(values, file)
        except WeightFileError as error:
            problems.append(str(error).removeprefix(f"{file}: "))
    if problems:
        key = f"model.{kind}.{name}"
        raise ConfigError(
            f"{file} does not fit {key}={chosen!r}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\nGive weights.{name} as {use.get}"
            + (f".  {remedy}" if remedy else f", or take the file's own values: --config.{key}=source")
        )


def read_config(config: ConfigDict, name: str) -> dict[str, Any]:
    """The JSON file of sizes beside a source.

    Raises:
      ConfigError: the source is not given, or has no such file.
    """
    _, use = uses_of(config)[name]
    value = weight_sources(config)[name]
    if not value:
        raise ConfigError(f"sizes of {name} come from its source, but weights.{name} is not given")
    file = sizes_file(use, source_path(use, value))
    if not file.is_file():
        raise ConfigError(f"weights.{name}: no {file.name} in {file.parent}")
    return read_json(file)
