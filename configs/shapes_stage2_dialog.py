"""Stage 2 in the small world: dialogues, with LoRA, from a stage-1 checkpoint.

    python -m minigpt5_jax.train --config configs/shapes_stage2_dialog.py --workdir runs/shapes_dialog \
        --config.run.init_from=runs/shapes_full/checkpoints

Data: dialogues drawn into the workdir in MMDialog's files; each turn but the first is a sample.
Hardware: two CPU cores.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from minigpt5_jax.config import apply_variant, use_prefix, use_shapes_stage2
from minigpt5_jax.config import get_config as base


def wishes(config):
    """Half of the dialogues begin with a request in few words: "please draw: a red circle."."""
    config.data.shapes_wishes = 0.5


def get_config(variant: str | None = None):
    """Stage 2 with LoRA; ``:prefix`` tunes by a prefix instead, ``:wishes`` asks in few words too."""
    config = use_shapes_stage2(base())
    config.run.name = "shapes_stage2_dialog"
    config.data.update(
        format="shapes_dialogs",
        shapes_train=4000,
        shapes_validation=120,
        max_images=2,
        max_length=160,
        buckets=(104, 160),
        max_targets=40,
    )
    return apply_variant(config, variant, {"prefix": use_prefix, "wishes": wishes})
