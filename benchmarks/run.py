"""The scoreboard: how fast, and how much work, against PyTorch.  One JSON line a case.

    python -m benchmarks.run                                # every row, on the CPU
    python -m benchmarks.run --rows 3                       # work of a step, counted; nothing is run
    python -m benchmarks.run --rows 5b,6,7b                 # compiled for chips that are not here
    python -m benchmarks.run --rows 12,13 --device gpu --nocompile

What each row is, its goals and the last results: docs/performance.md.  Sides take turns in one run, so a busy
machine widens ``spread`` more than it moves ``ratio``; the load is printed.  Exit status 1: a goal that
was measured is not met.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROWS: dict[int | str, str] = {
    3: "flops:lines",
    4: "step:same_result",
    "5b": "compiled:unet_bytes",
    6: "compiled:step_memory",
    "7b": "compiled:decode_bytes",
    9: "startup:lines",
    12: "step:timed",
    13: "decode:lines",
}
"""Row -> module of :mod:`benchmarks.rows` and the function that yields its lines."""
COMPILED = {row for row, place in ROWS.items() if place.startswith("compiled:")}
"""Rows for chips that are not here.  They come last, as they take this machine's own from JAX."""
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=rows, default=list(ROWS), help="comma separated; all by default")
    parser.add_argument("--device", choices=PLATFORMS, default="cpu", help="where the sides run")
    parser.add_argument("--blocks", type=blocks, default=5, help="timed turns of each side, at least 5")
    parser.add_argument("--nocompile", dest="compile", action="store_false", help="without torch.compile")
    return parser.parse_args(argv)


def rows(text: str) -> list[int | str]:
    """``3,5b`` -> [3, "5b"]."""
    chosen = [int(part) if part.isdigit() else part for part in text.split(",") if part]
    if unknown := [row for row in chosen if row not in ROWS]:
        known = ", ".join(map(str, ROWS))
        raise argparse.ArgumentTypeError(f"no row {', '.join(map(str, unknown))}; known: {known}")
    return chosen


def blocks(text: str) -> int:
    """A number of at least five."""
    if int(text) < 5:
        raise argparse.ArgumentTypeError(f"medians are over at least 5 blocks, not {text}")
    return int(text)


def function_of(row: int | str) -> Callable[[argparse.Namespace], Iterator[dict[str, Any]]]:
    """What yields the lines of a row; its module, with PyTorch, is imported here."""
    module, _, name = ROWS[row].partition(":")
    return getattr(importlib.import_module(f"benchmarks.rows.{module}"), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines as they come; 0 where every goal that was measured is met."""
    options = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", PLATFORMS[options.device])
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    missed = False
    for row in sorted(options.rows, key=lambda row: row in COMPILED):
        if options.device == "tpu" and row not in {3, *COMPILED}:
            print(f"row {row} has no peer on TPUs: PyTorch's run on CPU or GPU; left out", file=sys.stderr)
            continue
        for told in function_of(row)(options):
            print(json.dumps(told), flush=True)
            missed |= told["met"] is False
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
