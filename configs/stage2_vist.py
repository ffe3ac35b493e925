"""Stage 2 of the paper: stories (VIST), from a stage-1 checkpoint, with LoRA on the language model.

    python -m minigpt5_jax.train --config configs/stage2_vist.py --workdir runs/stage2_vist \
        --config.run.init_from=runs/stage1/checkpoints \
        --config.data.train=train.jsonl --config.data.validation=val.jsonl \
        --config.weights.llm=vicuna-7b --config.weights.vit=eva_vit_g.safetensors \
        --config.weights.qformer=qformer.safetensors \
        --config.weights.llama_proj=llama_proj.safetensors \
        --config.weights.stable_diffusion=stable-diffusion-2-1-base

Data: each story as JSONL (README, "Your own data").
Trainable: 121,843,712 parameters (voken rows, LoRA, encoder-decoder; the mapper's MLP and queries stay
as stage 1 left them); `--dry_run` prints the table without weights or data.
About 55,900 updates: four epochs of 34,428 stories, 13 samples each, at batch 32.
Hardware: the original took about two days on four 48 GB GPUs; not yet measured here.
Expected numbers: not yet measured here.
"""

from minigpt5_jax.config import apply_variant
from minigpt5_jax.config import get_config as base
from minigpt5_jax.tuning import STAGE2_LORA, STAGE2_PREFIX


def prefix(config):
    """``:prefix``: prefix tuning in place of LoRA (390,562,816 trainable parameters)."""
    config.model.backbone.lora_rank, config.model.backbone.prefix_tokens = 0, 5
    config.tuning.rules = STAGE2_PREFIX


def get_config(variant: str | None = None):
    """Base configuration with LoRA, one rate of 2e-5, batch 32, four epochs and no caption loss."""
    config = base()
    config.run.name = "stage2_vist"
    config.run.epochs = 4.0
    config.run.eval_every = 2000
    config.run.grid_every = 2000
    config.data.format = "jsonl"
    config.data.global_batch = 32
    config.data.accumulation = 4
    config.data.max_length = 512
    config.data.max_images = 5
    config.data.max_targets = 128
    config.model.backbone.lora_rank = 8
    config.loss.caption = 0.0
    config.optimizer.lr_llm = 2e-5
    config.optimizer.lr_mapper = 2e-5
    config.tuning.rules = STAGE2_LORA
    return apply_variant(config, variant, {"prefix": prefix})
