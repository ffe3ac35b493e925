"""Reading safetensors files and folders, filling towers; and what is said of bad files."""

from __future__ import annotations

import json
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file as torch_load
from safetensors.torch import save_file as torch_save

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.files import read_json
from minigpt5_jax.weights.formats.load import count_non_finite, load_tower, open_weights
from minigpt5_jax.weights.formats.save import save_safetensors
from minigpt5_jax.weights.table import Rule, Table, WeightTableError, linear_rules

TABLE = Table((*linear_rules("l.{i}.fc", "layers/fc"), Rule("ids", "ids")))
SHAPES = {"layers/fc/kernel": (2, 3, 4), "layers/fc/bias": (2, 4), "ids": (2,)}


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"l.{i}.fc.weight": rng.standard_normal((4, 3)).astype(dtype) for i in range(2)}
    made |= {f"l.{i}.fc.bias": rng.standard_normal(4).astype(dtype) for i in range(2)}
    return {**made, "ids": np.arange(2, dtype=np.int64)}


def write_shards(folder, name="model.safetensors.index.json"):
    first = {k: v for k, v in tensors().items() if k.startswith("l.0")}
    second = {k: v for k, v in tensors().items() if k not in first}
    save_safetensors(folder / "part-1.safetensors", first)
    save_safetensors(folder / "part-2.safetensors", second)
    where = dict.fromkeys(first, "part-1.safetensors") | dict.fromkeys(second, "part-2.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in right
    )


def test_every_layout_gives_the_same_tensors(tmp_path):
    save_safetensors(tmp_path / "one.safetensors", tensors(), {"tower": "toy"})
    source = open_weights(tmp_path / "one.safetensors")
    assert same(source, tensors()) and source.metadata == {"tower": "toy"}
    assert "ids" in source and "other" not in source and len(source) == 5
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        folder = tmp_path / name.split(".")[0]
        save_safetensors(folder / name, tensors())
        assert same(open_weights(folder), tensors())
    for name in ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"):
        folder = tmp_path / ("sharded_" + name)
        folder.mkdir()
        write_shards(folder, name)
        assert same(open_weights(str(folder)), tensors())


def test_dtypes_are_those_of_the_file_and_torch_agrees(tmp_path):
    mixed = {
        "a": torch.randn(3, 2, dtype=torch.bfloat16),
        "b": torch.randn(4, dtype=torch.float16),
        "c": torch.randn(2),
        "d": torch.arange(3),
        "e": torch.tensor(2.5),
    }
    torch_save(mixed, tmp_path / "torch.safetensors")
    source = open_weights(tmp_path / "torch.safetensors")
    assert [source[k].dtype for k in "abcde"] == [
        ml_dtypes.bfloat16,
        np.float16,
        np.float32,
        np.int64,
        np.float32,
    ]
    save_safetensors(tmp_path / "ours.safetensors", dict(source))
    again = torch_load(tmp_path / "ours.safetensors")
    assert all(torch.equal(again[k], mixed[k]) and again[k].dtype == mixed[k].dtype for k in mixed)


