"""Where a checkpoint comes from: the description of a run, and what must agree before it is read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

Meta = dict[str, Any]
COMPARED = ("config.model", "tokenizer", "frozen")
"""Sections of a description that must agree before its parameters are read into a model."""
HARMLESS = ("config.model.remat", "config.model.attention")
"""Keys in them that change speed or memory, not numbers."""
NOT_LOADED = "not loaded"
"""In place of the hash of a tower's frozen weights: the run did not use them, so nothing is known of them."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
PIECE = 256 * 2**20
"""Bytes of a parameter that are copied to the host at a time, to be hashed."""


@dataclasses.dataclass(frozen=True)
class FileLeaf:
    """A parameter as its file has it.

    Attributes:
      shape: what has its ``shape`` and ``dtype``.  pieces: its values along the first axis.
    """

    shape: Any
    pieces: Callable[[], Iterable[np.ndarray]]


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable or of another run; the message names what and the remedy."""


def describe_run(
    config: Mapping[str, Any], *, tokenizer: Mapping[str, Any], frozen: Mapping[str, str]
) -> Meta:
    """What a checkpoint says about the run that wrote it, as plain JSON.

    Args:
      config: the whole configuration as nested dicts.
      tokenizer: identity of the tokenizer (hash of its file, number of vokens, special ids).
      frozen: tower -> hash of its frozen weights (:func:`hash_parameters`), or ``NOT_LOADED``.  Quantised
        kernels are hashed as their files have them, so the hash is that of the same tower unquantised.
    """
    return plain(
        {
            "config": config,
            "tokenizer": tokenizer,
            "frozen": frozen,
            "bundle": bundle(config, tokenizer),
            "git_revision": git_revision(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )


def bundle(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Meta:
    """What else must go with the parameters to use them: stage, ids of the vokens, BOS, prompt spelling.

    All of it follows from configuration and tokenizer; it is written out for readers of other programs.
    """
    known: Meta = {}
    if "backbone" in config.get("model", {}):
        known["stage"] = stage_of(config)
    if data := config.get("data"):
        known |= {name: data[name] for name in ("bos_id", "prompt_set") if name in data}
    if words := tokenizer.get("backbone"):
        first, count = words["vocab_size"], words["num_vokens"]
        known |= {"voken_ids": list(range(first, first + count)), "image_id": first + count}
    return known


def stage_of(config: Mapping[str, Any]) -> int:
    """1 for a run on captions, 2 for one that tunes the language model or started from another run.

    Checkpoints of versions without ``tuning.stage`` are told by their LoRA or prefix.
    """
    backbone = config["model"]["backbone"]
    tuned = backbone.get("lora_rank") or backbone.get("prefix_tokens") or config["run"].get("init_from")
    return 2 if tuned or config.get("tuning", {}).get("stage") == "stage2" else 1


def plain(tree: Any) -> Any:
    """``tree`` as JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(tree))


