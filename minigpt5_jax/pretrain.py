"""Train the small world's backbones from nothing and write them into the package.

    python -m minigpt5_jax.pretrain --part all

Parts: ``vae``, then ``text_unet`` (needs the VAE), and ``llama``.  Each part is written when it is
done, so that a stopped run continues with ``--part`` of the next; ``PROVENANCE.json`` keeps the
command, seed, seconds and measured results of each, and the hash of every file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from minigpt5_jax.data.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.models.common import Template
from minigpt5_jax.models.vae import AutoencoderKL
from minigpt5_jax.shapes import evaluate, files, train_llama, train_text, train_unet, train_vae
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.tokenizers import write_clip_tokenizer, write_llama_tokenizer
from minigpt5_jax.shapes.world import all_scenes

STEPS = {"vae": 3700, "vae_decoder": 1500, "text": 500, "unet": 2500, "llama": 900}

Result = dict[str, Any]


def vae(assets: Path, seed: int, steps: int) -> Result:
    """Train and write the VAE."""
    params, config, seconds = train_vae.train(steps, STEPS["vae_decoder"], seed)
    files.write_tower(assets, "vae", params, config)
    return {
        "steps": {"vae": steps, "decoder": STEPS["vae_decoder"]},
        "seconds": round(seconds),
        "measured": evaluate.reconstruction(assets),
    }


def scaled_moments(assets: Path) -> np.ndarray:
    """Moments of every training scene as the UNet sees them, from the written VAE."""
    config = files.read_config(assets, "vae")
    template = Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs))
    pictures = render(list(all_scenes(False)))
    moments = train_vae.encode(template, files.read_tower(assets, "vae", template), pictures)
    mean, logvar = np.split(moments, 2, axis=-1)
    factor = config.scaling_factor
    return np.concatenate([mean * factor, logvar + 2 * np.log(factor)], axis=-1)


def text_unet(assets: Path, seed: int, steps: int) -> Result:
    """Train and write the text encoder with its tokenizer, then the UNet."""
    moments = scaled_moments(assets)
    write_clip_tokenizer(assets / "sd/tokenizer")
    tokenizer = ClipTokenizer(assets / "sd/tokenizer")
    text, heads, text_seconds = train_text.train(tokenizer, STEPS["text"], seed)
    files.write_tower(assets, "text_encoder", text, train_text.config(tokenizer.vocab_size))
    text = files.read_tower(assets, "text_encoder", train_text.template(tokenizer.vocab_size))  # as stored
    examples = train_unet.Examples.make(text, tokenizer, moments, seed)
    unet, unet_seconds = train_unet.train(examples, steps, seed)
    files.write_tower(assets, "unet", unet, train_unet.CONFIG)
    files.write_scheduler(assets)
    return {
        "steps": {"text": STEPS["text"], "unet": steps},
        "seconds": {"text": round(text_seconds), "unet": round(unet_seconds)},
        "measured": {
            **train_text.measure(text, heads, tokenizer),
            "native": evaluate.native(assets),
            "native, padding positions only": evaluate.native(assets, padding_only=True),
        },
    }


def llama(assets: Path, seed: int, steps: int) -> Result:
    """Train and write the language model with its tokenizer."""
    write_llama_tokenizer(assets / "llama/tokenizer.model", seed)
    tokenizer = LlamaTokenizer(assets / "llama/tokenizer.model")
    params, heads, seconds = train_llama.train(tokenizer, steps, seed)
    files.write_tower(assets, "llama", params, train_llama.CONFIG)
    stored = files.read_tower(assets, "llama", train_llama.template())
    return {
        "steps": steps, "seconds": round(seconds), "measured": train_llama.measure(stored, heads, tokenizer),
    }  # fmt: skip


PARTS: dict[str, Callable[[Path, int, int], Result]] = {"vae": vae, "text_unet": text_unet, "llama": llama}


def revision() -> str:
    """Git revision of the code, or ``unknown`` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(assets: Path, part: str, result: Result) -> None:
    """Enter a part's result and the hashes of all files into ``PROVENANCE.json``."""
    path = assets / files.PROVENANCE
    known = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    known["parts"][part] = result
    known["sha256"] = files.hashes(assets)
    files.write_json(path, known)


def main(_: list[str]) -> None:
    """Train the parts asked for, one after the other."""
    flag = flags.FLAGS
    parts = list(PARTS) if flag.part == "all" else [flag.part]
    for part in parts:
        steps = flag.steps or STEPS["unet" if part == "text_unet" else part]
        result = PARTS[part](Path(flag.out), flag.seed, steps)
        command = "python -m minigpt5_jax.pretrain " + " ".join(sys.argv[1:])
        made = {"command": command, "seed": flag.seed, "revision": revision()}
        record(Path(flag.out), part, {**made, **result})
        print(json.dumps({part: result}))


if __name__ == "__main__":
    flags.DEFINE_enum("part", "all", ["all", *PARTS], "what to train")
    flags.DEFINE_integer("seed", 0, "of weights, data and noise", lower_bound=0)
    flags.DEFINE_integer("steps", None, "steps of the part (of text_unet: the UNet's) instead of the default")
    flags.DEFINE_string("out", str(files.ASSETS), "folder the files are written to")
    app.run(main)
