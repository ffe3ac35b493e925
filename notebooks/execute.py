"""Execute the notebooks, and write each ``.ipynb`` anew from its script.

    python notebooks/execute.py                        # all five, about ten minutes on two cores
    python notebooks/execute.py notebooks/4_*.py       # some

The scripts (``.py``, jupytext's percent format) are the sources; a notebook beside them is its script with
outputs.  A cell that fails ends this with its error, and that notebook stays as it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(HERE.glob("[0-9]_*.py"))


def execute(script: Path, *, timeout: float = 1800) -> Any:
    """The notebook of a script, with its outputs.

    Args:
      script: in percent format.  timeout: of a cell, seconds.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(script)
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    client = NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()
    notebook.metadata.pop("language_info", None)  # the version of whoever ran it last
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # random ones would differ each time
    return notebook


def main() -> None:
    """Execute what was named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scripts", nargs="*", type=Path, default=SCRIPTS)
    for script in parser.parse_args().scripts:
        start = time.time()
        notebook = execute(script)
        output = script.with_suffix(".ipynb")
        nbformat.write(notebook, output)
        print(f"{output}: {time.time() - start:.0f} s, {output.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
