"""Stage 2 from a stage-1 checkpoint in the small world: LoRA, no caption loss, the mapper's MLP inherited.

Usage: python stage2_worker.py DIR; asserts, and prints ``DONE``.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", ""  # one device
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np

from minigpt5_jax.config import validate
from minigpt5_jax.wiring.restore import load_run
from minigpt5_jax.wiring.training import make_loop
from tiny import run_file

folder = Path(sys.argv[1])


def config(name: str, steps: int):
    made = run_file("shapes_stage1").get_config()
    made.run.update(workdir=str(folder / name), num_steps=steps, eval_every=0, grid_every=0, save_every=2)
    made.data.update(global_batch=4, max_length=40, shapes_train=24, shapes_validation=4)
    made.optimizer.warmup_steps = 1
    return made


make_loop(validate(config("one", 2))).run()
first = load_run(folder / "one")


def second(steps: int):
    made = config("two", steps)
    made.run.init_from = str(folder / "one")
    made.loss.caption = 0.0
    made.model.backbone.lora_rank = 4
    made.tuning.stage = "stage2"
    return validate(made)


loop = make_loop(second(2))
for path in ("mapper/queries", "mapper/fc/fc1/kernel"):  # frozen in stage 2, from the stage-1 checkpoint
    assert np.array_equal(loop.frozen[path], first.params[path]), path
start = {path: np.asarray(value) for path, value in loop.state.trainable.items()}
assert np.array_equal(start["backbone/llm/lm_head/voken"], first.params["backbone/llm/lm_head/voken"])
assert not any(path.startswith("mapper/fc") for path in start)
loop.run()
lora = "backbone/llm/layers/self_attn/q_proj/lora_b"
assert not start[lora].any() and np.asarray(loop.state.trainable[lora]).any()

# The checkpoint is complete: it is loaded, and continued, without the stage-1 one.
(folder / "one").rename(folder / "gone")
again = load_run(folder / "two")
assert np.array_equal(again.params["mapper/queries"], first.params["mapper/queries"])
assert np.array_equal(again.params[lora], loop.state.trainable[lora])
rest = make_loop(second(4))
assert rest.first_step == 2
rest.run()
print("DONE")
