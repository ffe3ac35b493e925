"""A training that is killed at random moments ends in the numbers of one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kills", "--kills=5", f"--folder={tmp_path}"]
    env = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # one device, as users have
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1500, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"] and result["kills"] == 5 and result["in_saves"] >= 1 and result["numbers"] > 10**6
