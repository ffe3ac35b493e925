"""The shipped backbones: real file formats, unaltered, and as good as their provenance says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.backbones import evaluate, train_text
from minigpt5_jax.shapes.backbones.texts import instruction
from minigpt5_jax.shapes.wording import caption
from minigpt5_jax.shapes.world import draw_scene

ASSETS = files.ASSETS


STORED = [name for name, files_of in files.TOWERS.items() if (ASSETS / files_of.folder).is_dir()]


def test_they_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 20e6


def test_files_are_those_the_provenance_names():
    known = json.loads((ASSETS / files.PROVENANCE).read_text())
    assert known["sha256"] == files.hashes(ASSETS)
    for part in known["parts"].values():
        assert {"command", "seed", "revision", "steps", "seconds", "measured"} <= part.keys()


def contents(path):
    """(metadata, name -> dtype, shape and bytes) of a safetensors file."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return file.metadata(), {n: (v.dtype, v.shape, v.tobytes()) for n, v in tensors.items()}


@pytest.mark.parametrize("name", STORED)
def test_towers_are_written_as_they_are_read(name, tmp_path):
    params = files.read_tower(ASSETS, name)
    assert all(np.isfinite(value).all() for value in params.values())
    files.write_tower(tmp_path, name, params, files.read_config(ASSETS, name))
    folder = files.TOWERS[name].folder
    for path in (tmp_path / folder).iterdir():
        shipped = ASSETS / folder / path.name
        if path.suffix == ".safetensors":  # the order of tensors in a file means nothing
            assert contents(path) == contents(shipped)
        else:
            assert path.read_bytes() == shipped.read_bytes(), path.name


def test_other_libraries_read_the_same_files():
    import diffusers
    import torch
    import transformers

    kinds = {
        "llama": transformers.LlamaForCausalLM,
        "text_encoder": transformers.CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    models = {}
    for name, kind in kinds.items():
        models[name], info = kind.from_pretrained(
            ASSETS / files.TOWERS[name].folder, output_loading_info=True, torch_dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], name
    tokenizer = ClipTokenizer(ASSETS / "sd/tokenizer")
    ids, mask = tokenizer.encode(["a small dotted red circle in the top left on a white background"])
    ours = train_text.features(files.read_tower(ASSETS, "text_encoder"), ids, mask)
    with torch.no_grad():
        theirs = models["text_encoder"](
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_tokenizers_know_their_world():
    clip = ClipTokenizer(ASSETS / "sd/tokenizer")
    assert clip.pad_id == 0
    random = np.random.default_rng(0)
    _, mask = clip.encode([caption(draw_scene(random), random) for _ in range(20)])
    assert mask.sum(1).max() <= 18  # one token for each word, BOS and EOS
    llama = LlamaTokenizer(ASSETS / "llama/tokenizer.model")
    for _ in range(20):
        text = instruction(draw_scene(random), random)
        tokens = llama.encode(text)
        assert llama.decode(tokens) == text
        assert len(tokens) <= 45  # with BOS, vokens and the ending it fits the demo's 56 positions
    assert llama.decode(llama.encode("a rötes 猫")) == "a rötes 猫"  # bytes stand in for unknown letters


def test_native_images_are_right():
    """The ceiling of stage 1; the provenance has it on 500 captions, and of 20 steps of DDIM."""
    assert evaluate.native(ASSETS, count=48, sampler="dpm_solver++", steps=6)["all"] >= 0.9


def test_a_missing_tower_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="minigpt5_jax.shapes.backbones.pretrain"):
        files.read_config(tmp_path, "vae")
