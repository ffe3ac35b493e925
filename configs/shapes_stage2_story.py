"""Stage 2 in the small world: stories, with LoRA, from a stage-1 checkpoint.

    python -m minigpt5_jax.train --config configs/shapes_stage2_story.py --workdir runs/shapes_story \
        --config.run.init_from=runs/shapes_full/checkpoints

Data: stories drawn into the workdir in VIST's files; a story of five steps gives 13 samples, as VIST's.
Hardware: two CPU cores.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_shapes_backbones, use_stage2
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """The paper's losses, masks and trainables; rates and steps scaled to the small world."""
    config = use_shapes_backbones(use_stage2(base()))
    config.run.update(
        name="shapes_stage2_story", num_steps=1000, log_every=10, eval_every=250, eval_batches=4,
        save_every=250, grid_every=250,
    )  # fmt: skip
    config.data.update(
        format="shapes_stories", shapes_train=2000, shapes_validation=60, global_batch=32, accumulation=1,
        worker_count=0, flip_mode="off", max_images=5, max_length=200, buckets=(120, 200), max_targets=24,
    )  # fmt: skip
    config.optimizer.update(lr_llm=2e-3, lr_mapper=5e-4, warmup_steps=50)
    return apply_variant(config, variant, {"prefix": use_prefix})
