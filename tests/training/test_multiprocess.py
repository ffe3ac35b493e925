"""Steps and held-out images on one process and on two, over localhost: the same."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def run(script: str, count: int, pattern: str) -> list[tuple[str, ...]]:
    """What each of ``count`` processes printed, as the groups of ``pattern``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / script)]
    workers = [
        subprocess.Popen([*command, str(rank), str(count), str(port)], stdout=-1, stderr=-1, text=True)
        for rank in range(count)
    ]
    results = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=240)
            found = re.search(pattern, out)
            assert found, err[-3000:]
            results.append(found.groups())
    finally:
        for worker in workers:
            worker.kill()
    return results


@pytest.mark.slow
def test_two_processes_take_the_step_of_one():
    def step(count):
        found = run("multiprocess_worker.py", count, r"LOSS (\S+) GRAD (\S+)")
        return [tuple(map(float, values)) for values in found]

    (single,) = step(1)
    first, second = step(2)
    assert first == second
    np.testing.assert_allclose(first, single, rtol=1e-5)


@pytest.mark.slow
def test_every_process_has_the_held_out_images_of_all():
    pattern = r"IMAGES (\[.*?\]) (\[.*?\]) (\[.*?\])"
    (single,) = run("images_worker.py", 1, pattern)
    assert single[:2] == ("[2, 3, 5, 7]", "[102, 103, 105, 107]") and len(set(json.loads(single[2]))) > 1
    assert run("images_worker.py", 2, pattern) == [single] * 2
