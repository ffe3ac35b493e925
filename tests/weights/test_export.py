"""The export command: what it refuses before and while it writes, and what it leaves behind (nothing)."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

import commands
import minigpt5_jax
from minigpt5_jax.config import ConfigError, get_config
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.export import export_torch
from minigpt5_jax.shapes.files import ASSETS
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.weights.export.model import ExportError, PretrainedTower
from minigpt5_jax.weights.formats.load import WeightFileError, open_weights
from minigpt5_jax.weights.formats.save import save_safetensors
from minigpt5_jax.wiring.export_view import formats_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    yield from commands.serve(tmp_path_factory.mktemp("command"), "minigpt5_jax.export")


def test_the_command_says_what_it_wrote(command, run_folder, tmp_path):
    output = tmp_path / "deep" / "mapper"
    done = command("--checkpoint", str(run_folder("stage1")), "--to", "mapper", "--output", str(output))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    size = sum(file.stat().st_size for file in output.iterdir())
    assert lines[0] == f"{output}: 69 tensors, 4 files, {size:,} bytes"
    assert [line.split()[1] for line in lines[1:]] == sorted(file.name for file in output.iterdir())
    assert output.stat().st_mode & 0o777 == 0o755


def test_the_command_says_what_is_wrong(command, run_folder, tmp_path):
    given = ("--checkpoint", str(run_folder("stage1")), "--output", str(tmp_path / "out"))
    done = command(*given, "--to", "onnx")
    assert done.returncode == 1 and done.stdout == ""
    known = ", ".join(formats_of(get_config()))
    assert done.stderr == f"error: unknown format 'onnx'; known for this model: {known}\n"
    done = command(*given[:3], str(tmp_path / ("a" * 300)), "--to", "mapper")  # of the file system
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/aaa")
    assert done.stderr.endswith("aaa: File name too long\n")


def test_safetensors_is_another_name_of_mapper():
    assert formats_of(get_config())["safetensors"].write == formats_of(get_config())["mapper"].write


def test_it_is_public():
    assert minigpt5_jax.export_torch is export_torch


@pytest.mark.parametrize(
    "values, error, message",
    [
        (
            {"to": "onnx"},
            ExportError,
            "known for this model: minigpt5, peft, transformers, mapper, safetensors, diffusers",
        ),
        ({"dtype": "int8"}, ExportError, "float32, bfloat16, float16"),
        ({"to": "minigpt5", "dtype": "float32", "output": "a.ckpt"}, ExportError, "no option 'dtype'"),
        ({"merge": False}, ExportError, "no option 'merge'; it takes dtype"),
        ({"to": "minigpt5"}, ExportError, r"--output NAME\.ckpt"),
        ({"checkpoint": "/no/such/run"}, CheckpointError, "/no/such/run"),
        ({"step": 3}, CheckpointError, "no step 3; it has"),
        ({"weights": {"lmm": "x"}}, ConfigError, "unknown weight sources.*lmm"),
        ({"to": "peft", "weights": {"llm": "/no/such/llm"}}, ConfigError, "/no/such/llm"),
        ({"to": "diffusers", "weights": {"vae": "/no/such/vae"}}, ConfigError, "/no/such/vae"),
        ({"output": "there"}, FileExistsError, "already there"),
        ({"output": "there/file"}, FileExistsError, "already there"),
    ],
)
def test_refused(values, error, message, run_folder, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    given = {"checkpoint": run_folder("stage1"), "output": "out", "to": "mapper", **values}
    output = tmp_path / given.pop("output")
    with pytest.raises(error, match=message):
        export_torch(given.pop("checkpoint"), output, **given)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]
    assert (tmp_path / "there" / "file").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore, of lost files
def test_a_checkpoint_that_is_half_written(run_folder, tmp_path):
    """As a killed run leaves it: Orbax's temporary name, or a folder without all of its files."""
    shutil.copytree(run_folder("stage1"), tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    [step] = [path for path in steps.iterdir() if path.name.startswith("0")]
    step.rename(steps / f"{step.name}.orbax-checkpoint-tmp-17")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export_torch(tmp_path / "run", tmp_path / "out", to="mapper")
    (steps / f"{step.name}.orbax-checkpoint-tmp-17").rename(step)
    for file in (step / "trainable").rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            file.unlink()
    with pytest.raises(CheckpointError, match="step 7 in .* cannot be read"):
        export_torch(tmp_path / "run", tmp_path / "out", to="mapper")
    assert not (tmp_path / "out").exists()


def test_other_pretrained_weights_are_refused(run_folder, tmp_path):
    shutil.copytree(ASSETS / "llama", tmp_path / "llama")
    values = dict(open_weights(ASSETS / "llama"))
    name = "model.layers.2.mlp.down_proj.weight"
    values[name] = np.array(values[name])
    values[name][3, 5] += 1
    save_safetensors(tmp_path / "llama" / "model.safetensors", values)
    given = {"llm": str(tmp_path / "llama")}
    with pytest.raises(CheckpointError, match=r"frozen.backbone/llm"):
        export_torch(run_folder("stage1"), tmp_path / "out", to="transformers", weights=given)
    assert export_torch(run_folder("stage1"), tmp_path / "mapper", to="mapper", weights=given).tensors == 69


def test_other_words_are_refused(run_folder, oracle_dir, tmp_path):
    given = {"tokenizer": str(oracle_dir / "tokenizer_llama")}
    with pytest.raises((CheckpointError, DataError), match=r"pieces|tokenizer.backbone"):
        export_torch(run_folder("stage1"), tmp_path / "out", to="transformers", weights=given)


def test_a_truncated_source_leaves_nothing(run_folder, tmp_path):
    shutil.copytree(ASSETS / "llama", tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    given = {"llm": str(tmp_path / "llama")}
    with pytest.raises(WeightFileError, match="truncated"):
        export_torch(run_folder("stage1"), tmp_path / "out", to="transformers", weights=given)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_failure_while_writing_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minigpt5_jax.weights.export.transformers.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_torch(run_folder("stage1"), tmp_path / "out", to="transformers")
    assert not list(tmp_path.iterdir())


def test_one_tensor_of_the_language_model_at_a_time(run_folder, tmp_path, monkeypatch):
    """What was read is let go before the next one is: an export of 7B needs the room of a tensor."""
    alive, most = weakref.WeakSet(), []
    parts = PretrainedTower._parts

    class Watched(np.ndarray):
        __hash__ = object.__hash__

    def watched(self, item):
        values = tuple(value.view(Watched) for value in parts(self, item))
        alive.update(values)
        most.append(len(alive))
        return values

    monkeypatch.setattr(PretrainedTower, "_parts", watched)
    export_torch(run_folder("stage1"), tmp_path / "out", to="transformers")
    assert len(most) >= 2 * 39, "once for the hash, once to be written"
    assert max(most) <= 2
