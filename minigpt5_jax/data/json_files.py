"""JSON files of others, read so that what is wrong with one is told with its name, and our own written."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt5_jax.data.errors import DataError


@contextlib.contextmanager
def form_of(path: str | Path, wanted: str) -> Iterator[None]:
    """Where reading a file in this context fails on its form, a DataError names the file and what is wanted.

    Args:
      path: the file.  wanted: the rest of the sentence behind its name, with the remedy.
    """
    try:
        yield
    except DataError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} {wanted} ({type(error).__name__}: {error})") from None


def read_text(path: str | Path) -> str:
    """The text of a file; DataError where it is not UTF-8."""
    with form_of(path, "is no text in UTF-8; save it in this encoding"):
        return Path(path).read_text("utf-8")


def read_json(path: str | Path, remedy: str) -> Any:
    """The value of a JSON file.

    Raises:
      DataError: it is no JSON; the message ends with ``remedy``.
    """
    with form_of(path, f"is cut off or no JSON; {remedy}"):
        return json.loads(Path(path).read_bytes())


def read_jsonl(path: str | Path, remedy: str) -> list[Any]:
    """The values of a file of JSON lines; blank lines are passed over.

    Raises:
      DataError: a line is no JSON; with its number, and ``remedy`` at the end.
    """
    found = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):  # bytes: texts may hold U+2028
        if line.strip():
            with form_of(f"{path}:{number}", f"is cut off or no JSON; {remedy}"):
                found.append(json.loads(line))
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
