"""Resuming is bit-exact: parameters, moments, draws and data order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_six_steps_equal_three_and_three_after_a_restart(tmp_path):
    worker = Path(__file__).with_name("resume_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert "EQUAL" in done.stdout, done.stderr[-3000:]
    refused = next(line for line in done.stdout.splitlines() if line.startswith("REFUSED"))
    assert "num_decoder_layers: checkpoint 4, this run 2" in refused
    data = next(line for line in done.stdout.splitlines() if line.startswith("DATA"))
    assert "training data or its order changed" in data and "data.samples: checkpoint 25, now 17" in data
