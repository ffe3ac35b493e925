"""A short training of the small world, killed at random moments: what is left in the end, bit for bit.

    python -m benchmarks.kills --kills 50

trains once undisturbed, then again and again with SIGKILL: every second one comes while a checkpoint is being
written, the others at any moment from the start of the process on.  The same command is given after each, as
a launcher does, and must go on from the newest whole checkpoint.  A run that came to its end is compared with
the undisturbed one, every array of its last checkpoint bit for bit, and another begins.

Prints a JSON line after every run that came to its end, the last with all of them: ``kills``, ``in_saves`` (a
half-written checkpoint was left behind), ``runs`` that were compared, ``numbers`` in each of them, and
``equal``.  The status is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from minigpt5_jax import cli, config, train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8
SETTINGS = {
    "run.num_steps": STEPS,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.grid_every": 0,
    "run.save_every": 1,
    "run.keep_best": 0,
    "data.global_batch": 2,
    "data.shapes_train": 12,
    "data.shapes_validation": 2,
    "data.worker_count": 0,
    "data.buckets": "()",
    "data.pack": 1,
    "data.max_length": 40,
    "data.instruction_every": 0,
    "optimizer.warmup_steps": 2,
}
PARTS = ("trainable", "opt_state", "step", "rng")


def fork(work: Callable[[], object], log: Path) -> int:
    """Process number of a fork that does ``work``; what it says is in ``log``.

    This process has imported everything and uses no device: importing is half of what a short run costs.
    """
    if child := os.fork():
        return child
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(workdir: Path, cache: Path) -> int:
    """Process number of ``python -m minigpt5_jax.train`` in ``workdir``."""
    settings = {**SETTINGS, "run.compile_cache": cache, "data.index_cache": cache}
    words = ["train", f"--config={ROOT}/configs/shapes_stage1.py", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in settings.items()]

    def work() -> None:
        sys.argv = words
        cli.set_compile_cache = keep_every_program
        cli.run(train.main)

    return fork(work, log_of(workdir))


def keep_every_program(settings: ConfigDict, before: Callable[..., None] = cli.set_compile_cache) -> None:
    """Training keeps programs that take a second to compile; here a restart compiles none."""
    before(settings)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def log_of(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def whole_steps(workdir: Path) -> list[int]:
    """Steps under their final names, ascending."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """(name, last change) of checkpoints that are being written, or were when their writer was killed."""
    found = set()
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it has its final name by now
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def saving(workdir: Path, known: set[tuple[str, int]]) -> bool:
    """Whether a checkpoint is being written that is not among those ``known`` from before."""
    return bool(half_written(workdir) - known)


def never() -> bool:
    return False


def ended(child: int, until: Callable[[], bool]) -> int | None:
    """Status of a process that ended before ``until()`` was true; None if it did not."""
    while not until():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def after(seconds: float) -> Callable[[], bool]:
    """Whether the time from now on has passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def check_restart(workdir: Path, before: list[int]) -> None:
    """Raises AssertionError where a process did not go on from the newest whole step."""
    said = log_of(workdir).read_text(errors="replace")
    assert "cannot be read" not in said, said[-2000:]
    went_on = re.search(r"continuing behind step (\d+)", said)
    if went_on or whole_steps(workdir) != before:  # it was killed later than it could say so
        found, newest = int(went_on[1]) if went_on else 0, before[-1] if before else 0
        assert found == newest, f"step {newest} is whole, and it went on from {found}: {said[-2000:]}"


def arrays(workdir: Path) -> dict[str, tuple[str, int]]:
    """Name -> (SHA-256, size) of every array of the last checkpoint, read by a process of its own."""
    found = workdir.with_suffix(".json")

    def work() -> None:
        hashes = {}
        for part in PARTS:
            for name, value in ocp.StandardCheckpointer().restore(last / part).items():
                value = np.ascontiguousarray(value)
                hashes[f"{part}{name}"] = hashlib.sha256(value.tobytes()).hexdigest(), value.size
        found.write_text(json.dumps(hashes))

    last = workdir / "checkpoints" / f"{STEPS:08d}"
    status = ended(fork(work, log_of(found)), never)
    assert status == 0, log_of(found).read_text()[-3000:]
    return {name: tuple(pair) for name, pair in json.loads(found.read_text()).items()}


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Step -> its line in ``metrics.jsonl``, but for times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: {name: value for name, value in line.items() if name not in ("time", "samples_per_s")}
        for line in lines
    }


def same(workdir: Path, undisturbed: Path) -> list[str]:
    """What differs between two finished runs."""
    ours, theirs = arrays(workdir), arrays(undisturbed)
    found = sorted(ours.keys() ^ theirs.keys())
    found += [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    return found + (["metrics.jsonl"] if losses(workdir) != losses(undisturbed) else [])


def kill_until_done(workdir: Path, cache: Path, seconds: float, draw: random.Random, left: int) -> list[bool]:
    """Train to the end in ``workdir`` with at most ``left`` kills.

    Args:
      seconds: that an undisturbed run takes.

    Returns:
      For each kill whether it came while a checkpoint was written.
    """
    kills: list[bool] = []
    while True:
        before = whole_steps(workdir)
        known = half_written(workdir)
        child = start(workdir, cache)
        if len(kills) == left:
            status = ended(child, never)
        elif len(kills) % 2:
            status = ended(child, functools.partial(saving, workdir, known))
            if status is None:
                status = ended(child, after(draw.uniform(0, 0.1)))
        else:
            status = ended(child, after(draw.uniform(0, seconds)))
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        check_restart(workdir, before)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, f"status {status}: {log_of(workdir).read_text()[-3000:]}"
        kills.append(saving(workdir, known))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where a folder is made, and deleted in the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cli.user_errors()  # imports them, as the next line does the parts
    config.get_config()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for result in kill(Path(folder), options.kills, random.Random(options.seed)):
            print(json.dumps(result), flush=True)
    sys.exit(not result["equal"])


def kill(folder: Path, count: int, draw: random.Random) -> Iterator[dict[str, object]]:
    """The whole of it in an empty folder; after each run that came to its end, the result so far."""
    cache, undisturbed = folder / "cache", folder / "undisturbed"
    for _ in range(2):  # the second one finds its programs compiled
        shutil.rmtree(undisturbed, ignore_errors=True)
        begin = time.monotonic()
        status = ended(start(undisturbed, cache), never)
        assert status == 0, log_of(undisturbed).read_text()[-3000:]
        seconds = time.monotonic() - begin
    numbers = sum(size for _, size in arrays(undisturbed).values())
    kills: list[bool] = []
    differing: dict[str, list[str]] = {}
    for run in itertools.count(1):
        workdir = folder / f"killed_{run}"
        kills += kill_until_done(workdir, cache, seconds, draw, count - len(kills))
        if found := same(workdir, undisturbed):
            differing[workdir.name] = found
        yield {
            "kills": len(kills),
            "in_saves": sum(kills),
            "runs": run,
            "numbers": numbers,
            "seconds_undisturbed": round(seconds, 1),
            "equal": not differing,
            **({"differing": differing} if differing else {}),
        }
        if len(kills) >= count:
            return


if __name__ == "__main__":
    main()
