"""What is here, how fast it is, and what looks wrong.

    python -m minigpt5_jax.diagnose
    python -m minigpt5_jax.diagnose --config configs/stage1.py --workdir /shared/runs/a --json

prints versions, devices, the mesh, the rates of collectives, of copies to and from a device and of the
storage, the state of the compile cache and, with ``--config``, samples a second of the run's loader.  Of
several processes start it in each, as training; the first one prints.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from minigpt5_jax import cli
from minigpt5_jax.config import get_config, validate
from minigpt5_jax.diagnosis.report import as_text, diagnose
from minigpt5_jax.training.distributed import initialize, main_process

JSON = flags.DEFINE_boolean("json", False, "Print one JSON object.")


def command() -> None:
    """The command without its command line."""
    given = flags.FLAGS["config"].present > 0
    config = cli.load() if given else validate(get_config())
    initialize(timeout_s=config.run.join_timeout)
    found = diagnose(config, data=given, folder=cli.WORKDIR.value)
    if main_process():
        print(json.dumps(found) if JSON.value else as_text(found))


def main() -> None:
    """Command line."""
    for flag in (cli.CONFIG, cli.WORKDIR):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    cli.start(lambda _: cli.guarded(command))


if __name__ == "__main__":
    main()
