"""A path as it enters the program."""

from __future__ import annotations

import os
import re

from minigpt5_jax.config.errors import ConfigError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def local_path(path: str) -> str:
    """``path`` with its ``~`` replaced: a shell leaves one behind ``=`` alone.

    Raises:
      ConfigError: an address of object storage (``gs://bucket/run``), which pathlib would take for a folder
        named ``gs:`` here.
    """
    if _ADDRESS.match(path):
        raise ConfigError(
            f"{path} is an address, and only folders are read and written here: mount the bucket "
            "(launch/README.md) and give the folder where it is mounted"
        )
    return os.path.expanduser(path)
