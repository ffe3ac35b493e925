"""Train the small world's backbones from nothing and write them as the real sources are written.

    python -m minigpt5_jax.shapes.backbones.pretrain --config configs/shapes_backbones.py \\
        [--config.parts=vision,llama]

Parts, in an order in which each finds what it needs: ``vae``, ``text``, ``unet``, ``vision``, ``llama``.
A part that is stopped goes on where it was, from ``config.work``; one that is done is written into
``config.out``.  ``PROVENANCE.json`` there keeps command, seed, seconds and measured results of each
part, and the hash of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.vae.model import AutoencoderKL
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.backbones import describe, evaluate, train_llama, train_text, train_unet, train_vae
from minigpt5_jax.shapes.backbones import train_vision as vision_part
from minigpt5_jax.shapes.backbones.llama_data import Histories
from minigpt5_jax.shapes.backbones.tokenizers import write_clip_tokenizer, write_llama_tokenizer

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """Where a part reads and writes, and how long it trains.

    Attributes:
      assets: folder of the finished parts.  work: of what is kept to go on (:meth:`kept`).
      steps: by name of the fit.  images: held-out images of each measurement.
    """

    assets: Path
    work: Path
    seed: int
    steps: ConfigDict
    images: int

    def kept(self, *towers: str) -> Path:
        """Folder of the fits that are made on finished ``towers``: others of them, another folder.

        Raises:
          FileNotFoundError: naming the part that is to be trained first.
        """
        if not towers:
            return self.work
        for name in towers:
            files.read_config(self.assets, name)
        folders = tuple(f"{files.TOWERS[name].folder}/" for name in towers)
        made = {path: one for path, one in files.hashes(self.assets).items() if path.startswith(folders)}
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        return self.work / f"on_{digest[:12]}"


def vae(job: Job) -> Result:
    """Train and write the VAE."""
    params, config, seconds = train_vae.train(
        job.steps.vae, job.steps.vae_decoder, job.seed, checkpoints=job.kept()
    )
    files.write_tower(job.assets, "vae", params, config)
    return {"seconds": round(seconds), "measured": evaluate.reconstruction(job.assets)}


def text(job: Job) -> Result:
    """Train and write the text encoder with its tokenizer."""
    write_clip_tokenizer(job.assets / "sd/tokenizer")
    tokenizer = ClipTokenizer(job.assets / "sd/tokenizer")
    params, heads, seconds = train_text.train(
        tokenizer, job.steps.text, job.seed, checkpoint=job.kept() / "text.npz"
    )
    files.write_tower(job.assets, "text_encoder", params, train_text.config(tokenizer.vocab_size))
    stored = files.read_tower(job.assets, "text_encoder")
    return {"seconds": round(seconds), "measured": train_text.measure(stored, heads, tokenizer)}


def scaled_moments(assets: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Images u8[n 64 64 3] to moments f32[n 8 8 8] as the UNet sees them, from the written VAE."""
    config, params = files.read_config(assets, "vae"), files.read_tower(assets, "vae")
    template = Template.of(lambda rngs: AutoencoderKL(config, rngs=rngs))

    def encode(images: np.ndarray) -> np.ndarray:
        mean, logvar = np.split(train_vae.encode(template, params, images), 2, axis=-1)
        factor = config.scaling_factor
        return np.concatenate([mean * factor, logvar + 2 * np.log(factor)], axis=-1)

    return encode


def unet(job: Job) -> Result:
    """Train and write the UNet on the written VAE and text encoder."""
    tokenizer = ClipTokenizer(job.assets / "sd/tokenizer")
    stored = files.read_tower(job.assets, "text_encoder")
    examples = train_unet.Examples.make(
        stored, tokenizer, scaled_moments(job.assets), job.steps.unet_scenes, job.seed
    )
    kept = job.kept("vae", "text_encoder") / "unet.npz"
    params, seconds = train_unet.train(examples, job.steps.unet, job.seed, checkpoint=kept)
    files.write_tower(job.assets, "unet", params, train_unet.CONFIG)
    files.write_scheduler(job.assets)
    measured = {
        f"native, {objects} objects": evaluate.native(job.assets, count=job.images, objects=objects)
        for objects in (1, 2, 3)
    }
    return {"seconds": round(seconds), "measured": measured}


def vision(job: Job) -> Result:
    """Train and write ViT and Q-Former."""
    kept = job.kept() / "vision.npz"
    params, heads, seconds = vision_part.train(job.steps.vision, job.seed, checkpoint=kept)
    vision_part.write(job.assets, params)
    stored = vision_part.read_eyes(job.assets)
    return {"seconds": round(seconds), "measured": vision_part.measure(stored, heads)}


def llama(job: Job) -> Result:
    """Train and write language model and projection, on the written vision towers."""
    write_llama_tokenizer(job.assets / "llama/tokenizer.model", job.seed)
    tokenizer = LlamaTokenizer(job.assets / "llama/tokenizer.model")
    look = vision_part.make_look(vision_part.read_eyes(job.assets), seed=job.seed)
    histories = Histories(
        job.work / "histories", "train", tokenizer, job.steps.stories, job.steps.dialogs, job.seed
    )
    params, heads, seconds = train_llama.train(
        tokenizer,
        histories,
        look,
        (job.steps.llama, job.steps.llama_describing),
        job.seed,
        checkpoints=job.kept("vit", "qformer"),
    )
    train_llama.write(job.assets, params)
    measured = describe.described(job.assets) | describe.kept(job.assets, heads, job.work / "histories")
    return {"seconds": round(seconds), "measured": measured}


PARTS: dict[str, Callable[[Job], Result]] = {
    "vae": vae,
    "text": text,
    "unet": unet,
    "vision": vision,
    "llama": llama,
}


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


def parts_of(asked: str) -> list[str]:
    """The parts of a comma-separated list, in the order they need each other; DataError for others."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if unknown := [name for name in names if name not in PARTS]:
        raise DataError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def train(config: ConfigDict) -> None:
    """Train the parts asked for, one after the other."""
    parts = parts_of(config.parts)
    job = Job(
        Path(config.out or files.ASSETS).expanduser(),
        Path(config.work).expanduser(),
        config.seed,
        config.steps,
        config.images,
    )
    jax.config.update("jax_compilation_cache_dir", str(job.work / "xla"))
    command = "python -m minigpt5_jax.shapes.backbones.pretrain " + " ".join(sys.argv[1:])
    for part in parts:
        result = PARTS[part](job)
        steps = {name: value for name, value in job.steps.items() if name.startswith(part)}
        made = {"command": command, "seed": job.seed, "revision": revision(), "steps": steps, **result}
        record(job.assets, part, made)
        print(json.dumps({part: made}), flush=True)


def main() -> None:
    """The command; its --config is another one than that of runs."""
    from minigpt5_jax import cli  # defines flags, which who imports this module need not have

    flags.FLAGS.set_default("config", "configs/shapes_backbones.py")
    cli.start(lambda _: cli.guarded(lambda: train(cli.CONFIG.value)))


if __name__ == "__main__":
    main()