def test_load_tower_stacks_and_casts_floating_leaves_only(tmp_path):
    save_safetensors(tmp_path / "one.safetensors", tensors())
    source = open_weights(tmp_path / "one.safetensors")
    params = load_tower(TABLE, source, SHAPES)
    assert params["layers/fc/kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["layers/fc/kernel"][1], tensors()["l.1.fc.weight"].T)
    half = load_tower(TABLE, source, SHAPES, dtype=jnp.bfloat16)
    assert half["layers/fc/bias"].dtype == ml_dtypes.bfloat16 and half["ids"].dtype == np.int64
    np.testing.assert_array_equal(half["layers/fc/bias"], params["layers/fc/bias"].astype(ml_dtypes.bfloat16))
    wide = load_tower(TABLE, tensors(ml_dtypes.bfloat16), SHAPES, dtype=np.float32)
    assert wide["layers/fc/kernel"].dtype == np.float32


def test_a_source_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "one.safetensors"
    save_safetensors(path, {**tensors(), "head.weight": np.ones(1)})
    with pytest.raises(WeightTableError, match=r"one\.safetensors: (.|\n)*head\.weight"):
        load_tower(TABLE, open_weights(path), SHAPES)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist; download"):
        open_weights(tmp_path / "absent.safetensors")
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"weights\.npz, but none of model\.safetensors"):
        open_weights(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 shards, 1 of them missing: .*part-2.*download"):
        open_weights(tmp_path)


def bad_files() -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "is empty"),
        "short": (b"\x09\x00", "truncated"),
        "html": (b"<html>404</html>" * 8, "not a safetensors file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "zip": (b"PK\x03\x04" + bytes(60), "truncated or no file of PyTorch"),
        "pickle": (pickle.dumps({"model": 1}, protocol=2), "a pickle, but not one of PyTorch"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_files_of_another_kind(tmp_path, name):
    content, message = bad_files()[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightFileError, match=rf"bad\.safetensors.*{message}"):
        open_weights(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("start", [b"\x80\x00\x00\x00", b"PK\x00\x00"])
def test_a_header_length_that_begins_like_another_format(tmp_path, start):
    """The first bytes of safetensors are a number, which may look like a pickle's or a zip file's."""
    size = int.from_bytes(start, "little")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = size.to_bytes(8, "little") + header.ljust(size) + np.float32(7).tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    assert open_weights(tmp_path / "x.safetensors")["a"].tolist() == [7]


def test_tensors_that_are_not_aligned(tmp_path):
    """Nothing in the format says that they are."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + b"\x01" + np.float32([7, 8]).tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    value = open_weights(tmp_path / "x.safetensors")["b"]
    assert value.tolist() == [7, 8] and value.flags.aligned


def test_small_floats_are_refused_when_they_are_read(tmp_path):
    small = torch.ones(2).to(torch.float8_e4m3fn)
    torch_save({"w": torch.ones(2), "small": small}, tmp_path / "x.safetensors")
    source = open_weights(tmp_path / "x.safetensors")
    assert source["w"].tolist() == [1, 1]
    with pytest.raises(WeightFileError, match=r"x\.safetensors: 'small' is F8_E4M3, which is not supported"):
        source["small"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_values_that_are_no_numbers_are_counted(dtype):
    value = np.random.default_rng(0).standard_normal((3, 1 << 20)).astype(dtype)
    value[0, 0] = np.finfo(np.float16).max  # large, but a number
    assert count_non_finite(value) == count_non_finite(value.T) == count_non_finite(value[:, ::2]) == 0
    value[1, 5], value[2, 8], value[2, -1] = np.nan, -np.inf, np.inf
    assert count_non_finite(value) == count_non_finite(value.T) == 3
    assert count_non_finite(value[:, ::2]) == 1
    assert count_non_finite(np.arange(3)) == count_non_finite(np.zeros(0, dtype)) == 0


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(WeightFileError, match=r"model\.safetensors.*truncated.*download it again"):
        open_weights(tmp_path)


def test_index_that_lies(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["l.9.fc.bias"] = "part-1.safetensors"
    index.write_text(json.dumps(content))
    source = open_weights(tmp_path)  # some tensors are in one of them only, and no model reads them
    assert source["l.0.fc.bias"].shape == (4,)
    with pytest.raises(WeightFileError, match=r"part-1\.safetensors lacks 'l\.9\.fc\.bias'"):
        source["l.9.fc.bias"]
    del content["weight_map"]["l.9.fc.bias"]
    left_out = next(iter(content["weight_map"]))  # it would be lost without a word
    shard = content["weight_map"].pop(left_out)
    index.write_text(json.dumps(content))
    with pytest.raises(WeightFileError, match=f"{shard} holds '{left_out}', which .* does not name"):
        open_weights(tmp_path)[left_out]
    content["weight_map"][left_out] = next(name for name in content["weight_map"].values() if name != shard)
    index.write_text(json.dumps(content))
    with pytest.raises(WeightFileError, match=f"{shard} holds '{left_out}', which .* in another shard"):
        open_weights(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(WeightFileError, match=r"index\.json is not an index of weights"):
            open_weights(tmp_path)


def test_folders_with_copies_in_half_precision_only(tmp_path):
    save_safetensors(tmp_path / "one/diffusion_pytorch_model.fp16.safetensors", tensors(np.float16))
    assert same(open_weights(tmp_path / "one"), tensors(np.float16))
    save_safetensors(tmp_path / "one/diffusion_pytorch_model.safetensors", tensors())
    assert same(open_weights(tmp_path / "one"), tensors()), "only where there is nothing else"
    (tmp_path / "more").mkdir()
    write_shards(tmp_path / "more", "model.safetensors.index.fp16.json")
    assert same(open_weights(tmp_path / "more"), tensors())


def test_links_to_nothing_are_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs/0")
    link = r"model\.safetensors is a link to .*blobs/0, where nothing is; download it again"
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=link):
            open_weights(path)
    save_safetensors(tmp_path / "blobs/0", tensors())
    assert same(open_weights(tmp_path), tensors())
    write_shards(tmp_path / "blobs")
    (tmp_path / "blobs/part-2.safetensors").unlink()
    (tmp_path / "blobs/part-2.safetensors").symlink_to("1")
    with pytest.raises(FileNotFoundError, match=r"1 of them missing: .* is a link to 1, where nothing is"):
        open_weights(tmp_path / "blobs")


def test_small_files_that_are_none(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(WeightFileError, match=r"config\.json does not exist"):
        read_json(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightFileError, match=r"config\.json is a Git LFS pointer.*git lfs pull"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(WeightFileError, match=r"config\.json: no valid JSON"):
        read_json(path)
