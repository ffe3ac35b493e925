"""What a configuration needs on disk: every source, whether it is there and fits, and how to get the rest.

``python -m minigpt5_jax.convert plan --config FILE`` prints it.  Files that are there are opened and compared
with the model by names and shapes; their values are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, weight_sources
from minigpt5_jax.parts.contracts import Origin, Use
from minigpt5_jax.weights.check import examine
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.foreign.release import RELEASE_FILES
from minigpt5_jax.weights.formats.hub import resolve
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.wiring.model import build, known_towers, tower_sizes
from minigpt5_jax.wiring.weight_paths import check_preset, needed_sources, sizes_file, source_path, uses_of

RELEASE = Origin(**RELEASE_FILES)
FOLDER = "weights"
"""Where the commands put things."""


def make_plan(config: ConfigDict) -> str:
    """The plan as text: a block for each origin, then the flags that name what was fetched.

    Raises:
      ConfigError: a setting that no model can be made of.
    """
    needed, given, uses = needed_sources(config), weight_sources(config), uses_of(config)
    sizes, why = None, ""
    try:
        sizes = tower_sizes(config)
    except (OSError, ValueError) as error:  # sizes come from sources that are not there yet
        why = str(error)
    status = {name: source_status(config, name, given[name], sizes) for name in needed}
    lines, missing = [], []
    for origin, names in _by_origin({name: uses[name][1].origin for name in needed}):
        lines += _block(origin, {name: status[name] for name in names})
        if any(not status[name][0] for name in names):
            missing.append(origin)
    if sizes is not None:
        lines += ["", f"In memory: {held(config)}"]
    lines += ["", "MiniGPT-5's own weights, to generate without training:", *_about(RELEASE), ""]
    total = sum(origin.gigabytes for origin in missing)
    if not missing and sizes is None:
        lines.append(f"Everything is on disk, but nothing was compared, for the sizes are not known: {why}")
        return "\n".join(lines)
    if not missing:
        return "\n".join([*lines, "Everything that this configuration needs is on disk and fits."])
    flags = " ".join(f"--config.weights.{o.command}={FOLDER}/{o.command}" for o in missing)
    how_much = f"To fetch: {total:.1f} GB, and as much again while it is converted.  Then give:"
    return "\n".join([*lines, how_much, f"  {flags}"])


def held(config: ConfigDict) -> str:
    """Bytes of each pretrained tower as this configuration holds it, in a line."""
    spec = build(config)
    sizes = {}
    for name, part, use in spec.towers():
        arrays = [spec.template.shapes[path] for path in spec.paths_of(part, use)]
        method = part.quantization(name, spec.keys[part.kind])
        form = config.model.param_dtype if method == "none" else method
        sizes[f"{name} ({form})"] = sum(array.size * array.dtype.itemsize for array in arrays) / 1e9
    return ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())


def _by_origin(needed: Mapping[str, Origin]) -> list[tuple[Origin, list[str]]]:
    groups: dict[str, tuple[Origin, list[str]]] = {}
    for name, origin in needed.items():
        groups.setdefault(origin.command, (origin, []))[1].append(name)
    return list(groups.values())


def _block(origin: Origin, status: dict[str, tuple[bool, str]]) -> Iterator[str]:
    """What it is, the state of each name, and the commands if something is missing."""
    yield from ("", origin.title)
    for name, (_, text) in status.items():
        yield f"  weights.{name}: {text}"
    if all(there for there, _ in status.values()):
        return
    yield from _about(origin)
    raw = f"{FOLDER}/raw/{origin.command}"
    given = raw if origin.repos else f"{raw}/{origin.files[0]}"
    target = f"{FOLDER}/{origin.command}"
    yield f"  convert: python -m minigpt5_jax.convert {origin.command} {given} --output {target}"


def _about(origin: Origin) -> Iterator[str]:
    yield f"  files: {', '.join(origin.files)}; {origin.gigabytes:g} GB; licence: {origin.licence}"
    yield f"  fetch: {origin.fetch(f'{FOLDER}/raw/{origin.command}')}"
    if origin.within:
        whole = f"{FOLDER}/raw/blip2"
        yield (
            f"     or: hf download {origin.within} --include '*.json' '*.safetensors' --local-dir {whole}"
            f"  (all of BLIP-2, 49 GB; convert {whole} then)"
        )
    if origin.repos[1:]:
        yield f"  mirrors: {', '.join(origin.repos[1:])}"
    if origin.repos and origin.elsewhere:
        yield f"  {origin.elsewhere}"


def source_status(
    config: ConfigDict, name: str, given: str, sizes: Mapping[str, Any] | None
) -> tuple[bool, str]:
    """(whether it is there and fits, a line about it)."""
    if not given:
        return False, "not given"
    try:
        _, use = uses_of(config)[name]
        path = source_path(use, given)
        path = path if path.exists() else resolve(given, fetch=False)
        check_preset(config, name, path)
        return True, f"{path}: {_verified(name, use, path, sizes)}"
    except (ConfigError, OSError, WeightFileError, WeightTableError) as error:
        return False, str(error).replace("\n", "\n    ")


def _verified(name: str, use: Use, path: Path, sizes: Mapping[str, Any] | None) -> str:
    """What was checked of a source that is there."""
    if use.stock:
        file = path / use.file if path.is_dir() else path
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        published = ", ".join(use.stock.values())
        return use.stock.get(digest, f"another file than {published} (SHA-256 {digest[:12]}...)")
    if use.tower is None:
        return "there"
    if use.tower.table is None:
        use.tower.read_sizes(sizes_file(use, path))
        return "there"
    if sizes is None:
        return "there, not compared: the sizes are not known"
    source = open_weights(path, use.tower.key)
    view, coverage = examine(name, use.tower, source, sizes[name], others=known_towers(), values=False)
    for key in view:
        view[key]
    return f"{len(coverage.consumed)} tensors fit, {len(coverage.ignored)} ignored"
