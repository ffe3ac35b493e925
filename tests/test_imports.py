"""The direction of imports that ARCHITECTURE.md promises, read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt5_jax.parts.contracts import shipped

ROOT = Path(__file__).parents[1]
PACKAGE = "minigpt5_jax"
SHIPPED = {
    f"weights/export/{name}.py" for name in ("torch_mapper", "torch_decoder_only_mapper", "torch_example")
}
"""PyTorch sources that an export copies beside the weights; nothing here imports them."""
FILES = sorted(
    path for path in (ROOT / PACKAGE).rglob("*.py") if str(path.relative_to(ROOT / PACKAGE)) not in SHIPPED
)

# Rooms from the ground up: a room may import from those named here and from itself, and so on downward, so
# that no arrow runs back up.  A folder named here is a room of its own; the files beside it are another.
ALLOWED: dict[str, set[str]] = {
    "batch": set(),
    "weights": set(),  # the engine: rules, views, formats
    "models": {"weights"},
    "diffusion": {"models"},
    "weights/foreign": {"weights", "models", "diffusion"},
    "weights/export": {"weights", "models", "weights/foreign"},
    "data": set(),  # errors and images
    "data/text": {"data"},
    "data/samples": {"data", "data/text"},
    "data/sources": {"data", "data/text", "data/samples"},
    "data/batches": {"data", "data/text", "data/samples", "data/sources", "batch"},
    "data/prepare": {"data", "data/text", "data/samples", "data/sources", "data/batches"},
    "parts": {"models", "diffusion", "batch", "data/text", "weights", "weights/foreign", "weights/export"},
    "config": {"parts"},
    "minigpt5": {"models", "parts", "batch"},
    "training": {"minigpt5", "models", "parts", "batch", "data", "data/batches"},
    "inference": {
        "minigpt5", "models", "diffusion", "parts", "batch",
        "data", "data/text", "data/samples",
    },
    "shapes": {"models", "weights", "weights/foreign"},
    "shapes/backbones": {
        "shapes", "models", "diffusion", "parts", "weights",
        "data", "data/text", "data/samples", "data/sources",
    },
    "wiring": {
        "config", "parts", "minigpt5", "models", "diffusion", "batch", "training", "inference", "shapes",
        "weights", "weights/foreign", "weights/export",
        "data", "data/text", "data/samples", "data/sources", "data/batches", "data/prepare",
    },
    "planning": {"wiring", "config", "parts", "training", "data/batches"},
    "diagnosis": {"wiring", "config", "training", "data", "data/batches"},
    "evaluation": {
        "wiring", "config", "parts", "minigpt5", "models", "diffusion", "batch", "training", "inference",
        "shapes", "data", "data/text", "data/sources",
    },
    "evaluation/metrics": {"models", "weights", "data", "data/text"},
    "evaluation/suite": {
        "evaluation", "evaluation/metrics", "wiring", "config", "training", "inference", "shapes", "weights",
        "data", "data/text", "data/samples", "data/sources",
    },
    "evaluation/human": {"evaluation/suite", "config", "data"},
    "evaluation/benchmarks": {"evaluation/suite", "evaluation/metrics", "config", "data"},
    "evaluation/shapes": {
        "evaluation", "wiring", "config", "inference", "shapes", "shapes/backbones",
        "data", "data/text", "data/samples", "data/sources",
    },
    "serving": {"wiring", "config", "inference", "data"},
}  # fmt: skip
VERBS = {
    "__main__", "cli", "train", "plan", "diagnose", "generate", "chat", "serve", "prepare", "convert",
    "export", "evaluate", "demo",
}  # fmt: skip
"""On the top floor, with what they share; they may import from any room, and no room from them."""
COMMANDS = {
    "evaluation/shapes/__main__.py",
    "shapes/dataset.py",
    "shapes/backbones/pretrain.py",
    "shapes/backbones/evaluate.py",
}
"""Commands that live in a room: they may use ``cli``."""
NEVER = {"torch", "torchvision", "peft", "timm", "lightning"}
TORCH_LATE = {"weights/export/minigpt5.py"}  # a Lightning checkpoint is a torch container
ONLY_LATE = {"tensorflow", "tensorflow_datasets", "clu", "transformers", "diffusers"}
ITSELF_LATE = {
    "data/prepare/builders/tfds_builders.py": {"tensorflow_datasets"}
}  # its classes derive from TFDS's
LATE_MODULES = {f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.')}" for name in ITSELF_LATE}


def room(parts: tuple[str, ...]) -> str:
    """The room of a module, given the names of its path below the package."""
    for depth in range(len(parts), 0, -1):
        if "/".join(parts[:depth]) in ALLOWED:
            return "/".join(parts[:depth])
    return parts[0] if parts else "__init__"


def room_of(path: Path) -> str:
    """The room of a file."""
    return room(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


def modules() -> set[str]:
    """Full name of every module and package."""
    names = {".".join((PACKAGE, *p.relative_to(ROOT / PACKAGE).with_suffix("").parts)) for p in FILES}
    return names | {name.removesuffix(".__init__") for name in names}


MODULES = modules()


def module_of(name: str) -> str:
    """The module that an imported name belongs to: itself, or the one it is taken from."""
    return name if name in MODULES else name.rpartition(".")[0]


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
    here, file = room_of(path), str(path.relative_to(ROOT / PACKAGE))
    for name in early | late:
        top = name.partition(".")[0]
        late_torch = top == "torch" and name in late and str(path.relative_to(ROOT / PACKAGE)) in TORCH_LATE
        assert top not in NEVER or late_torch, f"{top} is for tests only"
        if top in ONLY_LATE - ITSELF_LATE.get(str(path.relative_to(ROOT / PACKAGE)), set()):
            assert name not in early, f"{top} takes seconds: import it where it is used"
        assert name.rpartition(".")[0] not in LATE_MODULES or name in late, f"import {name} where it is used"
        if top == PACKAGE and here not in VERBS:
            there = room(tuple(module_of(name).split(".")[1:]))
            allowed = ALLOWED[here] | {here} | ({"cli"} if file in COMMANDS else set())
            assert there in allowed, f"{here} imports {there} ({name}); it may import {sorted(allowed)}"


def test_no_arrow_runs_back_up():
    """The rules themselves have an order: what a room may import stands before it."""
    known: set[str] = set()
    for name, below in ALLOWED.items():
        assert below <= known, f"{name} may import {sorted(below - known)}, which stand above it"
        known.add(name)


def test_inference_and_evaluation_know_protocols_only():
    """What generates and judges reaches no part and no tower: another part must do without a change there."""
    for path in FILES:
        here = room_of(path)
        if here in {"inference", "evaluation", "evaluation/shapes", "training", "minigpt5"}:
            for name in set.union(*imports(path)):
                for kind in ("backbones", "mappers", "generators"):
                    assert not name.startswith(f"{PACKAGE}.parts.{kind}"), f"{path}: {name}"
        if here not in {"parts", "shapes/backbones", "weights/foreign", "weights/export", "models"}:
            assert "backbone.llm" not in path.read_text(), f"{path} reaches past the Backbone protocol"


def tower_names() -> set[str]:
    """What towers are called: folders of ``models/``, and names under ``weights`` in the parts that ship."""
    folders = {p.name for p in (ROOT / PACKAGE / "models").iterdir() if (p / "weights.py").is_file()}
    uses = {name for part in shipped() for name, use in part.uses.items() if use.tower is not None}
    return (folders | uses) - {"mapper"}  # the kind of a part, too


def test_no_tower_is_named_outside_of_its_room():
    """A variant is one file: nothing that is general lists towers."""
    quoted = re.compile("|".join(f"""['"]{name}['"]""" for name in sorted(tower_names())))
    exempt = {"models", "parts", "weights/foreign", "shapes", "shapes/backbones"}
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in FILES
        if room_of(path) not in exempt
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if quoted.search(line)
    ]
    assert not found, "\n".join(found)


def test_only_verbs_stand_on_the_top_floor():
    top = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert top == VERBS | {"__init__", "batch", "minigpt5"}


def test_tensorflow_is_imported_by_the_metric_writer_alone():
    users = {
        str(path.relative_to(ROOT / PACKAGE))
        for path in FILES
        for name in set.union(*imports(path))
        if name.partition(".")[0] in {"tensorflow", "clu"}
    }
    assert users == {"training/metrics.py"}


def test_every_room_has_a_rule():
    assert {room_of(path) for path in FILES} == ALLOWED.keys() | VERBS | {"__init__"}


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
        "import sys, minigpt5_jax.wiring.training\n"
        "print(sorted({'torch', 'tensorflow', 'transformers', 'diffusers', 'clu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
