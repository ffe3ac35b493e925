"""The page of a study: one HTML file that works from a disk, without a server."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt5_jax.evaluation.human.questions import CHOICES

FILE = "index.html"


def write_page(folder: Path, study: Mapping[str, Any]) -> Path:
    """Writes the page into a folder and returns its path.

    Args:
      study: what the page knows, as JSON values; texts may hold anything.
    """
    page = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    data = json.dumps({**study, "choices": CHOICES}, ensure_ascii=False)
    # In a script element only "<" could end it or begin a comment.
    page = page.replace("__STUDY__", data.replace("<", "\\u003c"))
    path = folder / FILE
    path.write_text(page, "utf-8")
    return path
