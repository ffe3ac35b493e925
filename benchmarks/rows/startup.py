"""Row 9: how long a command takes until its first step is done, with an empty compile cache and a full one.

The README's stage-1 run in the small world, cut after one step; the command has ended when its checkpoint
is written.  CPU seconds of the process and of its data workers are compared, since neighbours on the machine
disturb them less than the clock; the clock until the first line of ``metrics.jsonl`` stands beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import line

PYTHON = Path(__file__).resolve().parents[2]
IMPORTED = "minigpt5_jax.train"
"""Imports everything up to the first step: model, optimizer, data, checkpoints."""
RUN = {"num_steps": 1, "log_every": 1, "eval_every": 0, "grid_every": 0}


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The imports, then the first step."""
    imports = sorted(_run(["-c", f"import {IMPORTED}"])[0] for _ in range(options.blocks))
    bare = sorted(_run(["-c", "import jax, flax.nnx, optax"])[0] for _ in range(options.blocks))
    middle = options.blocks // 2
    yield line(
        9,
        "import",
        ours=imports[middle],
        peer=None,
        limit=bare[middle],
        spread=[imports[0], imports[-1]],
        unit="CPU seconds",
    )
    with tempfile.TemporaryDirectory() as folder:
        cold, cold_wall = first_step(Path(folder), "cold")
        warm = [first_step(Path(folder), f"warm{i}") for i in range(2)]
    seconds, wall = min(warm)
    yield line(
        9,
        "first step",
        ours=seconds,
        peer=cold,
        spread=[cold / max(warm)[0], cold / seconds],
        unit="CPU seconds, warm against cold cache",
        wall_until_first_step={"cold": cold_wall, "warm": wall},
    )


def first_step(folder: Path, name: str) -> tuple[float, float]:
    """CPU seconds of a run of one step into ``folder/name``; seconds of the clock until the step was logged.

    All runs in ``folder`` share a compile cache.
    """
    workdir = folder / name
    settings = [f"--config.run.{key}={value}" for key, value in RUN.items()]
    command = ["-m", IMPORTED, "--config", "configs/shapes_stage1.py", "--workdir", str(workdir)]
    cache = f"--config.run.compile_cache={folder / 'cache'}"
    return _run([*command, cache, *settings], workdir / "metrics.jsonl")


def _run(arguments: Sequence[str], awaited: Path | None = None) -> tuple[float, float]:
    """(CPU seconds of a Python process and those it waited for, seconds until ``awaited`` held a line)."""
    begin, seen = time.monotonic(), 0.0
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *arguments], cwd=PYTHON, stdout=told, stderr=told)
        while True:
            child, status, usage = os.wait4(process.pid, os.WNOHANG)
            if awaited and not seen and awaited.exists() and awaited.stat().st_size:
                seen = time.monotonic() - begin
            if child:
                break
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            tail = told.read().decode(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError("\n".join([f"python {' '.join(arguments)} failed:", *tail]))
    return usage.ru_utime + usage.ru_stime, seen
