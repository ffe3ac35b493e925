"""Shared fixtures: the oracle's recorded numbers (tests/oracle/README.md) and strictness of the suite."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

# Where PYTHONDONTWRITEBYTECODE is set, every process that a test starts would compile this package, and
# what is installed without bytecode, from its sources (half of the CPU of importing JAX).
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Eight devices for the meshes.  Compiling is most of the time of a test: unoptimised code is as exact and
# ready sooner (one step of the composite: 7.8 s of CPU with the newer fusion emitters, 3.3 s without).
for flag, value in {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",  # not 32 LLVM modules, each with its own cost
}.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype

# Shapes and dtypes in public signatures are checked while testing, and only then.
jaxtyping.install_import_hook("minigpt5_jax", "beartype.beartype")
_jaxtyped = jaxtyping.jaxtyped
_beartyped = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))  # one error for both


def jaxtyped(*, typechecker: Callable) -> Callable:
    """What the hook decorates with: only signatures with arrays need the dimensions of jaxtyping.

    It binds the arguments of each call and generates two functions for each signature: a quarter of the
    time of tracing, and much of importing the package.  The others are as strict by beartype alone; but for
    functions within functions, which nobody calls from outside and which are made again with each call.
    """

    def decorate(what: Callable) -> Callable:
        if not isinstance(what, types.FunctionType) or has_arrays(what):
            return _jaxtyped(what, typechecker=typechecker)
        public = what.__annotations__ and "<locals>" not in what.__qualname__
        return _beartyped(what) if public else what

    return decorate


def has_arrays(function: types.FunctionType) -> bool:
    """Whether an annotation names a kind of array of jaxtyping, or something that was made of one."""
    names = re.findall(r"\w+", " ".join(map(str, function.__annotations__.values())))
    values = (function.__globals__.get(name) for name in names)
    kinds = (jaxtyping.AbstractArray, jaxtyping.AbstractDtype)
    return any(isinstance(value, type) and issubclass(value, kinds) for value in values)


jaxtyping.jaxtyped = jaxtyped

from minigpt5_jax import minigpt5
from minigpt5_jax.parts.contracts import find

_make_template = minigpt5.make_template
_templates: dict = {}


def make_template(backbone, mapper, generator, *, attention="auto"):
    """A template is a function of what its parts are made with and never changes: tests share theirs.

    Most of building a model is this, and whatever opens, resumes or exports a run builds it.
    """
    parts = {"backbone": backbone, "mapper": mapper, "generator": generator}
    made = [(find(kind, name).module, *sorted(given.items())) for kind, (name, given) in parts.items()]
    key = (attention, *made)
    if key not in _templates:
        _templates[key] = _make_template(backbone, mapper, generator, attention=attention)
    return _templates[key]


minigpt5.make_template = make_template

import jax

jax.config.update("jax_debug_key_reuse", True)

# Tracing makes garbage by the million: modules, which stay anyway, are not searched for it, and what is
# young is looked through less often.
gc.collect()
gc.freeze()
gc.set_threshold(10_000, 20, 20)

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="session", autouse=True)
def no_tensorboard():
    """TensorFlow takes six seconds to import; training/test_metrics.py has a process for its writer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt5_jax.training.metrics._open_tensorboard", lambda directory: None)
        yield


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Folder with the files recorded from the original code."""
    return ORACLE


@pytest.fixture(scope="session")
def oracle_configs() -> dict:
    """Tiny configurations in Hugging Face field names."""
    return json.loads((ORACLE / "configs.json").read_text())


@pytest.fixture(scope="session")
def oracle_weights() -> dict[str, np.ndarray]:
    """The full stage-1 state dict under the original's key names."""
    from safetensors.numpy import load_file

    return load_file(ORACLE / "weights.safetensors")


@pytest.fixture(scope="session")
def oracle_cases() -> dict[str, np.ndarray]:
    """Recorded inputs, draws, intermediates, losses, gradients and updates."""
    with np.load(ORACLE / "cases.npz", allow_pickle=False) as cases:
        return {name: cases[name] for name in cases.files}


@pytest.fixture(scope="session")
def tiny_template():
    """Composite small enough for any test (tests/tiny.py)."""
    import tiny

    return tiny.make_tiny_template()


@pytest.fixture(scope="session")
def tiny_params(tiny_template):
    """Random parameters of ``tiny_template``."""
    import tiny

    return tiny.make_tiny_params(tiny_template)


@pytest.fixture(scope="session")
def tiny_batch():
    """``make(rows=8, seed=0, length=24) -> Batch``."""
    import tiny

    return tiny.make_tiny_batch
