"""Stage 2 of the paper: stories (VIST), from a stage-1 checkpoint, with LoRA on the language model.

    python -m minigpt5_jax.train --config configs/stage2_vist.py --workdir runs/stage2_vist \
        --config.run.init_from=runs/stage1/checkpoints \
        --config.data.train=vist/train_cleaned.json --config.data.validation=vist/val_cleaned.json \
        --config.weights.llm=vicuna-7b --config.weights.vit=eva_vit_g.safetensors \
        --config.weights.qformer=qformer.safetensors \
        --config.weights.llama_proj=llama_proj.safetensors \
        --config.weights.stable_diffusion=stable-diffusion-2-1-base

Data: VIST as the original has it, `train_cleaned.json` beside `train_image_mapping.json` and the images
(docs/data.md); each story gives 13 samples, which a row holds as one tree (docs/training.md).  A step is 3
whole stories.  `:shuffled` is the original's order: 32 shuffled samples a step, in rows of their bucket (a
history of k images takes about 80 + 48 k positions).
Trainable: 121,843,712 parameters (voken rows, LoRA, encoder-decoder; the mapper's MLP and queries stay
as stage 1 left them); `--dry_run` prints the table without weights or data.
Disk: the first epoch writes what the image towers make of its images into the workdir, or the folder
data.features: about 25 GB; data.cache=off for none.
About 45,900 updates: four epochs of 34,428 stories, 13 samples each, at batch 39; 55,900 with `:shuffled`.
Hardware: the original took about two days on four 48 GB GPUs; not yet measured here.
`:int8` holds the frozen language model in 8 bits: 7.0 GB instead of 13.5 (docs/training.md).
Expected numbers: not yet measured here.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_stage2
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """Stage 2 with LoRA; ``:prefix`` tunes by a prefix instead, ``:shuffled`` takes single samples."""
    config = use_stage2(base())
    config.run.name = "stage2_vist"
    config.data.update(format="vist", cache="on", max_images=5, max_length=384)
    config.data.update(packing="tree", global_batch=3 * 13)
    return apply_variant(config, variant, {"prefix": use_prefix, "shuffled": use_shuffled})


def use_shuffled(config):
    """Shuffled samples, 32 a step, as the original trained."""
    config.data.update(packing="shuffled", global_batch=32, buckets=(128, 224, 384))
