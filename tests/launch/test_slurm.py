"""``launch/slurm.sbatch`` on a Slurm of one node: two tasks train as one process does; errors end a job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]
STEPS = 12
SETTINGS = {
    "loss.image": 0,  # no UNet to compile: the processes are the matter here, and not what they compute
    "run.num_steps": STEPS,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.grid_every": 0,
    "data.global_batch": 4,
    "data.shapes_train": 16,
    "data.shapes_validation": 4,
    "data.instruction_every": 0,
    "data.worker_count": 0,
    "data.max_length": 40,
    "optimizer.warmup_steps": 1,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {', '.join(MISSING)}: apt-get install munge slurmctld slurmd slurm-client",
    ),
]


class Slurm:
    """A Slurm of this machine, and jobs that are given to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",  # one device a process
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        }

    def __call__(self, *words: object) -> str:
        """What a command says."""
        done = subprocess.run([str(w) for w in words], env=self.env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """The number of a job of two tasks."""
        options = ("--parsable", "--ntasks-per-node=2", f"--output={self.folder}/job-%j")
        return self("sbatch", *options, "launch/slurm.sbatch", *arguments)

    def shown(self, job: str, field: str) -> str:
        """A field of a job."""
        fields = (word.partition("=") for word in self("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in fields}[field]

    def said(self, job: str) -> str:
        """What a job has said so far."""
        file = self.folder / f"job-{job}"
        return file.read_text() if file.exists() else ""

    def wait_for(self, job: str, *states: str, within: float = 240) -> str:
        """The first of these states that a job is in."""
        end = time.monotonic() + within
        while (state := self.shown(job, "JobState")) not in states:
            assert time.monotonic() < end, (state, self.said(job)[-3000:])
            time.sleep(0.2)
        return state


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    """A cluster of one node."""
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    script = ROOT / "tests/launch/slurm.sh"
    cluster(script, "start", cluster.folder)
    yield cluster
    cluster(script, "stop", cluster.folder)


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, so far."""
    file = workdir / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_tasks_are_stopped_and_go_on_and_log_the_losses_of_one_process(slurm, tmp_path):
    settings = {**SETTINGS, "run.compile_cache": tmp_path / "cache", "data.index_cache": tmp_path / "cache"}
    arguments = ["--config=configs/shapes_stage1.py", *(f"--config.{k}={v}" for k, v in settings.items())]
    job = slurm.submit(*arguments, f"--workdir={tmp_path / 'two'}")
    while not losses(tmp_path / "two"):
        assert slurm.shown(job, "JobState") in ("PENDING", "RUNNING"), slurm.said(job)[-3000:]
        time.sleep(0.2)
    slurm("scancel", "--signal=TERM", job)
    slurm.wait_for(job, "PENDING")
    assert "stopped by SIGTERM: step " in slurm.said(job)
    before = max(losses(tmp_path / "two"))
    assert before < STEPS
    time.sleep(3)  # the stopped credential is revoked, and so is one that is made in the same second
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", slurm.said(job)[-3000:]
    assert slurm.shown(job, "Restarts") == "1"

    slurm(ROOT / "launch/local.sh", *arguments, f"--workdir={tmp_path / 'one'}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert set(one) == set(two) == set(range(1, STEPS + 1))
    np.testing.assert_allclose(*([run[step] for step in sorted(run)] for run in (two, one)), rtol=1e-4)


def test_an_error_is_not_queued_again(slurm):
    job = slurm.submit("--config=configs/there_is_none.py")
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert slurm.shown(job, "ExitCode") == "1:0" and slurm.shown(job, "Restarts") == "0"
    assert "error: " in slurm.said(job) and "there_is_none.py" in slurm.said(job)
