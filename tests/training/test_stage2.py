"""Stage 2 starts from a stage-1 checkpoint, and its own checkpoint is complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_stage_2_inherits_and_stands_alone(tmp_path):
    worker = Path(__file__).with_name("stage2_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert "DONE" in done.stdout, done.stderr[-3000:]
