"""Where a checkpoint comes from: the description of a run, and what must agree before it is read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Meta = dict[str, Any]
COMPARED = ("config.model", "tokenizer", "frozen")
"""Sections of a description that must agree before its parameters are read into a model."""
HARMLESS = ("config.model.remat",)
"""Keys in them that change speed or memory, not numbers."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable or of another run; the message names what and the remedy."""


def describe_run(
    config: Mapping[str, Any], *, tokenizer: Mapping[str, Any], frozen: Mapping[str, str]
) -> Meta:
    """What a checkpoint says about the run that wrote it, as plain JSON.

    Args:
      config: the whole configuration as nested dicts.
      tokenizer: identity of the tokenizer (hash of its file, number of vokens, special ids).
      frozen: tower -> hash of its frozen weights (:func:`hash_parameters`).
    """
    return plain(
        {
            "config": config,
            "tokenizer": tokenizer,
            "frozen": frozen,
            "git_revision": git_revision(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )


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


def hash_parameters(params: Mapping[str, jax.Array]) -> dict[str, str]:
    """Tower (the first two names of a path) -> SHA-256 over its paths, shapes, dtypes and bytes.

    One leaf at a time is on the host.
    """
    values = ((path, _on_host(params[path])) for path in sorted(params))
    return hash_leaves((path, value, (value,)) for path, value in values)


def hash_leaves(leaves: Iterable[tuple[str, Any, Iterable[np.ndarray]]]) -> dict[str, str]:
    """:func:`hash_parameters` of leaves that are never whole in memory.

    Args:
      leaves: in the order of their paths: path, what has ``shape`` and ``dtype``, and the values in pieces
        along the first axis.
    """
    hashes: dict[str, Any] = {}
    for path, shape, pieces in leaves:
        tower = hashes.setdefault("/".join(path.split("/")[:2]), hashlib.sha256())
        tower.update(f"{path} {shape.shape} {np.dtype(shape.dtype).name} ".encode())
        for piece in pieces:
            tower.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return {tower: digest.hexdigest() for tower, digest in hashes.items()}


def _on_host(value: jax.Array) -> np.ndarray:
    """The whole array, gathered if other processes hold parts of it."""
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def differences(saved: Meta, current: Meta, sections: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, current) wherever the two differ inside ``sections``; "absent" for no key."""
    ours, theirs = _flatten(plain(current)), _flatten(saved)
    keys = sorted(
        key for key in ours.keys() | theirs.keys() for s in sections if key == s or key.startswith(s + ".")
    )
    pairs = {key: (theirs.get(key, "absent"), ours.get(key, "absent")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def check_compatible(saved: Meta, current: Meta, *, allow: Iterable[str] = ()) -> None:
    """Refuse a checkpoint whose model, tokenizer or frozen weights are not this run's.

    Args:
      saved, current: descriptions by :func:`describe_run`.
      allow: dotted keys, or sections, that may differ (``config.model.backbone.lora_rank`` for stage 2).

    Raises:
      CheckpointError: each differing key with both values.
    """
    allowed = (*HARMLESS, *allow)
    found = {
        key: pair
        for key, pair in differences(saved, current, COMPARED).items()
        if not any(key == name or key.startswith(name + ".") for name in allowed)
    }
    if found:
        lines = [
            f"  {key}: checkpoint {theirs!r}, this run {ours!r}" for key, (theirs, ours) in found.items()
        ]
        raise CheckpointError(
            "the checkpoint is of another run; start in another workdir, or change these back:\n"
            + "\n".join(lines)
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= _flatten(value, key + ".") if isinstance(value, Mapping) and value else {key: value}
    return flat
