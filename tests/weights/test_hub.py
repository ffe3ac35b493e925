"""Local paths first, then the hub's cache; and what is said when neither has it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.formats.hub import resolve
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.formats.save import save_safetensors


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, repository: str) -> Path:
    """A repository as the hub's client keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def test_what_is_there_is_taken(cache, tmp_path, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")  # not the hub's, should it have one of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/name") == tmp_path / "org/name"
    assert resolve(tmp_path / "org") == tmp_path / "org"


def test_repositories_of_the_cache(cache):
    snapshot = put(cache, "org/model")
    save_safetensors(snapshot / "unet" / "model.safetensors", {"a": np.ones(1)})
    save_safetensors(snapshot / "model.safetensors", {"b": np.ones(1)})
    (snapshot / "stage1.ckpt").write_bytes(b"x")
    assert list(open_weights(resolve("org/model"))) == ["b"]
    assert list(open_weights(resolve("org/model/unet"))) == ["a"]
    assert resolve("org/model/stage1.ckpt") == snapshot / "stage1.ckpt"
    with pytest.raises(WeightFileError, match=r"org/model has no folder 'vae'"):
        resolve("org/model/vae")
    with pytest.raises(WeightFileError, match=r"org/model has no file 'stage2\.ckpt'"):
        resolve("org/model/stage2.ckpt")


def test_an_unreachable_hub_says_which_files_to_put_where(cache, tmp_path):
    with pytest.raises(WeightFileError) as error:
        resolve("org/model")
    text = str(error.value)
    assert "'org/model' is no file or folder here" in text and "cannot be reached" in text
    assert "hf download org/model" in text and f"{tmp_path / 'org/model'}/" in text
    assert "*.safetensors" in text and "*.json" in text
    with pytest.raises(WeightFileError) as error:
        resolve("org/model/stage1.ckpt")
    assert "`hf download org/model stage1.ckpt --local-dir org/model`" in str(error.value)
    assert f"put it at {tmp_path}/org/model/stage1.ckpt" in str(error.value)


def test_a_look_at_the_cache_fetches_nothing(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(WeightFileError, match=r"it is not in the local cache\.\n"):
        resolve("org/model", fetch=False)


def test_only_what_is_wanted_is_asked_for(cache, monkeypatch):
    published = [
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.model",
        "pytorch_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "bin/config.json",
        "bin/pytorch_model.bin",
    ]
    snapshot = put(cache, "org/model")

    def download(repository, allow_patterns, ignore_patterns, local_files_only):
        assert not local_files_only
        wanted = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in huggingface_hub.utils.filter_repo_objects(published, **wanted):
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).touch()
        return str(snapshot)

    def brought() -> set[str]:
        return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/model") == snapshot
    top = {"config.json", "model.safetensors", "tokenizer.model"}
    assert brought() == top
    assert resolve("org/model/unet") == snapshot / "unet"
    assert brought() == top | {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert resolve("org/model/bin") == snapshot / "bin"  # where there are no safetensors
    assert brought() >= {"bin/config.json", "bin/pytorch_model.bin"}


@pytest.mark.parametrize("name", ["/absent/model", "./absent/model", "absent", "~/absent/model", "a b/c"])
def test_names_that_are_no_repository_are_local(cache, name):
    with pytest.raises(FileNotFoundError, match=r"no file or folder"):
        resolve(name)


@pytest.mark.parametrize("error, why", [(ConnectionError("no route"), "no route"), (OSError("x"), "OSError")])
def test_errors_of_the_network_are_one_message(cache, monkeypatch, error, why):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightFileError, match=why):
        resolve("org/model")


def test_a_cache_without_refs_names_its_snapshots(cache):
    snapshot = put(cache, "org/model")
    save_safetensors(snapshot / "model.safetensors", {"b": np.ones(1)})
    (snapshot.parents[1] / "refs/main").unlink()
    with pytest.raises(WeightFileError, match=rf"no refs/main .*; give the path of one: {snapshot}\."):
        resolve("org/model")
    assert list(open_weights(resolve(str(snapshot)))) == ["b"]  # as the message says


def test_a_link_of_the_cache_that_leads_nowhere(cache, tmp_path):
    (tmp_path / "stage1.ckpt").symlink_to("blobs/0")
    with pytest.raises(FileNotFoundError, match=r"stage1\.ckpt is a link to blobs/0, where nothing is"):
        resolve(str(tmp_path / "stage1.ckpt"))
