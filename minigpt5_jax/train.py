"""Train.

    python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir runs/a
    python -m minigpt5_jax.train --config configs/stage1.py --dry_run
    python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir runs/a --profile_steps 20:23

``--dry_run`` builds every shape abstractly, prints the parameter table (also what is not loaded, because the
run does not use it) and stops; it needs neither weights nor data.
"""

from __future__ import annotations

import contextlib

from absl import flags
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.evaluation.held_out import watchers
from minigpt5_jax.training.distributed import initialize, main_process
from minigpt5_jax.training.peers import watched
from minigpt5_jax.training.profile import check_steps, parse_steps, traced
from minigpt5_jax.wiring.generation import toy_towers
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.run_settings import check_new_parameters
from minigpt5_jax.wiring.training import closing_words, make_loop, parameter_table
from minigpt5_jax.wiring.used_towers import unused_towers

PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, counted from 1: write a trace of these steps into WORKDIR/profile."
)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the parameter table and stop.")


def main(config: ConfigDict) -> None:
    """The command."""
    if DRY_RUN.value:
        spec = build(config)
        check_new_parameters(config, spec)
        print(parameter_table(spec.without(unused_towers(config, spec, watched=True))))
        return
    steps = parse_steps(PROFILE_STEPS.value) if PROFILE_STEPS.value is not None else None
    if config.run.workdir:
        cli.check_writable(config.run.workdir, "workdir")
        if steps:
            check_steps(config.run.workdir, *steps, config.run.num_steps)
    if note := toy_towers(config):
        cli.tell(note)
    cli.set_compile_cache(config)
    if initialize(timeout_s=config.run.join_timeout):
        cli.user_errors()  # imports them: when one is to be told, time is short
    with watched(config.to_dict(), cli.report) as reached:
        loop = make_loop(config, watchers, reached)
        with traced(loop, *steps) if steps else contextlib.nullcontext(loop) as loop:
            loop.run()
    if main_process():
        print(closing_words(config))


if __name__ == "__main__":
    cli.run(main)
