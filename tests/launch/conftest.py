"""Stand-ins for the programs of the platforms: they record how they were called and answer as told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STAND_IN = """#!{python} -IS
import json, os, pathlib, sys
words, folder = sys.argv[1:], pathlib.Path({folder!r})
call = " ".join(words)
answers = json.loads((folder / "answers").read_text())
kind = next((kind for kind in answers if kind in call), "")
with open(folder / "calls", "r+") as calls:
    before = sum(json.loads(line)[0] == kind for line in calls)
    calls.write(json.dumps([kind, words]) + "\\n")
status, said = (answers.get(kind) or [[0, ""]])[min(before, len(answers.get(kind, [0])) - 1)]
print(said)
sys.exit(status)
"""


class StandIn:
    """Programs on PATH that record their arguments.

    Attributes:
      answers: part of a call -> (status, output) of the first such call, the second and so on; the last one
        for all that follow.  Other calls succeed and say nothing.
    """

    def __init__(self, folder: Path, *names: str):
        self.folder, self.answers = folder, {}
        (folder / "bin").mkdir()
        for name in names:
            program = folder / "bin" / name
            program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)

    def run(self, launcher: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """The launcher with these arguments and environment variables; calls are those of this run."""
        (self.folder / "answers").write_text(json.dumps(self.answers))
        (self.folder / "calls").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [LAUNCH / launcher, *arguments],
            env={"PATH": path, "HOME": str(self.folder), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        return [json.loads(line)[1] for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def gcloud(tmp_path) -> StandIn:
    """``gcloud``, and ``git``, which packs what is copied."""
    return StandIn(tmp_path, "gcloud", "git")


@pytest.fixture
def xpk(tmp_path) -> StandIn:
    """``xpk``."""
    return StandIn(tmp_path, "xpk")


@pytest.fixture
def program(tmp_path) -> Path:
    """A program in the place of ``python`` that writes its arguments and COORDINATOR_ADDRESS to ``said``."""
    file = tmp_path / "python"
    file.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$COORDINATOR_ADDRESS" "$NUM_PROCESSES" "$PROCESS_ID" "$@"'
        f" > {tmp_path}/said\n"
    )
    file.chmod(0o755)
    return file
