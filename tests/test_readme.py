"""The documents are true: the README's Python runs, links lead somewhere, commands and paths exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_imports import ALLOWED

import tiny
from minigpt5_jax.__main__ import WORDS, commands
from minigpt5_jax.config import get_config, keys_of

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "minigpt5_jax/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
RUN = "shapes"
"""The model that the README's Python opens."""
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"python -m ((?:minigpt5_jax|benchmarks)(?:\.\w+)+)")
UNDER_ONE_NAME = re.compile(r"(?:^|`)minigpt5 ([a-z_]+)", re.M)
CONFIG_FILE = re.compile(r"--config[ =](\S+?\.py)\b")
OVERRIDE = re.compile(r"--config\.((?:run|data|model|loss|optimizer|tuning|mesh|weights|inference)\.[\w.]+)")
ROOM = re.compile(r"^\| `([\w/]+)` \| [^|]+ \| ?([^|]*)\|$", re.M)
PATH = re.compile(r"`((?:minigpt5_jax|configs|benchmarks|launch|tests|docs)/[\w./-]+)`")


# ------------------------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A folder with an untrained run of the small world at ``run``; it cannot see, and draws quickly."""
    config = tiny.shapes_stage1()
    # Untrained, it would hardly begin an image by itself.
    config.inference.update(num_inference_steps=1, max_new_tokens=12, force_image="after_text")
    folder = tmp_path_factory.mktemp("readme")
    tiny.save_run(config, folder / "run", step=1)
    return folder


def test_the_readmes_python_runs(workdir, monkeypatch):
    [(_, code)] = [
        block for block in FENCE.findall(README.read_text(encoding="utf-8")) if block[0] == "python"
    ]
    assert code.count(f'"{RUN}"') == 1
    code = code.replace(f'"{RUN}"', '"run"')  # what is packaged takes longer, and has its own test
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(workdir)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    [image] = workdir.glob("*.png")
    assert np.asarray(Image.open(image)).shape == (64, 64, 3)


# ------------------------------------------------------------------------- links, paths, commands


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in HEADING.findall(text)
    }


def links(document: Path) -> Iterator[str]:
    """Relative links of a page, those of images too."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    return (link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:"))


@by_document
def test_relative_links_lead_somewhere(document):
    broken = []
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@by_document
def test_commands_are_modules_that_can_be_run(document):
    broken = []
    for name in sorted(set(COMMAND.findall(document.read_text(encoding="utf-8")))):
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.submodule_search_locations is not None:  # a package
                spec = importlib.util.find_spec(f"{name}.__main__")
        except ModuleNotFoundError:
            spec = None
        if spec is None or '__name__ == "__main__"' not in Path(spec.origin).read_text(encoding="utf-8"):
            broken.append(name)
    assert not broken


@by_document
def test_commands_under_one_name_are_known(document):
    named = set(UNDER_ONE_NAME.findall(document.read_text(encoding="utf-8")))
    assert named <= commands().keys() | WORDS.keys()


@by_document
def test_run_files_and_keys_of_commands_exist(document):
    text = document.read_text(encoding="utf-8")
    files = [path for path in CONFIG_FILE.findall(text) if not path.startswith("FILE")]
    assert not [path for path in files if not (ROOT / path).is_file()]
    named = {path.rstrip(".") for path in OVERRIDE.findall(text)}
    assert not sorted(named - keys_of(get_config()).keys())


@by_document
def test_paths_in_backticks_exist(document):
    """But for names in capitals (``models/NAME/``), which stand for one of your own."""
    named = {path for path in PATH.findall(document.read_text(encoding="utf-8")) if "NAME" not in path}
    assert not sorted(path for path in named if not (ROOT / path).exists())


def test_the_table_of_rooms_is_that_of_the_rules():
    table = ROOM.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert {room: set(re.findall(r"`([\w/]+)`", below)) for room, below in table} == ALLOWED
