"""Stage 1 in the small world: the demo's run, on a CPU, in minutes.

    python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir runs/demo
    python -m minigpt5_jax.train --config configs/shapes_stage1.py:full --workdir runs/shapes_full

Data: captioned scenes of one object (``:full``: of one to three), drawn into the workdir in CC3M format;
unseen combinations of attributes are held out.  Backbones: the tiny ones shipped in the package, frozen.
Hardware: two CPU cores.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from minigpt5_jax.config import apply_variant, use_shapes_backbones
from minigpt5_jax.config import get_config as base


def full(config):
    """One to three objects, and the time they take."""
    config.run.update(
        name="shapes_stage1_full",
        num_steps=2000,
        eval_every=500,
        eval_batches=4,
        save_every=500,
        grid_every=500,
    )
    config.data.update(shapes_max_objects=3, shapes_train=20000, max_length=72)
    config.optimizer.warmup_steps = 100


def get_config(variant: str | None = None):
    """The paper's losses and masks; rates, weights and steps scaled to the small world."""
    config = base()
    use_shapes_backbones(config)
    config.run.update(
        name="shapes_stage1",
        num_steps=320,
        log_every=20,
        eval_every=160,
        eval_batches=2,
        save_every=160,
        grid_every=160,
    )
    config.data.update(
        format="shapes",
        shapes_train=4096,
        shapes_validation=128,
        global_batch=16,
        worker_count=0,
        max_length=56,
        max_targets=8,
        flip_mode="off",  # a mirror would turn "left" into "right"
    )
    config.loss.caption = 1.0
    config.optimizer.update(lr_llm=1e-2, lr_mapper=2e-3, warmup_steps=40)
    return apply_variant(config, variant, {"full": full})
