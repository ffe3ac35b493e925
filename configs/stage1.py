"""Stage 1 of the paper: Vicuna-7B learns to draw with Stable Diffusion 2.1, on CC3M captions.

    python -m minigpt5_jax.train --config configs/stage1.py --workdir runs/stage1 \
        --config.data.train=CC3M/train.tsv --config.data.validation=CC3M/cc3m_val.tsv \
        --config.weights.llm=vicuna-7b --config.weights.stable_diffusion=stable-diffusion-2-1-base

No caption has an image to read, so the vision towers are not needed to train; generating takes them
(--config.weights.vit, qformer, llama_proj, kept in the run's configuration).

Trainable: 122,973,184 parameters (18 voken rows, mapper, its MLP and queries); `--dry_run` prints the
table without weights or data.  Captions of up to 32 positions and longer ones have steps of their own, packed
four to a row.
Disk: the first epoch writes the moments of its images into the workdir, or the folder data.features: 65.5 kB
an image, 173 GB for CC3M.  Where there is no room, and with data.cache=off, each step encodes its images.
Steps: two epochs of CC3M are about 92,600 updates at batch 48.
Hardware: the original took about two days on four 48 GB GPUs; not yet measured here.
`:int8` holds the frozen language model in 8 bits: 7.0 GB instead of 13.5 (docs/training.md).
Expected numbers (paper, CC3M validation): not yet measured here.
"""

from minigpt5_jax.config import apply_variant
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """The base configuration is this run; only its name and length are said here."""
    config = base()
    config.run.name = "stage1"
    config.run.epochs = 2.0
    config.run.eval_every = 5000
    config.run.save_every = 1000
    config.run.grid_every = 5000
    config.data.update(cache="on", max_length=128, max_targets=3, buckets=(32, 128))
    return apply_variant(config, variant)
