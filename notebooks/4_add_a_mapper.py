# %% [markdown]
# # 4. Add a mapper
#
# **Shows** that another feature mapper is one file: it is written here, outside the package, trained for
# two steps, and drawn with. Nothing of the package changes. Backbones and generators are added in the same
# way ([CONTRIBUTING.md](../CONTRIBUTING.md#adding-a-backbone-mapper-or-generator)).
#
# **Takes** about two minutes on two CPU cores.
#
# **Needs** a checkout of this repository with `pip install -e ".[notebooks]"`.

# %%
import importlib
import os
import shutil
import sys

from helpers import RUNS, sh, show
from minigpt5_jax import MiniGPT5, load_run

HOME = RUNS / "parts"  # any folder from which Python imports
shutil.rmtree(RUNS / "own_mapper", ignore_errors=True)
(HOME / "own_parts").mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(HOME.absolute()))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME.absolute()), os.environ.get("PYTHONPATH", "")])

# %% [markdown]
# ## The file
#
# A mapper turns voken states `[n m d]` into a condition `[n q c]`. The papers' is a transformer of eight
# layers; this one is two matrices. The record `PART` says all that the rest of the program must know: how
# the module is made, the keys of its configuration, what of it trains in which stage, and how it is spread
# over devices.

# %%
SOURCE = '''
"""A mapper of two matrices: the mean of the voken states, through one hidden layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.models.common import normal, param
from minigpt5_jax.parts.contracts import Key, Part


class TwoMatrices(nnx.Module):
    def __init__(self, *, hidden_size, condition_shape, width, rngs):
        self.condition_shape = condition_shape
        queries, channels = condition_shape
        self.first = param(rngs, normal(hidden_size**-0.5), (hidden_size, width), ("embed", "mlp"))
        self.second = param(rngs, normal(width**-0.5), (width, queries * channels), ("mlp", None))
        self.bias = param(rngs, normal(0.1), (queries * channels,), (None,))

    def __call__(self, vokens):
        inner = jax.nn.gelu(vokens.mean(1) @ self.first[...])
        return (inner @ self.second[...] + self.bias[...]).reshape(-1, *self.condition_shape)


def make(keys, sizes, context):
    """Arguments of the module; the neighbours say how wide they are."""
    return {**context.neighbours, "width": keys["width"]}


PART = Part(
    kind="mapper",
    name="two_matrices",
    module=TwoMatrices,
    make=make,
    keys={"width": Key(256, "width of its hidden layer", low=1)},
    trainable={"stage1": ((r".*", "mapper"),), "stage2": ((r".*", "mapper"),)},
    sharding={"": {"mlp": "fsdp"}},
)
'''
(HOME / "own_parts/two_matrices.py").write_text(SOURCE.lstrip())
importlib.invalidate_caches()

# %% [markdown]
# ## Choose it
#
# Behind the run file, `mapper=` and the name of the module with its package. `--dry_run` shows the model
# without training: the mapper's parameters are ours.

# %%
sh(
    "python -m minigpt5_jax.train --config configs/shapes_stage1.py:mapper=own_parts.two_matrices"
    " --config.model.mapper.width=192 --workdir $RUNS/own_mapper --dry_run | grep -E 'tower|mapper|total'"
)

# %% [markdown]
# ## Train two steps

# %%
sh(
    "python -m minigpt5_jax.train --config configs/shapes_stage1.py:mapper=own_parts.two_matrices"
    " --config.model.mapper.width=192 --workdir $RUNS/own_mapper --config.data.shapes_train=64"
    " --config.run.num_steps=2 --config.run.log_every=1 --config.run.save_every=2"
    " --config.run.eval_every=0 --config.run.grid_every=0"
)

# %% [markdown]
# ## Generate
#
# A run knows its parts, so opening it needs nothing but that the module can be imported. After two steps
# the image is hardly more than a picture of the small world at random, and without `force_image` there
# would be none.

# %%
run = load_run(RUNS / "own_mapper")
print({path: value.shape for path, value in run.params.items() if path.startswith("mapper/")})
answer = MiniGPT5(run).generate(
    "a large solid red circle in the top left on a white background", force_image="first"
)
show(answer.images)

# %% [markdown]
# ## And then
#
# - Train it as long as the demo: leave out the settings of `run` and `data` above, and compare by
#   `evaluate` (notebook 5).
# - A file in `minigpt5_jax/parts/mappers/` is found by its name alone.
# - Losses of its own, start values, conflicts between keys, and formats of export are further fields of
#   `Part`; `tests/test_parts.py` has a toy mapper with some of them, and a toy backbone and a toy
#   generator.
