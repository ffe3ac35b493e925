"""Stage 2 in the small world: dialogues, with LoRA, from a stage-1 checkpoint.

    python -m minigpt5_jax.train --config configs/shapes_stage2_dialog.py --workdir runs/shapes_dialog \
        --config.run.init_from=runs/shapes_full/checkpoints

Data: dialogues drawn into the workdir in MMDialog's files; each turn of the assistant is a sample.
Hardware: two CPU cores.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_shapes_backbones, use_stage2
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """The paper's losses, masks and trainables; rates and steps scaled to the small world."""
    config = use_shapes_backbones(use_stage2(base()))
    config.run.update(
        name="shapes_stage2_dialog", num_steps=1000, log_every=10, eval_every=250, eval_batches=4,
        save_every=250, grid_every=250,
    )  # fmt: skip
    config.data.update(
        format="shapes_dialogs", shapes_train=4000, shapes_validation=120, global_batch=32, accumulation=1,
        worker_count=0, flip_mode="off", max_images=2, max_length=160, buckets=(104, 160), max_targets=40,
    )  # fmt: skip
    config.optimizer.update(lr_llm=2e-3, lr_mapper=5e-4, warmup_steps=50)
    return apply_variant(config, variant, {"prefix": use_prefix})
