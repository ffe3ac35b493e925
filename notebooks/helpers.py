"""What the notebooks share: where runs lie, command lines that must succeed, pictures in rows."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from matplotlib_inline.backend_inline import set_matplotlib_formats

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path(os.environ.get("NOTEBOOK_RUNS", "runs/notebooks"))
"""Folder of everything that the notebooks write, below the checkout unless the variable names another."""

os.chdir(ROOT)  # commands are typed at the root of the checkout, wherever Jupyter was started
os.environ["RUNS"] = str(RUNS)
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

if get_ipython() is not None:  # pictures of a notebook that is committed are to be small
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})


def sh(command: str, *, lines: int = 6, status: int = 0) -> None:
    """Run a command line and print the last lines of what it says.

    Args:
      command: as typed in a shell; ``$RUNS`` is :data:`RUNS`.
      lines: printed of its standard output; progress, on standard error, is kept for failures.
      status: that it ends with where all is well.

    Raises:
      RuntimeError: it ended with another status; the message has what it said last.
    """
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    if done.returncode != status:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise RuntimeError(f"status {done.returncode} of: {command}\n{last}")
    if said := done.stdout.strip().splitlines():
        print("\n".join(said[-lines:]))


def show(images: Sequence[Any], titles: Sequence[str] = (), *, side: float = 1.4, columns: int = 8) -> None:
    """Draw images (PIL or ``uint8[H W 3]``; None for none) in rows, a title above each."""
    rows = -(-len(images) // columns)
    width = min(columns, len(images))
    _, axes = plt.subplots(rows, width, figsize=(side * width, (side + 0.4) * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, [*titles, *[""] * (len(images) - len(titles))]):
        axis.set_title(
            "\n".join(textwrap.fill(line, int(15 * side)) for line in title.splitlines()), fontsize=7
        )
        if image is None:
            axis.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=8)
        else:
            axis.imshow(np.asarray(image))
    plt.tight_layout()
    plt.show()
