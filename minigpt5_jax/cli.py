"""What the commands that take ``--config`` share: flags, overrides, and errors a user can read.

python -m minigpt5_jax.train --config configs/stage1.py:variant --workdir runs/a --config.run.seed=1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from minigpt5_jax.config import ConfigError, describe, get_config, validate

CONFIG = config_flags.DEFINE_config_file("config", None, "Run file, FILE.py or FILE.py:variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: metrics, images, checkpoints.")
HELP_CONFIG = flags.DEFINE_boolean("help_config", False, "Print every configuration key and stop.")
LIST_KEYS = "--help_config lists every key"


def run(main: Callable[[ConfigDict], Any]) -> None:
    """``main(config)`` with the configuration of the command line, validated; errors as :func:`guarded`."""

    def command() -> None:
        config = load()
        if HELP_CONFIG.value:
            print(describe(config))
        else:
            main(config)

    for flag in (CONFIG, WORKDIR, HELP_CONFIG):  # of this module, so --help would leave them out
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(lambda _: guarded(command), flags_parser=parse)


def guarded(command: Callable[[], Any], stopped: str = "stopped") -> None:
    """Run a command: what is wrong with its input ends the program with one message and status 1.

    Args:
      stopped: what Ctrl-C says.

    Any exception that is not one of :func:`user_errors` keeps its traceback.
    """
    quiet()
    try:
        command()
    except KeyboardInterrupt:
        fail(stopped)
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        fail(str(error))


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions whose messages are for users."""
    # Imported when one is to be told: they bring JAX along, which many commands do without.
    from minigpt5_jax.data.errors import DataError
    from minigpt5_jax.evaluation.verify import VerificationError
    from minigpt5_jax.training.distributed import DistributedError
    from minigpt5_jax.training.metrics import TrainingDiverged
    from minigpt5_jax.training.provenance import CheckpointError
    from minigpt5_jax.training.sharding import ShardingError
    from minigpt5_jax.weights.errors import WeightFileError
    from minigpt5_jax.weights.export.model import ExportError
    from minigpt5_jax.weights.table import WeightTableError

    return (
        ConfigError,
        DataError,
        VerificationError,
        DistributedError,
        TrainingDiverged,
        CheckpointError,
        ShardingError,
        WeightFileError,
        ExportError,
        WeightTableError,
        OSError,
    )


def quiet() -> None:
    """Warnings only (Orbax tells every file it renames), unless ``--verbosity`` asks for more."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def set_compile_cache(config: ConfigDict) -> None:
    """Compiled programs are kept on disk, so that a restart is quick."""
    import jax  # not needed to say what is wrong with a configuration

    if config.run.compile_cache:
        folder = Path(config.run.compile_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def fail(message: str) -> None:
    """Print what is wrong and end the program."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def parse(argv: Sequence[str], words: int = 0) -> list[str]:
    """absl's flags, with configuration errors in a line or two instead of a traceback.

    Args:
      words: arguments besides flags that the command takes at most.

    Raises:
      SystemExit: unknown flag or key, a value of another type, or a run file that cannot be loaded.
    """
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1 + words:
            fail(f"unexpected arguments: {' '.join(rest[1 + words :])}")
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(f"{_explain(error)}\n{LIST_KEYS}")
        raise


def pairs(given: Sequence[str], flag: str) -> dict[str, str]:
    """``["a=b"]`` -> ``{"a": "b"}``; ConfigError for anything else, naming the flag."""
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ConfigError(f"--{flag} takes NAME=VALUE, got {item!r}")
        found[name] = value
    return found


def load() -> ConfigDict:
    """The configuration of the parsed flags, ``run.workdir`` set from ``--workdir``.

    Raises:
      ConfigError: no run file, one that cannot be loaded, or values that do not pass :func:`validate`.
    """
    try:
        config = CONFIG.value
        given = config is not None and bool(config.keys())
    except OSError as error:  # kept back by ml_collections until the value is wanted
        raise ConfigError(_explain(error)) from None
    if not given:
        if HELP_CONFIG.value:
            return get_config()
        raise ConfigError("give a run file, for example --config configs/shapes_stage1.py")
    if WORKDIR.value is not None:
        config.run.workdir = WORKDIR.value
    return validate(config)


def _explain(error: Exception) -> str:
    """What ml_collections means, without the quotes and tracebacks it wraps around it."""
    message = str(error)
    if isinstance(error, AttributeError | KeyError):
        name, hint = re.search(r"(\w+)", message), re.search(r"Did you mean .*\?", message)
        return (
            f"unknown configuration key {name[1] if name else message!r}. {hint[0] if hint else ''}".strip()
        )
    if missing := re.search(r"No such file or directory: (.+)", message):
        return f"run file not found: {missing[1]}"
    if "Traceback" in message:  # the run file raised; the last line says what
        last = [line for line in message.splitlines() if line.strip()][-1].strip()
        return last.removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
    return message
