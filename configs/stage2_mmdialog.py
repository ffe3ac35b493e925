"""Stage 2 of the paper: dialogues (MMDialog), from a stage-1 checkpoint, with LoRA on the language model.

    python -m minigpt5_jax.train --config configs/stage2_mmdialog.py --workdir runs/stage2_mmdialog \
        --config.run.init_from=runs/stage1/checkpoints \
        --config.data.train=mmdialog/train/conversations.jsonl --config.data.image_root=mmdialog/images \
        --config.data.validation=mmdialog/validation/conversations.jsonl \
        --config.weights.llm=vicuna-7b --config.weights.vit=eva_vit_g.safetensors \
        --config.weights.qformer=qformer.safetensors \
        --config.weights.llama_proj=llama_proj.safetensors \
        --config.weights.stable_diffusion=stable-diffusion-2-1-base

Data: MMDialog as it is published, a conversation a line, images as ID.jpg (docs/data.md).
Trainable: 121,843,712 parameters (voken rows, LoRA, encoder-decoder; the mapper's MLP and queries stay
as stage 1 left them); `--dry_run` prints the table without weights or data.
Disk: the first epoch writes what the image towers make of its images into the workdir, or the folder
data.features: 65.5 kB of one to draw, 98 kB of one to read; data.cache=off for none.
Steps: four epochs over the samples at batch 32.
Hardware: the original took about two days on four 48 GB GPUs; not yet measured here.
`:int8` holds the frozen language model in 8 bits: 7.0 GB instead of 13.5 (docs/training.md).
Expected numbers: not yet measured here.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_stage2
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """Stage 2 with LoRA; ``:prefix`` tunes by a prefix instead."""
    config = use_stage2(base())
    config.run.name = "stage2_mmdialog"
    config.data.update(format="mmdialog", cache="on", max_images=4, max_length=448, buckets=(128, 256, 448))
    return apply_variant(config, variant, {"prefix": use_prefix})
