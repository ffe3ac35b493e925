"""What the commands that take ``--config`` share: flags, overrides, and errors a user can read.

python -m minigpt5_jax.train --config configs/stage1.py:variant --workdir runs/a --config.run.seed=1
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from minigpt5_jax.config import ConfigError, describe, get_config, validate
from minigpt5_jax.config.paths import local_path
from minigpt5_jax.data.errors import printable
from minigpt5_jax.data.paths import not_found
from minigpt5_jax.wiring.compile_cache import set_compile_cache  # noqa: F401 - commands call it from here


class _PathParser(flags.ArgumentParser):
    """A path as it was given, with its ``~`` replaced; addresses of object storage are refused."""

    syntactic_help = "a path; ~ is the home folder"

    def parse(self, argument: str) -> str:
        return local_path(argument)


_PATH = (_PathParser(), flags.ArgumentSerializer())
CONFIG = config_flags.DEFINE_config_file("config", None, "Run file, FILE.py or FILE.py:variant.")
WORKDIR = flags.DEFINE(
    _PATH[0], "workdir", None, "Folder of this run: metrics, images, checkpoints.", serializer=_PATH[1]
)
HELP_CONFIG = flags.DEFINE_boolean("help_config", False, "Print every configuration key and stop.")
flags.disclaim_key_flags()  # what define_path defines belongs to the command that calls it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LIST_KEYS, LIST_FLAGS = "--help_config lists every key", "--help lists every flag"
_CONFIG_HOME = re.compile(r"^(--?config=)~(?=/)")


def define_path(name: str, default: str | None, why: str, *, multi: bool = False, **options: Any) -> Any:
    """The holder of a flag whose value is a path (a list of them with ``multi``), ``~`` replaced.

    Every path enters by such a flag, by :func:`folders`, by :func:`parse` (the run file) or by a key of the
    configuration (``Key.path``).
    """
    parser, serializer = _PATH
    if multi:
        return flags.DEFINE_multi(parser, serializer, name, default or [], why, **options)
    return flags.DEFINE(parser, name, default, why, serializer=serializer, **options)


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
    start(lambda _: guarded(command))


def start(main: Callable[[Sequence[str]], Any], words: int = 0) -> None:
    """``main(argv)`` once the flags are parsed: how every command begins.

    Args:
      words: arguments besides flags that the command takes at most.
    """
    app.run(main, flags_parser=functools.partial(parse, words=words))


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
        fail(_told(error))


def report(error: BaseException) -> None:
    """Print an error as :func:`guarded` does, for a process that ends on the spot."""
    if isinstance(error, user_errors()):
        tell(f"error: {_told(error)}")
    elif isinstance(error, KeyboardInterrupt):
        tell("error: stopped")
    else:
        traceback.print_exception(error)


def _told(error: Exception) -> str:
    """The message; of the file system's own errors without their numbers."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno not in FULL:
        return error.strerror
    given = {name: flags.FLAGS[name].value for name in ("output", "workdir", "out") if name in flags.FLAGS}
    places = " or ".join(f"--{name}={value}" for name, value in given.items() if value)
    return f"{error.strerror}, while writing below {places}; make room and give the command again"


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions whose messages are for users."""
    # Imported when one is to be told: they bring JAX along, which many commands do without.
    from minigpt5_jax.data.errors import DataError
    from minigpt5_jax.evaluation.verify import VerificationError
    from minigpt5_jax.planning.topology import PlanError
    from minigpt5_jax.shapes.backbones.fit import FitError
    from minigpt5_jax.training.distributed import DistributedError
    from minigpt5_jax.training.metrics import TrainingDiverged
    from minigpt5_jax.training.profile import ProfileError
    from minigpt5_jax.training.provenance import CheckpointError
    from minigpt5_jax.training.sharding import ShardingError
    from minigpt5_jax.training.tracking import TrackerError
    from minigpt5_jax.weights.errors import WeightFileError
    from minigpt5_jax.weights.export.model import ExportError
    from minigpt5_jax.weights.table import WeightTableError

    return (
        ConfigError,
        DataError,
        VerificationError,
        FitError,
        DistributedError,
        PlanError,
        TrainingDiverged,
        ProfileError,
        CheckpointError,
        ShardingError,
        TrackerError,
        WeightFileError,
        ExportError,
        WeightTableError,
        OSError,
    )


def quiet() -> None:
    """Warnings only (Orbax tells every file it renames), unless ``--verbosity`` asks for more.

    What is logged may quote data; it reaches the terminal as :func:`printable` text.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().setFormatter(_Printable())


