"""All launchers: shellcheck, the one status that starts training again, and ``launch/local.sh``."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
PROGRAM = """#!/usr/bin/env bash
# The n-th start ends with the n-th status; `wait` stays until a signal.
set -- "$(cat {folder}/starts 2>/dev/null)" {statuses}
echo "${{1}}x" > {folder}/starts
n=$((${{#1}} + 2))
trap 'exit 143' TERM
trap 'exit 130' INT
if [ "${{!n}}" = wait ]; then
    echo $$ > {folder}/pid
    while true; do sleep 0.1; done
fi
exit "${{!n}}"
"""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) == 4
    own = ROOT / "tests/launch/slurm.sh"
    done = subprocess.run(["shellcheck", *SCRIPTS, own], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_executed():
    assert all(os.access(script, os.X_OK) for script in LAUNCH.glob("*.sh"))


def test_the_status_that_starts_training_again_is_the_programs():
    saved = 128 + signal.SIGTERM
    for name in ("local.sh", "slurm.sbatch", "gcloud_tpu.sh"):
        assert re.findall(r"readonly SAVED=(\d+)", (LAUNCH / name).read_text()) == [str(saved)], name
    assert f"--restart-on-exit-codes={saved} " in (LAUNCH / "xpk.sh").read_text()


class Local:
    """``launch/local.sh`` with a program that ends with the given statuses, one a start."""

    def __init__(self, folder: Path, *statuses: int | str, **variables: str):
        self.folder = folder
        (folder / "python").write_text(PROGRAM.format(folder=folder, statuses=" ".join(map(str, statuses))))
        (folder / "python").chmod(0o755)
        env = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
        self.launcher = subprocess.Popen(
            [LAUNCH / "local.sh", "--config=a"], env=env, stderr=subprocess.PIPE, text=True
        )

    @property
    def program(self) -> int:
        """The process of the program that waits."""
        for _ in range(200):
            if (file := self.folder / "pid").exists() and (text := file.read_text()):
                return int(text)
            time.sleep(0.05)
        raise AssertionError("the program did not start")

    def end(self) -> tuple[int, int, str]:
        """Status of the launcher, number of starts, and what was said."""
        _, said = self.launcher.communicate(timeout=30)
        return self.launcher.returncode, len((self.folder / "starts").read_text().strip()), said


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [([0], 0, 1), ([143, 143, 0], 0, 3), ([1], 1, 1), ([143, 1], 1, 2), ([130], 130, 1), ([134], 134, 1)],
)
def test_local_starts_again_after_143_and_nothing_else(tmp_path, statuses, status, starts):
    assert Local(tmp_path, *statuses).end()[:2] == (status, starts)


def test_local_gives_up_at_last(tmp_path):
    status, starts, said = Local(tmp_path, 143, 143, 143, 143, RESTARTS="2").end()
    assert (status, starts) == (143, 3) and "RESTARTS=2 allows no more" in said


def test_local_goes_on_when_the_program_was_stopped(tmp_path):
    local = Local(tmp_path, "wait", 0)
    os.kill(local.program, signal.SIGTERM)
    assert local.end()[:2] == (0, 2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_stops_when_it_is_told_itself(tmp_path, number, status):
    local = Local(tmp_path, "wait", 0)
    assert local.program
    local.launcher.send_signal(number)
    assert local.end()[:2] == (status, 1)
