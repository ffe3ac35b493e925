"""PyTorch files without PyTorch: the same tensors, nothing is run, and what is said of bad files."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import zipfile
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.load import open_container, open_weights

LEGACY = {"_use_new_zipfile_serialization": False}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 3, dtype=torch.bfloat16),
        "single": base,
        "double": torch.randn(2, dtype=torch.float64),
        "ids": torch.arange(7),
        "flag": torch.tensor([True]),
        "byte": torch.arange(3, dtype=torch.uint8),
        "transposed": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def as_numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tensors_are_those_that_were_saved(tmp_path, options):
    torch.save(tensors(), tmp_path / "x.pth", **options)
    source = open_weights(tmp_path / "x.pth")
    assert list(source) == list(tensors()) and source.path == tmp_path / "x.pth"
    for name, value in tensors().items():
        want = as_numpy(value)
        assert source[name].dtype == want.dtype, name
        np.testing.assert_array_equal(source[name], want, err_msg=name)
        assert source[name].flags.aligned


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_state_dict_of_a_module_with_shared_storage(tmp_path, options):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tied = {**model.state_dict(), "tied": model[0].weight}
    state = model.state_dict()  # an OrderedDict with attributes
    torch.save(state, tmp_path / "plain.bin", **options)
    torch.save(tied, tmp_path / "tied.bin", **options)
    assert dict(open_weights(tmp_path / "plain.bin")).keys() == state.keys()
    source = open_weights(tmp_path / "tied.bin")
    np.testing.assert_array_equal(source["tied"], source["0.weight"])


def test_lightning_container(tmp_path, oracle_dir):
    content = {
        "epoch": 1,
        "global_step": 9000,
        "pytorch-lightning_version": "2.0.9",
        "state_dict": {"fc.0.bias": torch.ones(2)},
        "hparams_name": "kwargs",
        "hyper_parameters": {"learning_rate": 2e-5, "gpus": (0, 1), "args": argparse.Namespace(stage=1)},
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "dirpath": "out", "seen": {1, 2}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "size": torch.Size((2, 3)),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        "raw": b"\x00\xff",
    }
    torch.save(content, tmp_path / "x.ckpt")
    held = open_container(tmp_path / "x.ckpt")
    assert held["epoch"] == 1 and held["hyper_parameters"]["learning_rate"] == 2e-5
    assert held["hyper_parameters"]["args"].stage == 1 and held["raw"] == b"\x00\xff"
    assert held["callbacks"]["ModelCheckpoint"]["seen"] == {1, 2} and held["size"] == (2, 3)
    assert held["device"] == "cuda:1" and held["dtype"] == "float16"
    assert held["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [0, 0]
    assert open_weights(tmp_path / "x.ckpt", key="state_dict")["fc.0.bias"].tolist() == [1, 1]
    # and one that the original's own code wrote
    path = oracle_dir / "stage1.ckpt"
    ours, theirs = open_weights(path, key="state_dict"), torch.load(path, weights_only=True)["state_dict"]
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], as_numpy(value), err_msg=name)


def test_tensors_are_found_wherever_a_file_has_them(tmp_path):
    path = tmp_path / "x.pth"
    for place in ("model", "state_dict", "module"):
        torch.save({place: {"w": torch.ones(1)}, "epoch": 3}, path)
        for key in (None, "state_dict", "model", "epoch"):
            assert open_weights(path, key=key)["w"].tolist() == [1]
    torch.save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}, "epoch": 3}, path)
    assert open_weights(path, key="ema")["w"].tolist() == [0], "what is asked for comes first"
    torch.save({"w": torch.ones(1), "epoch": 3}, path)
    with pytest.raises(WeightFileError, match=r"more than tensors and has none alone \(int\): 'w', 'epoch'"):
        open_weights(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(WeightFileError, match=r"holds a list, not a dictionary"):
        open_container(path)


class Code:
    """Writes a file when a pickle of it is loaded."""

    def __init__(self, path, call=os.system):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (f"touch {self.path}",)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", [os.system, eval, __import__], ids=lambda call: call.__name__)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, options, call):
    proof, path = tmp_path / "proof", tmp_path / "evil.pth"
    torch.save({"model": {"w": torch.ones(1)}, "more": Code(proof, call)}, path, **options)
    with pytest.raises(WeightFileError, match=rf"evil\.pth is refused.*{call.__name__}.*never let run code"):
        open_weights(path, key="model")
    assert not proof.exists()


def test_paths_and_objects_of_other_packages_beside_tensors_are_no_matter(tmp_path):
    more = {
        "hyper_parameters": {"save_dir": pathlib.PosixPath("/x/y"), "scale": np.float64(0.5)},
        "callbacks": collections.defaultdict(list, {"stage": tiny.parts()[0].kind}),
        "strange": Strange(1, path="a"),
    }
    torch.save({"state_dict": {"w": torch.ones(1)}, **more}, tmp_path / "posix.ckpt")
    assert open_weights(tmp_path / "posix.ckpt")["w"].tolist() == [1]
    held = open_container(tmp_path / "posix.ckpt")
    assert held["hyper_parameters"]["save_dir"] == "/x/y" and held["callbacks"] == {"stage": "backbone"}
    assert "Strange" in repr(held["strange"]) and not Strange.made, "nothing of it was run"
    torch.save({"state_dict": {"w": torch.ones(1), "odd": Strange(2)}}, tmp_path / "odd.ckpt")
    with pytest.raises(WeightFileError, match=r"more than tensors under 'state_dict' \(.*Strange.*\)"):
        open_weights(tmp_path / "odd.ckpt")


class Strange(dict):
    """An object of a package that is not known."""

    made: ClassVar[list] = []

    def __init__(self, *args, **options):
        super().__init__({"key": 1})
        self.number = args

    def __setstate__(self, state):
        self.made.append(state)


def remedies(folder, state: dict) -> list:
    """Files that follow what messages advise: the tensors alone, by PyTorch and as safetensors."""
    torch.save(state, folder / "bare.ckpt")
    save_file(state, folder / "bare.safetensors")
    return [folder / "bare.ckpt", folder / "bare.safetensors"]


def test_the_remedy_of_a_refused_file_is_taken(tmp_path):
    state = {"w": torch.ones(2)}
    torch.save({"state_dict": state, "more": Code(tmp_path / "proof")}, tmp_path / "evil.ckpt")
    with pytest.raises(WeightFileError, match=r"torch\.save\(model\.state_dict\(\), path\)`, or safetensors"):
        open_weights(tmp_path / "evil.ckpt", "state_dict")
    for file in remedies(tmp_path, state):
        assert open_weights(file, "state_dict")["w"].tolist() == [1, 1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.module.", "language_model."])
def test_the_prefix_of_a_wrapper_is_left_out(tmp_path, prefix):
    torch.save({f"{prefix}fc.weight": torch.ones(1), f"{prefix}b": torch.ones(1)}, tmp_path / "x.pth")
    assert list(open_weights(tmp_path / "x.pth")) == ["fc.weight", "b"]
    torch.save({f"{prefix}fc.weight": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pth")
    assert list(open_weights(tmp_path / "x.pth")) == [f"{prefix}fc.weight", "b"], "not a wrapper of all"


def test_that_pickle_does_run_where_it_is_let(tmp_path):
    """The proof proves something."""
    pickle.loads(pickle.dumps(Code(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


def test_objects_that_are_no_plain_data_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")  # a whole module, as some are published
    with pytest.raises(WeightFileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_weights(tmp_path / "module.pth")
    write_zip(tmp_path / "script.pt", {"data.pkl": pickle.dumps({}), "constants.pkl": pickle.dumps(())})
    with pytest.raises(WeightFileError, match=r"script\.pt is refused.*TorchScript"):
        open_weights(tmp_path / "script.pt")
    torch.save({"w": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "small.pt")
    with pytest.raises(WeightFileError, match=r"float8_e4m3fn"):
        open_weights(tmp_path / "small.pt")


def test_a_view_with_another_sign_than_its_storage_is_refused(tmp_path):
    for number, view in enumerate((torch._neg_view(torch.ones(2)), torch.tensor([1 + 2j]).conj())):
        torch.save({"a": view}, tmp_path / f"{number}.pt")
        with pytest.raises(WeightFileError, match="negated or conjugated"):
            open_weights(tmp_path / f"{number}.pt")


def test_one_file_cannot_change_how_the_next_is_read(tmp_path):
    """A pickle may set attributes of what it names: here, what a storage of floats holds."""
    state = b"}X\x05\x00\x00\x00dtypeX\x04\x00\x00\x00int8s"
    forged = b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\n" + state + b"bs."
    write_zip(tmp_path / "forged.pth", {"data.pkl": forged})
    assert open_container(tmp_path / "forged.pth")["a"].dtype == "int8"
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pth")
    assert open_weights(tmp_path / "good.pth")["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "stores more than it makes"),  # a table of 2**31 entries
        (b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.", "BYTEARRAY8|end of|not enough|expected"),
        (pickle.dumps({"a": 1}, protocol=4), "a pickle with FRAME, which torch.save does not write"),
    ],
)
def test_a_few_bytes_cannot_ask_for_all_memory(tmp_path, content, message):
    write_zip(tmp_path / "x.pth", {"data.pkl": content})
    with pytest.raises(WeightFileError, match=message):
        open_weights(tmp_path / "x.pth")


def write_zip(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_truncated_file(tmp_path, options, kept):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.randn(64, 64)}, path, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(WeightFileError, match=r"x\.pth .*truncated.*download it again"):
        dict(open_weights(path))


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path):
    path, forged = tmp_path / "x.pth", tmp_path / "forged.pth"
    torch.save({"w": torch.zeros(8)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x08\x85") == 1  # the shape (8,)
                content = content.replace(b"K\x08\x85", b"K\x7f\x85")
            new.writestr(name, content)
    with pytest.raises(WeightFileError, match=r"forged\.pth"):
        dict(open_weights(forged))


def test_compressed_zip_is_refused(tmp_path):
    path, packed = tmp_path / "x.pth", tmp_path / "packed.pth"
    torch.save({"w": torch.zeros(8)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(WeightFileError, match=r"is compressed"):
        open_weights(packed)


@pytest.mark.parametrize("stem", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_folders_with_bin_files(tmp_path, stem):
    torch.save({"a": torch.ones(2)}, tmp_path / stem)
    assert open_weights(tmp_path)["a"].tolist() == [1, 1]
    (tmp_path / stem).unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "2.bin")
    index = tmp_path / f"{stem}.index.json"
    index.write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
    assert {name: value.tolist() for name, value in open_weights(tmp_path).items()} == {
        "a": [1, 1],
        "b": [0, 0],
    }
    (tmp_path / "2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 shards, 1 of them missing: .*2\.bin"):
        open_weights(tmp_path)
