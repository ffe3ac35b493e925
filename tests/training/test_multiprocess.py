"""Steps and held-out images on one process and on several, over localhost: the same."""

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


def run(script: str, count: int, pattern: str, *arguments: str) -> list[tuple[str, ...]]:
    """What each of ``count`` processes printed, as the groups of ``pattern``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / script)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(port), *arguments], stdout=-1, stderr=-1, text=True
        )
        for rank in range(count)
    ]
    results = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=900)
            found = re.search(pattern, out)
            assert found, err[-3000:]
            results.append(found.groups())
    finally:
        for worker in workers:
            worker.kill()
    return results


@pytest.mark.slow
def test_two_and_four_processes_take_the_steps_of_one(tmp_path):
    """The same draws for each item, bit for bit, the gradients of the first step, and both losses."""

    def steps(count: int) -> dict[str, np.ndarray]:
        file = str(tmp_path / f"{count}.npz")
        printed = run("multiprocess_worker.py", count, r"LOSS (\S+) GRAD (\S+)", file)
        assert len(printed) == count and len(set(printed)) == 1, "all processes know the global numbers"
        with np.load(file) as found:
            return dict(found)

    single = steps(1)
    assert sum(name.startswith("draw") for name in single) == 4 and np.ptp(single["draw timesteps"]) > 0
    for count in (2, 4):
        several = steps(count)
        assert several.keys() == single.keys()
        largest = max(np.abs(value).max() for name, value in single.items() if name.startswith("gradient"))
        for name, value in single.items():
            if name.startswith("draw"):
                assert (several[name] == value).all(), name
                continue
            # A key's bias has no gradient: what is there is rounding.
            scale = largest if name.endswith("k_proj/bias") else np.abs(value).max()
            assert np.abs(several[name] - value).max() <= 1e-5 * scale, (count, name)


@pytest.mark.slow
def test_every_process_has_the_held_out_images_of_all():
    pattern = r"IMAGES (\[.*?\]) (\[.*?\]) (\[.*?\])"
    (single,) = run("images_worker.py", 1, pattern)
    assert single[:2] == ("[2, 3, 5, 7]", "[102, 103, 105, 107]") and len(set(json.loads(single[2]))) > 1
    assert run("images_worker.py", 2, pattern) == [single] * 2
