"""Sizes of a long story of VIST as a tree, which ``minigpt5_jax/planning/shapes.py`` plans with.

    python -m benchmarks.story_sizes

prints the largest rows of the loader of ``configs/stage2_vist.py`` on drawn stories.
"""

from __future__ import annotations

import tempfile

from benchmarks import lengths
from benchmarks.run_files import loader_of, on_drawn_samples, read_run_file
from benchmarks.samples import Stories
from minigpt5_jax.wiring.model import build

STORIES = 96


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory() as folder:
        config = on_drawn_samples(read_run_file("stage2_vist"), folder)
        print(loader_of(config, build(config), Stories(lengths.story_texts(STORIES, 0))).largest)


if __name__ == "__main__":
    main()
