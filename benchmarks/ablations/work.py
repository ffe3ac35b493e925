"""One row from start to end: train as a user would, judge, write the result whole or not at all."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.ablations.rows import CONFIG_FILE, ROOT, Row, RowError, differences
from minigpt5_jax.training.provenance import git_revision

NOTE = "row.json"
"""In a row's folder: the settings it was begun with and the seconds it took so far."""
LOSSES = ("loss", "text", "image", "caption")
HELD_OUT = "validation/"


def train_command(row: Row, settings: dict[str, Any], work: Path) -> list[str]:
    """The trainer's own command line for a row (everything behind the interpreter)."""
    config = settings["config"]
    command = ["-m", "minigpt5_jax.train", "--config", f"{CONFIG_FILE}:{row.config_variant}"]
    command += ["--workdir", str(work / row.name), f"--config.run.seed={row.seed}"]
    command += [f"--config.run.num_steps={config['run.num_steps']}"]
    command += [f"--config.optimizer.warmup_steps={config['optimizer.warmup_steps']}"]
    if row.need:
        command += [f"--config.run.init_from={work / row.need.name / 'checkpoints'}"]
    return command


def run_command(command: Sequence[str]) -> None:
    """Run it with this interpreter in the root of the project; what it shows is seen.

    Raises:
      RowError: it ended with an error.
    """
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        raise RowError(f"ended with status {status}: python {shlex.join(command)}")


def is_trained(row: Row, settings: dict[str, Any], work: Path) -> bool:
    """Whether the row's folder holds the checkpoint of the last step of such a run."""
    steps = [path.name for path in (work / row.name / "checkpoints").glob("*") if path.name.isdigit()]
    last = settings["config"]["run.num_steps"]
    return last in map(int, steps) and not begun_otherwise(row, settings, work)


def read_note(row: Row, work: Path) -> dict[str, Any] | None:
    """What the row's folder says of itself; None for no folder, or an empty one.

    Raises:
      RowError: the folder holds something else.
    """
    folder = work / row.name
    if (folder / NOTE).is_file():
        return json.loads((folder / NOTE).read_text())
    if folder.exists() and any(folder.iterdir()):
        raise RowError(f"{folder} holds something that is no row; choose another --work")
    return None


def write_whole(path: Path, value: Any) -> None:
    """JSON that is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def clear(row: Row, work: Path) -> None:
    """Delete the row's folder, if it is one of ours."""
    if read_note(row, work) is not None:
        shutil.rmtree(work / row.name)


def share_data(row: Row, settings: dict[str, Any], work: Path) -> None:
    """Let the rows of a seed read the same drawn files: the row's ``data`` is a link beside its folder."""
    config = settings["config"]
    drawn = {name: value for name, value in config.items() if name.startswith("data.shapes_")}
    words = [f"{name.removeprefix('data.shapes_')}{value}" for name, value in sorted(drawn.items())]
    shared = work / "_".join(["data", config["data.format"], *words, f"seed{row.seed}"])
    shared.mkdir(parents=True, exist_ok=True)
    link = work / row.name / "data"
    if not link.exists():
        link.symlink_to(Path("..") / shared.name, target_is_directory=True)


@contextmanager
def timed(row: Row, work: Path) -> Iterator[None]:
    """Add the seconds of training within to the row's note, an interrupted run's too."""
    note, start = read_note(row, work), time.time()
    try:
        yield
    finally:
        note["seconds"] = round(note["seconds"] + time.time() - start, 1)
        write_whole(work / row.name / NOTE, note)


def begun_otherwise(row: Row, settings: dict[str, Any], work: Path) -> list[str]:
    """In what the run in the row's folder differs from ``settings``; how it is judged is left out."""
    note = read_note(row, work)
    return differences(note["settings"], of_training(settings)) if note else []


def of_training(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run depends on before it is judged."""
    return {name: value for name, value in settings.items() if name != "judge"}


def begun(settings: dict[str, Any]) -> dict[str, Any]:
    """The note of a new row; the revision is that of its first line of code, whatever is committed later."""
    return {"settings": of_training(settings), "seconds": 0.0, "git_revision": git_revision()}


def run_row(row: Row, settings: dict[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Train (or go on with) a row, judge it and write its result.

    Raises:
      RowError: its folder was begun with other settings, or a command failed.
    """
    work = flags.work.resolve()
    if changed := begun_otherwise(row, settings, work):
        raise RowError(f"{work / row.name} was begun with other settings:\n  " + "\n  ".join(changed))
    if read_note(row, work) is None:
        write_whole(work / row.name / NOTE, begun(settings))
    if row.trains and not is_trained(row, settings, work):
        share_data(row, settings, work)
        with timed(row, work):
            run_command(train_command(row, settings, work))
    start = time.time()
    run_command(judge_command(row, settings, work))
    judged = json.loads((work / row.name / "judged.json").read_text())
    note = read_note(row, work)
    seconds = {"training": note["seconds"], "judging": round(time.time() - start, 1)}
    command = ["python", *train_command(row, settings, flags.work)] if row.trains else None
    result = {
        "variant": row.variant,
        "seed": row.seed,
        "scale": row.scale,
        "settings": settings,
        "command": shlex.join(command) if command else None,
        "git_revision": note["git_revision"],
        "machine": machine(),
        "seconds": seconds,
        "training": {"step": judged["step"], **last_losses(work / row.name)} if command else None,
        "scores": judged["result"],
    }
    write_whole(flags.results / f"{row.name}.json", result)
    return result


def judge_command(row: Row, settings: dict[str, Any], work: Path) -> list[str]:
    """The judge's command line for the row's run (everything behind the interpreter)."""
    run, asked = row if row.trains else row.need, settings["judge"]
    command = [
        "-m",
        "minigpt5_jax.evaluation.shapes",
        "--run",
        str(work / run.name),
        "--what",
        row.judged,
    ]
    command += ["--count", str(asked[row.judged]), "--seed", str(asked["seed"])]
    if "guidance" in asked:
        command += ["--inference", f"guidance_scale={asked['guidance']}"]
    if row.judged == "pairs":
        command += [f"--{'' if asked['native'] else 'no'}native"]
    return [*command, "--out", str(work / row.name / "judged.json")]


def last_losses(folder: Path) -> dict[str, Any]:
    """``losses`` of the last line that training wrote and the last ``validation``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if any(name.startswith(HELD_OUT) for name in line)]
    values = held_out[-1] if held_out else {}
    return {
        "losses": {name: losses[-1][name] for name in LOSSES if name in losses[-1]} if losses else {},
        "validation": {
            name.removeprefix(HELD_OUT): value for name, value in values.items() if name.startswith(HELD_OUT)
        },
    }


@functools.cache
def machine() -> str:
    """The processor, how many cores of it, and JAX's device, which this process leaves to the runs."""
    show = "import jax; print(jax.device_count(), 'x', jax.devices()[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
    device = asked.stdout.strip() or "no device"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; {device}"
