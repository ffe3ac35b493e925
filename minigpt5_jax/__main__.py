"""``minigpt5 COMMAND ...``: every command under one name; ``python -m minigpt5_jax`` is the same.

A command is a file beside this one that can be run (``python -m minigpt5_jax.COMMAND``), so a new one needs
no entry here.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

EXAMPLES = """
Examples:

    minigpt5 chat --checkpoint shapes --message "please draw: a large red circle."
    minigpt5 train --config configs/shapes_stage1.py --workdir runs/first
    minigpt5 generate --checkpoint runs/first --prompt "a large red circle"

`minigpt5 COMMAND --help` has the flags of a command and more examples.
"""
WORDS = {"story": ("generate", "story")}
"""Names of a part of a command."""


def commands() -> dict[str, Path]:
    """Name -> file of every command: the files beside this one that can be run."""
    return {
        file.stem: file
        for file in sorted(Path(__file__).parent.glob("*.py"))
        if not file.stem.startswith("_") and '__name__ == "__main__"' in file.read_text("utf-8")
    }


def summary(file: Path) -> str:
    """The first line of a file's docstring; nothing is imported."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def overview(known: Mapping[str, Path]) -> str:
    """What ``minigpt5 --help`` prints."""
    rows = [f"    {name:10} {summary(file)}" for name, file in known.items()]
    rows += [f"    {name:10} The same as `{' '.join(words)}`." for name, words in WORDS.items()]
    return "\n".join(["usage: minigpt5 COMMAND [flags]", "", *rows, EXAMPLES.rstrip()])


def main() -> None:
    """Run the command that the first word names."""
    known, words = commands(), sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(known))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("minigpt5_jax"))
        return
    name, *fixed = WORDS.get(words[0], words[:1])
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: unknown command {name!r}.{hint} `minigpt5 --help` lists them", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"minigpt5 {name}", *fixed, *words[1:]]
    runpy.run_module(f"minigpt5_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
