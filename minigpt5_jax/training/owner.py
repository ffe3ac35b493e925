"""The owner of a run's folder: one program at a time trains in it."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import time
import weakref
from pathlib import Path
from typing import TextIO

from absl import logging

from minigpt5_jax.training.provenance import CheckpointError

OWNER = "owner.lock"
_HERE: weakref.WeakValueDictionary[Path, Owner] = weakref.WeakValueDictionary()
"""Folder -> its owner, of this process."""


class Owner:
    """Holds a folder until :meth:`release`, or until the process ends in whatever way.

    The file ``owner.lock`` names the owner while it runs.  What holds is the lock on it, which the system
    takes back when a process dies: a file that was left behind blocks nobody.

    Args:
      workdir: folder of the run; made where it is missing.
      remedy: what the loser may do besides waiting.

    Raises:
      CheckpointError: another program trains there; names its process, host and start.  Or a loop of this
        very process (a notebook) holds it that is neither closed nor garbage.
      OSError: the folder cannot be written.
    """

    def __init__(self, workdir: str | Path, remedy: str = "give this run another --workdir"):
        self._remedy = remedy
        self._path = Path(workdir) / OWNER
        self._free_here()
        self._made = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = self._locked()
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._file.write(f"process {os.getpid()} on host {socket.gethostname()} since {since}\n")
        self._file.flush()
        _HERE[self._path.parent.resolve()] = self

    def _free_here(self) -> None:
        """Refuse a folder that this process holds; an owner that nobody can reach any more lets go first."""
        folder = self._path.parent.resolve()
        if folder in _HERE:
            gc.collect()
        if folder in _HERE:
            raise CheckpointError(
                f"{self._path.parent} is in use by this very process, by a loop that was made and did not "
                "run to its end: loop.close() ends it and lets go of the folder"
            )

    def _locked(self) -> TextIO:
        """The file, open and locked."""
        while True:
            file = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise CheckpointError(
                    f"{self._path.parent} is in use by {owner}; wait until it ends, stop it, or "
                    f"{self._remedy}"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                logging.warning(
                    "the file system of %s has no locks (%s): see to it that no other run uses this folder",
                    self._path.parent,
                    error.strerror,
                )
                return file
            if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                return file
            file.close()  # the owner before took the file away after it was opened here

    def release(self) -> None:
        """Let go of the folder; a folder that was made for it and is empty goes, too."""
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)  # before the lock ends, so that nobody else's is taken away
        self._file.close()
        self._file = None
        _HERE.pop(self._path.parent.resolve(), None)
        if self._made and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()
