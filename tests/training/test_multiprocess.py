"""The same two steps on one process and on two, over localhost."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("multiprocess_worker.py")


def run(count: int) -> list[tuple[float, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen([*command, str(rank), str(count), str(port)], stdout=-1, stderr=-1, text=True)
        for rank in range(count)
    ]
    results = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=240)
            found = re.search(r"LOSS (\S+) GRAD (\S+)", out)
            assert found, err[-3000:]
            results.append((float(found[1]), float(found[2])))
    finally:
        for worker in workers:
            worker.kill()
    return results


@pytest.mark.slow
def test_two_processes_take_the_step_of_one():
    (single,) = run(1)
    first, second = run(2)
    assert first == second
    np.testing.assert_allclose(first, single, rtol=1e-5)
