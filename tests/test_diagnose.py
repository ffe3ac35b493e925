"""What ``diagnose`` measures, and what it says is wrong."""

from __future__ import annotations

import functools
import json

import pytest

import commands
from minigpt5_jax.config import validate
from minigpt5_jax.diagnosis import measure, report
from minigpt5_jax.diagnosis.report import as_text, diagnose
from tiny import shapes_stage1

COMMAND = "from minigpt5_jax import diagnose; diagnose.main()"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "BYTES", 2**20)
    monkeypatch.setattr(measure, "samples", functools.partial(measure.samples, seconds=0.1))
    monkeypatch.setattr(measure, "collectives", functools.partial(measure.collectives, size=2**16))
    monkeypatch.setattr(report, "ACCELERATORS", {})
    monkeypatch.setattr(report, "SLOW_WRITE", 0.0)
    monkeypatch.setattr(report, "SLOW_READ", 0.0)
    made = shapes_stage1()
    made.data.update(
        shapes_train=12, shapes_validation=2, worker_count=0, global_batch=8, instruction_every=0
    )
    made.data.index_cache = str(tmp_path / "lengths")
    made.run.compile_cache = str(tmp_path / "cache")
    return validate(made)


def test_an_open_split_of_the_language_model_is_settled_as_in_training(config, tmp_path):
    assert config.mesh.tensor is None
    for data in (True, False):
        found = diagnose(config, data=data, folder=str(tmp_path))
        assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert found["rates"]["collectives_data_gb_s"] > 0


def test_everything_is_measured_and_nothing_looks_wrong(config, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/step-0-cache").write_bytes(b"x" * 1000)
    config.mesh.tensor = 2
    found = diagnose(config, data=True, folder=str(tmp_path / "run"))
    assert json.loads(json.dumps(found)) == found
    assert found["wrong"] == []
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    rates = found["rates"]
    assert rates.keys() == {
        "host_to_device_gb_s",
        "device_to_host_gb_s",
        "collectives_data_gb_s",
        "collectives_tensor_gb_s",
        "storage_write_mb_s",
        "storage_read_mb_s",
        "loader_samples_s",
    }
    assert min(rates.values()) > 0
    assert found["devices"]["count"] == 8 and found["devices"]["platform"] == "cpu"
    assert found["compile_cache"] == {"folder": str(tmp_path / "cache"), "programs": 1, "gb": 1e-6}
    assert found["storage"]["folder"] == str(tmp_path) and found["data"]["samples"] == 12
    assert {"jax", "jaxlib", "python"} <= found["versions"].keys()
    text = as_text(found)
    assert "loader samples s" in text and text.endswith("what looks wrong\n  * nothing")
    assert not (tmp_path / "run").exists(), "nothing is left"


def test_what_is_wrong_is_said_with_the_remedy(config, tmp_path, monkeypatch):
    config.run.compile_cache = ""
    config.mesh.data = 3
    config.data.update(worker_count=10_000, format="cc3m", train=str(tmp_path / "none.tsv"))
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(report, "ACCELERATORS", {str(tmp_path / "nvidia0"): ("an NVIDIA GPU", "cuda")})
    monkeypatch.setattr(report, "LITTLE_SHARED", 2**60)
    monkeypatch.setattr(report, "SLOW_READ", 1e9)
    monkeypatch.setattr(
        report, "_required", lambda: ["jax<0.1", "no-such-thing>=2", "numpy; python_version < '3'"]
    )
    monkeypatch.setattr(report, "checkpoint_bytes", lambda config, spec: 10**18)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    wrong = "\n".join(diagnose(config, data=True, folder=str(tmp_path))["wrong"])
    for line in (
        "pip install 'jax<0.1'",
        "no-such-thing is not installed: pip install 'no-such-thing>=2'",
        "10000 reader processes for",
        "more of it (docker run --shm-size=4g)",
        "JAX runs on the CPU: unset JAX_PLATFORMS=cpu",
        "mesh data=3 fsdp=1 tensor=1 does not divide 8 devices",
        "MB/s: checkpoints and images want a faster disk",
        "no compile cache, so every start compiles anew: set run.compile_cache",
        "the checkpoints of this run take 1000000000.0",
        "training data: ",
    ):
        assert line in wrong, line
    assert "numpy" not in wrong
    monkeypatch.delenv("JAX_PLATFORMS")
    wrong = diagnose(config, data=False, folder=str(tmp_path))["wrong"]
    assert any("pip install 'minigpt5_jax[cuda]'" in line for line in wrong)


def test_storage_that_cannot_be_written(config, tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(measure, "storage", refuse)
    found = diagnose(config, data=False, folder=str(tmp_path))
    assert "storage_write_mb_s" not in found["rates"]
    assert any(
        "cannot be written (Permission denied): choose another --workdir" in line for line in found["wrong"]
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("command"), "minigpt5_jax.diagnose", COMMAND)


def test_the_command_prints_one_object(command, tmp_path):
    done = command("--json", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert {"versions", "devices", "mesh", "rates", "compile_cache", "wrong"} <= json.loads(
        done.stdout
    ).keys()
    wrong = command("--config=none.py")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: run file not found")
