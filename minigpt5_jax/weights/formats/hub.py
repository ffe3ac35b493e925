"""Where a source lies: a local path, or a Hugging Face id and the local cache of ``huggingface_hub``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import why_missing

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt")
"""What is brought of a repository: weights, sizes, tokenizer."""
TORCH_PATTERNS = ("*.bin", "*.bin.index.json")
"""Wanted too where a folder has no safetensors."""
VARIANTS = ("*.fp16.*", "*.non_ema.*")
"""Second copies that diffusers folders hold; never brought."""
FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)*")


def resolve(
    name_or_path: str | os.PathLike[str], patterns: Sequence[str] = PATTERNS, *, fetch: bool = True
) -> Path:
    """The local file or folder of a source.

    Args:
      name_or_path: what is there locally comes first; else ``org/name``, ``org/name/folder`` or
        ``org/name/folder/file.ckpt`` on the Hugging Face hub.  Without a network (or with
        ``HF_HUB_OFFLINE=1``) its local cache is all there is.
      patterns: files wanted of a repository's folder; PyTorch's ``.bin`` files are brought only where there
        are no safetensors.
      fetch: whether what the cache lacks may be brought.

    Raises:
      FileNotFoundError: a local path that does not exist.
      WeightFileError: the hub does not have it or cannot be reached; the message says which files to put
        where.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not _ID.fullmatch(name):
        raise FileNotFoundError(
            f"no file or folder {path} ({why_missing(path)}); correct it, or give a repository as org/name"
        )
    repository, inner = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if inner.endswith(FILES):
        file = _from_hub(repository, [inner], name, fetch) / inner
        if not file.is_file():
            raise WeightFileError(f"{repository} has no file {inner!r}")
        return file
    prefix = f"{inner}/" if inner else ""
    folder = _from_hub(repository, [prefix + pattern for pattern in patterns], name, fetch) / inner
    if not any(folder.glob("*.safetensors")) and "*.safetensors" in patterns:
        _from_hub(repository, [prefix + pattern for pattern in TORCH_PATTERNS], name, fetch)
    if not folder.is_dir():
        raise WeightFileError(f"{repository} has no folder {inner!r} with {', '.join(patterns)}")
    return folder


def _from_hub(repository: str, patterns: list[str], name: str, fetch: bool) -> Path:
    """Snapshot of a repository in the local cache that has what fits ``patterns``.

    A pattern's ``*`` stands for folders too, so these are left out unless a pattern names one.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    here, what = Path.cwd() / name, ""
    place = f"{here}/ (files {', '.join(patterns)})"
    if name.endswith(FILES):
        place, what = str(here), f" {patterns[0]}"
    unwanted = [*VARIANTS] + ([] if any("/" in pattern for pattern in patterns) else ["*/*"])
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=patterns, ignore_patterns=unwanted, local_files_only=not fetch
            )
        )
    except GatedRepoError:
        why = "its licence must be accepted on its page first, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or it is private"
    except LocalEntryNotFoundError:
        why = "it is not in the local cache" + (" and the hub cannot be reached" if fetch else "")
        if kept := _snapshots(repository):
            why = f"its cache has no refs/main to say which snapshot is meant; give the path of one: {kept}"
    except Exception as error:  # the errors of the network are those of whichever client the hub uses
        why = f"{type(error).__name__}: {error}"
    raise WeightFileError(
        f"{name!r} is no file or folder here and was not brought from the Hugging Face hub: {why}.\n"
        f"Where there is a network, `hf download {repository}{what} --local-dir {repository}` fetches it; "
        f"put it at {place} or give the path where it lies"
    )


def _snapshots(repository: str) -> str:
    """Folders of a repository's snapshots in the local cache that no branch points to; '' for none."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if (folder / "refs/main").is_file() or not (folder / "snapshots").is_dir():
        return ""
    return ", ".join(map(str, sorted((folder / "snapshots").iterdir())))
