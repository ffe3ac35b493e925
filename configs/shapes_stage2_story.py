"""Stage 2 in the small world: stories, with LoRA, from a stage-1 checkpoint.

    python -m minigpt5_jax.train --config configs/shapes_stage2_story.py --workdir runs/shapes_story \
        --config.run.init_from=runs/shapes_full/checkpoints

Data: stories drawn into the workdir in VIST's files; a story of five steps gives 13 samples, as VIST's.
Other than in the paper, 0.15 of the samples that have steps before read texts only of them and 0.15 images
only, so that no context it is judged with is new to this little language model (README: what that brings).
Hardware: two CPU cores.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_shapes_stage2
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """Stage 2 with LoRA; ``:prefix`` tunes by a prefix instead."""
    config = use_shapes_stage2(base())
    config.run.name = "shapes_stage2_story"
    config.data.update(
        format="shapes_stories",
        shapes_train=2000,
        shapes_validation=60,
        max_images=5,
        max_length=200,
        buckets=(120, 200),
        max_targets=24,
        context_dropout=0.3,
    )
    config.run.update(num_steps=1200, eval_every=600, save_every=600, grid_every=600)
    return apply_variant(config, variant, {"prefix": use_prefix})