class _Printable(logging.PythonFormatter):
    """absl's lines without anything that a terminal would obey."""

    def format(self, record: Any) -> str:
        return printable(super().format(record))


def tell(line: str) -> None:
    """Say on stderr what a command is doing, as stdout is for results."""
    print(printable(line), file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print what is wrong and end the program."""
    tell(f"error: {message}")
    sys.exit(1)


def parse(argv: Sequence[str], words: int = 0) -> list[str]:
    """absl's flags, with configuration errors in a line or two instead of a traceback.

    Args:
      words: arguments besides flags that the command takes at most.

    Raises:
      SystemExit: unknown flag or key, a value of another type, or a run file that cannot be loaded; and with
        status 0 where help was asked for.
    """
    asked = any(re.match(r"--?(h|help(short|full|xml)?|\?)$", word) for word in argv[1:])
    try:
        rest = flags.FLAGS(
            [_CONFIG_HOME.sub(lambda at: at[1] + os.path.expanduser("~"), word) for word in argv]
        )
    except SystemExit as stop:  # absl has printed its help, and would end with status 1
        sys.exit(0 if asked else stop.code)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        of_flag = isinstance(error, flags.UnrecognizedFlagError) or not any(
            re.match("--?config", word) for word in argv[1:]
        )
        fail(f"{_explain(error)}\n{LIST_FLAGS if of_flag else LIST_KEYS}")
    if len(rest) > 1 + words:
        fail(f"unexpected arguments: {' '.join(rest[1 + words :])}\n{LIST_FLAGS}")
    return rest


def pairs(given: Sequence[str], flag: str) -> dict[str, str]:
    """``["a=b"]`` -> ``{"a": "b"}``; ConfigError for anything else, naming the flag."""
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ConfigError(f"--{flag} takes NAME=VALUE, got {item!r}")
        found[name] = value
    return found


def sources(given: Sequence[str]) -> dict[str, str]:
    """``--weights NAME=PATH`` as name -> path, ``~`` replaced; ConfigError for anything else."""
    return folders(given, "weights")


def folders(given: Sequence[str], flag: str) -> dict[str, str]:
    """``--FLAG NAME=PATH`` as name -> path, ``~`` replaced; ConfigError for anything else."""
    return {name: local_path(path) for name, path in pairs(given, flag).items()}


def check_writable(path: str, flag: str = "output") -> str:
    """``path``, which something can be written to: tried before the work, where nothing is lost yet.

    Raises:
      OSError: naming the flag and the folder that cannot be written to; nothing is left behind.
    """
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    folder = folder.parent if folder == Path(path).absolute() and not folder.is_dir() else folder
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)  # a full disk lets files be made
    except OSError as error:
        raise type(error)(
            f"--{flag}={path} cannot be written: {folder}: {error.strerror}; choose another --{flag}"
        ) from None
    return path


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
        return not_found("run file", missing[1].strip("'"))
    if unread := re.search(r"\[Errno \d+\] ([^:]+): '(.+)'$", message):
        return f"run file {unread[2]}: {unread[1]}"
    if "Traceback" in message:  # the run file raised; the last line says what
        last = [line for line in message.splitlines() if line.strip()][-1].strip()
        return last.removeprefix(f"{ConfigError.__module__}.{ConfigError.__name__}: ")
    return message
