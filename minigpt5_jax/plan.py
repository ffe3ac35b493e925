"""Plan before paying: compile the real train step for chips that are not here.

    python -m minigpt5_jax.plan --config configs/stage1.py --topology v5e:4x4
    python -m minigpt5_jax.plan --config configs/stage1.py --topology h100:8 --json
    python -m minigpt5_jax.plan --config configs/stage1.py --topology h100:1 --generation

prints memory of a chip, work, collectives and a predicted time.  It needs neither weights nor data, only the
compiler of the platform (`pip install 'minigpt5_jax[plan]'` for TPUs, `[plan-gpu]` for GPUs).  Full size
takes minutes.  Chips: minigpt5_jax/planning/chips/, or the path of such a description
(`--topology my_card.toml:4`).
"""

from __future__ import annotations

import json

from absl import flags
from ml_collections import ConfigDict

from minigpt5_jax import cli
from minigpt5_jax.config import ConfigError
from minigpt5_jax.planning.generation import as_text as generation_text
from minigpt5_jax.planning.generation import make_generation_plan
from minigpt5_jax.planning.report import as_text, make_plan
from minigpt5_jax.planning.topology import open_topology

TOPOLOGY = cli.define_path("topology", None, "Chips: v5e:4x4, v5p:4x4x8, v6e:4x4, h100:8, h200:1, a6000:4.")
LENGTH = flags.DEFINE_integer(
    "length", 0, "Positions of a row, or of a prompt; 0: the longest of the run.", lower_bound=0
)
GENERATION = flags.DEFINE_boolean(
    "generation", False, "Plan a session that answers prompts and draws, in the place of training."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Prompts at once, with --generation.", lower_bound=1)
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object.")


def main(config: ConfigDict) -> None:
    """The command."""
    if TOPOLOGY.value is None:
        raise ConfigError("give the chips: --topology v5e:4x4, h100:8 or others (docs/scaling.md)")
    topology = open_topology(TOPOLOGY.value)
    cli.tell(
        f"compiling for {len(topology.devices)} x {topology.chip.title}; at full size this takes minutes"
    )
    if GENERATION.value:
        plan = make_generation_plan(config, topology, batch=BATCH_SIZE.value, length=LENGTH.value)
        text = generation_text
    else:
        plan, text = make_plan(config, topology, length=LENGTH.value), as_text
    print(json.dumps(plan) if JSON.value else text(plan, topology))


if __name__ == "__main__":
    cli.run(main)
