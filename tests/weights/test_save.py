"""Writing safetensors: exact, in the published form, and all or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file as torch_load

from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.formats.save import save_safetensors, save_sharded
from minigpt5_jax.weights.view import View


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "flag": np.array([True, False, True]),
        "w": rng.standard_normal((5, 4)).astype(np.float32),
        "odd": rng.standard_normal(3).astype(ml_dtypes.bfloat16),
        "ids": np.arange(4, dtype=np.int64),
        "half": rng.standard_normal((2, 4)).astype(np.float16),
        "scalar": np.float32(2.5),
        "transposed": rng.standard_normal((3, 4)).T,
        "none": np.zeros((0, 3), np.float32),
    }


def test_every_reader_gives_back_what_was_written(tmp_path):
    save_safetensors(tmp_path / "new" / "x.safetensors", tensors(), {"tower": "toy"})
    ours, theirs = open_weights(tmp_path / "new/x.safetensors"), torch_load(tmp_path / "new/x.safetensors")
    assert ours.metadata == {"tower": "toy"} and ours.keys() == theirs.keys() == tensors().keys()
    for name, value in tensors().items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
        torch_value = theirs[name].float() if name == "odd" else theirs[name]
        np.testing.assert_array_equal(torch_value.numpy(), np.asarray(value, torch_value.numpy().dtype))
    assert os.listdir(tmp_path / "new") == ["x.safetensors"]


def test_a_lazy_mapping_is_read_once_and_one_by_one(tmp_path):
    log = []
    lazy = View({}, {name: lambda name=name: log.append(name) or np.ones(4) for name in "abc"})
    save_safetensors(tmp_path / "x.safetensors", lazy)
    save_sharded(tmp_path / "y", lazy, max_shard_size=64)
    # The type checker of the tests looks at first items.
    assert [name for name in log if name != "a"] == ["b", "c"] * 2


def test_shards_have_an_index_that_torch_users_know(tmp_path):
    files = save_sharded(tmp_path, tensors(), {"format": "pt"}, max_shard_size=100)
    count = len(files) - 1
    assert [file.name for file in files[:-1]] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert count > 2
    assert files[-1].name == "model.safetensors.index.json" and set(tmp_path.iterdir()) == set(files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    together = {}
    for file in files[:-1]:
        part = torch_load(file)
        assert {name: file.name for name in part} == {
            name: where for name, where in index["weight_map"].items() if where == file.name
        }
        size = sum(value.numel() * value.element_size() for value in part.values())
        assert size <= 100 or len(part) == 1
        together |= part
    assert together.keys() == tensors().keys() == open_weights(tmp_path).keys()
    assert torch.equal(together["ids"], torch.arange(4))
    # Fewer shards later: nothing of the former ones is left to be mixed up with them.
    assert save_sharded(tmp_path, tensors()) == [tmp_path / "model.safetensors"]
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": np.ones(2)})
    before = path.read_bytes()
    bad = {"a": np.zeros(2), "b": np.array([object()])}
    with pytest.raises(TypeError, match=r"'b' has dtype object"):
        save_safetensors(path, bad)
    with pytest.raises(TypeError, match=r"'b' has dtype object"):
        save_sharded(tmp_path, bad, stem="x", max_shard_size=8)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


WRITER = """
import sys, time
import numpy as np
from minigpt5_jax.weights.formats.save import save_safetensors, save_sharded
from minigpt5_jax.weights.view import View

def slow(name):
    if name == "c":
        print("half", flush=True)
        time.sleep(60)
    return np.ones(1 << 16)

lazy = View({}, {name: lambda name=name: slow(name) for name in "abcd"})
if sys.argv[2] == "one":
    save_safetensors(sys.argv[1] + "/model.safetensors", lazy)
else:
    save_sharded(sys.argv[1], lazy, max_shard_size=1 << 19)
"""


@pytest.mark.parametrize("form", ["one", "sharded"])
def test_a_killed_save_leaves_nothing_that_counts_and_the_next_one_starts_clean(tmp_path, form):
    command = [sys.executable, "-c", WRITER, str(tmp_path), form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        hidden = os.listdir(tmp_path)
        assert hidden and all(name.startswith(".") for name in hidden)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        open_weights(tmp_path)
    time.sleep(0.1)  # the lock goes with the process
    whole = {name: np.full(4, i) for i, name in enumerate("abcd")}
    if form == "one":
        save_safetensors(tmp_path / "model.safetensors", whole)
        assert os.listdir(tmp_path) == ["model.safetensors"]
    else:
        files = save_sharded(tmp_path, whole, max_shard_size=40)
        assert set(tmp_path.iterdir()) == set(files)
    assert {name: value.tolist() for name, value in open_weights(tmp_path).items()} == {
        name: value.tolist() for name, value in whole.items()
    }


def test_a_file_that_another_process_writes_is_left_alone(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path), "one"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        save_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2)})
        assert len(os.listdir(tmp_path)) == 2
        process.kill()
