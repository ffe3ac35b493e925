"""Six steps at once, and three steps, a restart and three more, in the small world on one device.

Usage: python resume_worker.py DIR; prints ``EQUAL`` and what a foreign checkpoint is refused with.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", ""  # one device
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
import numpy as np

from minigpt5_jax.cli import set_compile_cache
from minigpt5_jax.config import validate
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.wiring.training import make_loop
from tiny import run_file

folder = Path(sys.argv[1])


def config(name: str):
    made = run_file("shapes_stage1").get_config()
    made.run.update(
        workdir=str(folder / name),
        num_steps=6,
        log_every=1,
        eval_every=0,
        grid_every=0,
        save_every=3,
        compile_cache=str(folder / "cache"),
    )
    made.data.update(global_batch=4, max_length=40, shapes_train=24, shapes_validation=4, accumulation=2)
    made.loss.cfg_dropout = 0.5
    made.optimizer.warmup_steps = 2
    return validate(made)


def bits(loop):
    state = dict(vars(loop.state), rng=jax.random.key_data(loop.state.rng))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


set_compile_cache(config("whole"))
whole = make_loop(config("whole"))
whole.run()
half = make_loop(config("parts"))
half.num_steps = 3  # the schedule still knows six
half.run()
rest = make_loop(config("parts"))
assert rest.first_step == 3 and rest.data.state == 3
rest.run()
want, got = bits(whole), bits(rest)
different = [name for name in want if not np.array_equal(want[name], got[name])]
assert want.keys() == got.keys() and not different, different
moved = bits(half)
assert any(not np.array_equal(moved[name], want[name]) for name in want if "trainable" in name)
print("EQUAL", flush=True)

other = config("parts")
other.model.mapper.num_decoder_layers = 2
try:
    make_loop(other)
except CheckpointError as error:
    print("REFUSED", str(error).replace("\n", " "))
other = config("parts")
other.data.shapes_train = 16
try:
    make_loop(other)
except CheckpointError as error:
    print("DATA", str(error).replace("\n", " "))