def git_revision() -> str:
    """Commit of the source tree, ``+changes`` behind it if files differ; ``unknown`` outside of git."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hash_parameters(
    params: Mapping[str, jax.Array], in_files: Mapping[str, FileLeaf] | None = None
) -> dict[str, str]:
    """Tower (the first two names of a path) -> SHA-256 over its paths, shapes, dtypes and bytes.

    At most ``PIECE`` bytes are copied to the host at a time.  The same arrays are not hashed again: a second
    stage compares its towers with the first one's and describes them right after.

    Args:
      in_files: paths whose arrays are another form of what their files hold; the files are hashed.
    """
    towers: dict[str, dict[str, jax.Array]] = {}
    for path in sorted(params):
        towers.setdefault(tower_of(path), {})[path] = params[path]
    return {tower: _hash_tower(tower, leaves, in_files or {}) for tower, leaves in towers.items()}


def tower_of(path: str) -> str:
    """The tower that a parameter is hashed with."""
    return "/".join(path.split("/")[:2])


_hashed: dict[str, tuple[dict[str, weakref.ref], str]] = {}
"""Tower -> the arrays that were hashed last, which never change, and their hash."""


def _hash_tower(tower: str, leaves: Mapping[str, jax.Array], in_files: Mapping[str, FileLeaf]) -> str:
    known, digest = _hashed.get(tower, ({}, ""))
    if known.keys() == leaves.keys() and all(known[path]() is value for path, value in leaves.items()):
        return digest
    pieces = (
        (path, in_files[path].shape, in_files[path].pieces())
        if path in in_files
        else (path, value, _pieces(value))
        for path, value in leaves.items()
    )
    [digest] = hash_leaves(pieces).values()
    if all(isinstance(value, jax.Array) for value in leaves.values()):
        _hashed[tower] = {path: weakref.ref(value) for path, value in leaves.items()}, digest
    return digest


def _pieces(value: jax.Array) -> Iterator[np.ndarray]:
    """The values along the first axis, as many of them at a time as ``PIECE`` bytes hold."""
    if not isinstance(value, jax.Array) or value.nbytes <= PIECE:
        yield _on_host(value)
        return
    rows = max(1, PIECE * value.shape[0] // value.nbytes)
    for start in range(0, value.shape[0], rows):
        yield _on_host(_cut(value, start, min(rows, value.shape[0] - start)))


@functools.partial(jax.jit, static_argnums=2)
def _cut(value: jax.Array, start: int | jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(value, start, rows)


def hash_leaves(leaves: Iterable[tuple[str, Any, Iterable[np.ndarray]]]) -> dict[str, str]:
    """:func:`hash_parameters` of leaves that are never whole in memory.

    Args:
      leaves: in the order of their paths: path, what has ``shape`` and ``dtype``, and the values in pieces
        along the first axis.
    """
    hashes: dict[str, Any] = {}
    for path, shape, pieces in leaves:
        tower = hashes.setdefault(tower_of(path), hashlib.sha256())
        tower.update(f"{path} {shape.shape} {np.dtype(shape.dtype).name} ".encode())
        for piece in pieces:
            tower.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return {tower: digest.hexdigest() for tower, digest in hashes.items()}


def _on_host(value: jax.Array) -> np.ndarray:
    """The whole array, gathered if other processes hold parts of it."""
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def differences(saved: Meta, current: Meta) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in the checkpoint, value here), sorted, where they differ; "absent" for no key."""
    # An empty dict is a value, too.
    theirs, ours = (
        flatten_dict(tree, sep=".", is_leaf=lambda _, value: not value) for tree in (saved, plain(current))
    )
    pairs = {
        key: (theirs.get(key, "absent"), ours.get(key, "absent"))
        for key in sorted(ours.keys() | theirs.keys())
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def require_same(
    saved: Meta,
    current: Meta,
    sections: Iterable[str],
    title: str,
    line: str,
    *,
    remedy: str = "",
    allow: Iterable[str] = (),
) -> None:
    """Refuse a checkpoint whose description differs from this run's inside some sections.

    Args:
      sections: dotted keys; what is below one belongs to it.  allow: those in them that may differ.
      title: first line of the message.  remedy: its last one.
      line: how a key and its values, there and here, are said; "absent" stands for no key.

    A tower that either run did not load (``NOT_LOADED``) is not compared.

    Raises:
      CheckpointError: each differing key with both values.
    """

    def among(key: str, names: Iterable[str]) -> bool:
        return any(key == name or key.startswith(name + ".") for name in names)

    lines = []
    for key, pair in differences(saved, current).items():
        unknown = NOT_LOADED in pair and among(key, ("frozen",))
        if not unknown and among(key, sections) and not among(key, allow):
            lines.append("  " + line.format(key, *pair))
    if lines:
        raise CheckpointError("\n".join([title, *lines, *([remedy] if remedy else [])]))


def check_compatible(saved: Meta, current: Meta, *, allow: Iterable[str] = ()) -> None:
    """Refuse a checkpoint whose model, tokenizer or frozen weights are not this run's.

    Args:
      saved, current: descriptions by :func:`describe_run`.
      allow: dotted keys, or sections, that may differ (``config.model.backbone.lora_rank`` for stage 2).

    Raises:
      CheckpointError: each differing key with both values.
    """
    require_same(
        saved,
        current,
        COMPARED,
        "the checkpoint is of another run; start in another workdir, or change these back:",
        "{}: checkpoint {!r}, this run {!r}",
        allow=(*HARMLESS, *allow),
    )
