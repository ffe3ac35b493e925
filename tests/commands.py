"""Commands as a user gives them, each in a process of its own, without what starting one costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import importlib, json, os, signal, sys
from minigpt5_jax import cli, config
module, code = sys.argv[1:]
importlib.import_module(module)
cli.user_errors()  # imports them
config.get_config()  # imports the parts
for line in sys.stdin:
    arguments, *files = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(120)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = [module, *arguments]
    exec(code)
    break
"""
RUN = """
import runpy
runpy.run_module(sys.modules.pop(module).__name__, run_name="__main__", alter_sys=True)
"""


class Commands:
    """A process that has imported a command and forks for each run of it.

    What a run changes is lost with it, as in a process of its own; importing JAX is most of what that costs.
    """

    def __init__(self, server: subprocess.Popen, folder: Path):
        self.server, self.files = server, (folder / "stdout", folder / "stderr")

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess:
        """What ``python -m module arguments`` gives in the root of the repository."""
        for file in self.files:
            file.write_text("")
        words = [str(argument) for argument in arguments]
        print(json.dumps([words, *map(str, self.files)]), file=self.server.stdin, flush=True)
        status = self.server.stdout.readline()
        assert status, "the process that runs the commands has ended"
        out, err = (file.read_text() for file in self.files)
        return subprocess.CompletedProcess(words, int(status), out, err)


def serve(folder: Path, module: str, code: str = RUN) -> Iterator[Commands]:
    """The command ``python -m module``, for a fixture to yield; ``code`` is run in its place."""
    command = [sys.executable, "-c", SERVER, module, code]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=ROOT) as server:
        yield Commands(server, folder)
        server.stdin.close()
