"""A small run on your own data in CC3M format: real captions and images, the packaged tiny backbones.

    python -m minigpt5_jax.train --config configs/cc3m_small.py --workdir runs/cc3m_small \
        --config.data.train=CC3M/cc3m_val.tsv --config.data.validation=CC3M/cc3m_val.tsv

The tsv has the header `caption<TAB>image_path`; paths are relative to its folder.  Shows that a data
folder, training, checkpoints and resuming work before the large weights are at hand; the tiny
backbones know shapes only, so its images are none of your captions.
Hardware: two CPU cores, minutes.  Expected numbers: none, a check of the machinery.
"""

from minigpt5_jax.config import apply_variant, use_shapes_backbones
from minigpt5_jax.config import get_config as base


def get_config(variant: str | None = None):
    """The base configuration with small towers, images of 64 pixels and 100 steps."""
    config = base()
    use_shapes_backbones(config)
    config.run.update(
        name="cc3m_small", num_steps=100, eval_every=50, eval_batches=1, save_every=50, grid_every=100
    )
    config.data.update(global_batch=8, worker_count=2, max_length=128)
    config.optimizer.warmup_steps = 10
    return apply_variant(config, variant)
