"""Two processes that share a run: one owner, one stop, whole checkpoints, and one that is gone is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(workdir: Path, cache: Path, **settings: object) -> list[subprocess.Popen]:
    """``python -m minigpt5_jax.train`` on two processes with a device each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "run.num_steps": 100,
        "run.log_every": 1,
        "run.eval_every": 0,
        "run.save_every": 2,
        "run.grid_every": 0,
        "run.compile_cache": cache,
        "data.global_batch": 4,
        "data.shapes_train": 24,
        "data.shapes_validation": 4,
        "data.buckets": "()",
        "data.pack": 1,
        "data.max_length": 40,
        "data.index_cache": cache,
        "optimizer.warmup_steps": 1,
    } | {name.replace("__", "."): value for name, value in settings.items()}
    command = [sys.executable, "-m", "minigpt5_jax.train", "--config", "configs/shapes_stage1.py"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_cpu_use_fusion_emitters=false"}
    base |= {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env=base | {"PROCESS_ID": str(rank)}
        )
        for rank in range(2)
    ]


def end(workers: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(status, what it said on stderr) of each."""
    return [(worker.returncode, err) for worker in workers for _, err in [worker.communicate(timeout=1200)]]


def steps(workdir: Path) -> list[int]:
    """Steps that are whole on disk."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_refused_and_resumed(tmp_path):
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    first = start(workdir, cache)
    others = []
    try:
        lines = iter(first[0].stderr.readline, "")
        assert any("2/100" in line or "loss" in line for line in lines), "it trains"
        # A second start, of two processes as well, is refused by both.
        others = start(workdir, cache)
        refused = end(others)
        assert [status for status, _ in refused] == [1, 1], refused
        assert f"is in use by process {first[0].pid} on host {socket.gethostname()}" in refused[0][1]
        # SIGTERM to one process: both save the same step and stop.
        first[1].send_signal(signal.SIGTERM)
        stopped = end(first)
    finally:
        for worker in (*first, *others):
            worker.kill()
    assert [status for status, _ in stopped] == [143, 143], stopped[0][1][-3000:] + stopped[1][1][-3000:]
    last = steps(workdir)[-1]
    assert (
        f"stopped by SIGTERM: step {last} of 100 is saved; the same command goes on from it" in stopped[0][1]
    )
    saved = json.loads((workdir / f"checkpoints/{last:08d}/meta/metadata").read_text())
    assert saved["checksums"]["trainable"].keys() == saved["leaves"]["trainable"].keys()
    # The newest is damaged: both processes pass it over, and go on from the one before.
    before = steps(workdir)[-2]
    for file in (workdir / f"checkpoints/{last:08d}/trainable").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    # Then one of them is killed: the other says which, and ends.
    again = start(workdir, cache, run__silence_timeout=10)
    try:
        lines = []
        for line in iter(again[0].stderr.readline, ""):
            lines.append(line)
            if "loss" in line:
                break
        again[1].kill()
        killed = time.monotonic()
        (status, rest), (_, other) = end(again)
    finally:
        for worker in again:
            worker.kill()
    said = "".join(lines) + rest
    assert status == 1, said[-3000:]
    assert time.monotonic() - killed < 60, "not as late as JAX"
    for text in (said, other):
        assert f"step {last} in" in text and f"step {before} is the newest that can" in text
    assert f"continuing behind step {before} of" in said and steps(workdir)[-1] >= before
    gone = f"error: process 1 of 2 (host {socket.gethostname()}, pid {again[1].pid}) is silent"
    assert gone in said and "stack trace" not in said, said[-3000:]
