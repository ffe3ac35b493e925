"""The train command on two processes, continued on four and another mesh: the losses of one process alone.

Two processes write the features of their images, and read each other's in the second epoch; one process
encodes its images in each step.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.data.sources.features import FeatureStore
from minigpt5_jax.wiring.restore import open_checkpoints, open_run, trained_parameters

ROOT = Path(__file__).parents[2]
DEVICES = 4


def train(workdir: Path, steps: int, count: int, cache: Path, features: str, fsdp: int = 1) -> str:
    """``python -m minigpt5_jax.train`` on ``count`` processes that share four devices' worth of work.

    Args:
      features: ``data.cache``.

    Returns:
      What the main process said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "run.num_steps": steps,
        "run.log_every": 1,
        "run.eval_every": steps,  # once, at the end
        "run.save_every": 2,
        "run.grid_every": 4,
        "run.compile_cache": cache,
        "data.global_batch": 4,
        "data.cache": features,
        "data.shapes_train": 11,
        "data.instruction_every": 0,
        "data.shapes_validation": 4,
        "data.buckets": (28, 40),
        "data.max_length": 40,
        "data.index_cache": cache,
        "optimizer.warmup_steps": 1,
        "inference.num_inference_steps": 2,
        "mesh.fsdp": fsdp,
    }
    command = [sys.executable, "-m", "minigpt5_jax.train", "--config", "configs/shapes_stage1.py"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]
    flags = (
        f"--xla_force_host_platform_device_count={DEVICES // count} "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    joined = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": str(count)} if count > 1 else {}
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=-1,
            stderr=-1,
            text=True,
            env=base | joined | ({"PROCESS_ID": str(rank)} if joined else {}),
        )
        for rank in range(count)
    ]
    said = []
    try:
        for worker in workers:
            said.append(worker.communicate(timeout=1200)[1])
            assert worker.returncode == 0, said[-1][-3000:]
        return said[0]
    finally:
        for worker in workers:
            worker.kill()


def logged(workdir: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric; the last one where a step was logged twice."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_two_processes_then_four_log_the_losses_of_one(tmp_path):
    train(tmp_path / "one", 4, 1, tmp_path / "cache", "off")
    said = train(tmp_path / "many", 4, 2, tmp_path / "cache", "on")
    assert "features of 11 images to draw" in said and "features of all images are in" in said
    assert len(list((tmp_path / "many/features").glob("*.target.values"))) == 2, "one of each process"
    assert len(FeatureStore(tmp_path / "many/features")) == 11
    losses = {name: logged(tmp_path / name, "loss") for name in ("one", "many")}
    assert set(losses["one"]) == {1, 2, 3, 4}
    np.testing.assert_allclose(
        [losses["many"][s] for s in range(1, 5)], [losses["one"][s] for s in range(1, 5)], rtol=1e-4
    )
    for name in ("image", "image_t100", "caption"):
        seen = [logged(tmp_path / run, f"validation/{name}")[4] for run in ("one", "many")]
        np.testing.assert_allclose(*seen, rtol=1e-3, err_msg=name)
    assert 4 in logged(tmp_path / "many", "validation/oracle_all")
    grids = [np.asarray(Image.open(tmp_path / run / "images/held_out_000004.png")) for run in ("one", "many")]
    assert np.abs(grids[0].astype(float) - grids[1]).mean() < 1.0, "a grid has the images of every process"
    weights_are_near(tmp_path)
    # The last checkpoint goes; what is left was written by two processes and is continued by four.
    (newest,) = [p for p in (tmp_path / "many" / "checkpoints").iterdir() if int(p.name) == 4]
    newest.rename(tmp_path / "gone")
    said = train(tmp_path / "many", 4, 4, tmp_path / "cache", "on", fsdp=2)
    assert "images are not encoded: their features are in" in said
    again = logged(tmp_path / "many", "loss")
    np.testing.assert_allclose([again[3], again[4]], [losses["one"][3], losses["one"][4]], rtol=1e-4)


def weights_are_near(folder: Path) -> None:
    """What one process and several trained, both read here, differ by little of what training moved."""
    (one, before), (many, _) = (
        [
            trained_parameters(open_checkpoints(folder / name), open_run(folder / name).spec, step)
            for step in (4, 2)
        ]
        for name in ("one", "many")
    )
    assert one.keys() == many.keys()
    for path, value in one.items():
        if path.endswith("k_proj/bias"):  # it has no gradient but rounding, of which AdamW makes whole steps
            continue
        moved = np.abs(np.asarray(value) - before[path]).max()
        apart = np.abs(np.asarray(value) - many[path]).max()
        assert moved > 0 and apart <= moved / 100, f"{path}: {apart / moved:.1e} of what it moved"
