"""The direction of imports that ARCHITECTURE.md promises, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "minigpt5_jax"
SHIPPED = {
    f"weights/export/{name}.py" for name in ("torch_mapper", "torch_decoder_only_mapper", "torch_example")
}
"""PyTorch sources that an export copies beside the weights; nothing here imports them."""
FILES = sorted(
    path for path in (ROOT / PACKAGE).rglob("*.py") if str(path.relative_to(ROOT / PACKAGE)) not in SHIPPED
)

MODEL = {"models", "diffusion", "parts", "minigpt5", "batch"}
ALLOWED: dict[str, set[str]] = {
    # room or file -> rooms it may import from, besides itself; everything else is a command line
    "__init__": MODEL | {"config", "training", "inference", "build", "export", "pretrained"},
    "batch": set(),
    "tuning": set(),
    "models": set(),
    "diffusion": {"models"},
    "parts": {"models", "diffusion", "batch"},
    "minigpt5": {"models", "diffusion", "parts", "batch"},
    "weights": {"models"},
    "data": {"batch"},
    "shapes": {"models", "diffusion", "parts", "batch", "data", "weights"},
    "training": MODEL | {"tuning", "data"},
    "inference": MODEL | {"data"},
    "config_keys": {"tuning"},
    "profiles": set(),
    "config": {"config_keys", "profiles", "tuning"},
}
# and what they share
COMMANDS = {
    "cli",
    "frozen_sources",
    "build",
    "inputs",
    "restore",
    "sessions",
    "trained",
    "train",
    "generate",
    "pretrain",
    "prepare",
    "demo",
    "export",
    "features",
    "convert",
    "weights_plan",
    "pretrained",
    "verify",
    "watch",
    "judge",
}
NEVER = {"torch", "torchvision", "peft", "timm", "lightning"}
TORCH_LATE = {"weights/export/minigpt5.py"}  # a Lightning checkpoint is a torch container
ONLY_LATE = {"tensorflow", "tensorflow_datasets", "clu", "transformers", "diffusers"}
ITSELF_LATE = {"data/builders/tfds_builders.py": {"tensorflow_datasets"}}  # its classes derive from TFDS's
LATE_MODULES = {f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.')}" for name in ITSELF_LATE}


def room(path: Path) -> str:
    """First name under the package: ``models`` or, for a file there, its stem; ``judge`` for the judges of
    the small world, which are command lines beside it."""
    first, *rest = path.relative_to(ROOT / PACKAGE).parts
    return "judge" if first == "shapes" and rest[0].startswith("judge") else first.removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    """Full names an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute in this project"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(names imported when the module is, names imported inside functions)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    late_nodes = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    early, late = set(), set()
    for node in ast.walk(tree):
        (late if id(node) in late_nodes else early).update(imported(node))
    return early, late


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path):
    early, late = imports(path)
    here = room(path)
    for name in early | late:
        top, _, rest = name.partition(".")
        late_torch = top == "torch" and name in late and str(path.relative_to(ROOT / PACKAGE)) in TORCH_LATE
        assert top not in NEVER or late_torch, f"{top} is for tests only"
        if top in ONLY_LATE - ITSELF_LATE.get(str(path.relative_to(ROOT / PACKAGE)), set()):
            assert name not in early, f"{top} takes seconds: import it where it is used"
        assert name.rpartition(".")[0] not in LATE_MODULES or name in late, f"import {name} where it is used"
        if top == PACKAGE and here not in COMMANDS:
            there = rest.partition(".")[0]
            allowed = ALLOWED[here] | {here}
            assert there in allowed, f"{here} imports {there}; it may import {sorted(allowed)}"


def test_tensorflow_is_imported_by_the_metric_writer_alone():
    users = {
        str(path.relative_to(ROOT / PACKAGE))
        for path in FILES
        for name in set.union(*imports(path))
        if name.partition(".")[0] in {"tensorflow", "clu"}
    }
    assert users == {"training/metrics.py"}


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} - COMMANDS <= ALLOWED.keys()


def test_module_imports_have_no_cycle():
    graph = {}
    for path in FILES:
        name = ".".join((PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = imports(path)[0]
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for name in graph[module]:
            # `from package import module` names the module; `from module import thing` its parent.
            target = name if name in graph else name.rpartition(".")[0]
            if target in graph and target != module:
                visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_building_a_model_loads_no_other_framework():
    """Startup time: what a training run imports before its first step."""
    code = (
        "import sys, minigpt5_jax.build, minigpt5_jax.training.metrics, minigpt5_jax.training.checkpoint\n"
        "print(sorted({'torch', 'tensorflow', 'transformers', 'diffusers', 'clu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
