"""Devices that are not here: a name such as ``v5e:4x4`` or ``h100:8`` -> what JAX can compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

CHIPS = Path(__file__).with_name("chips")
COMPILERS = {
    "tpu": ("libtpu", "pip install 'minigpt5_jax[plan]' (libtpu 0.0.42)"),
    "cuda": (
        "jax_cuda13_plugin",
        "pip install 'minigpt5_jax[plan-gpu]' (the CUDA plugin, 3 GB), best in an environment of its own",
    ),
}
"""Platform -> module that compiles for it, and how to get it."""
OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {},
    # Without a card nothing can be timed, and Triton has no tiling for some products then.
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}
"""Platform -> options of its compiler."""


class PlanError(ValueError):
    """Something that cannot be planned; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published data of a chip (``chips/*.toml``).

    Attributes:
      platform: ``tpu`` or ``cuda``.  title: its name in words.
      peak_flops: of bf16 matrix products, a second.  bandwidth: bytes a second of its memory.
      memory: bytes that a program may have.
      links, link_bandwidth: rings that a collective may use at once, and bytes a second along each.
      most: chips that these links join; 0 where the platform's own topologies decide.
      target: of a GPU, what XLA takes in place of the device.
    """

    platform: str
    title: str
    peak_flops: float
    bandwidth: float
    memory: int
    links: int
    link_bandwidth: float
    most: int = 0
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to compile for.  ``name``: as it was asked for.  ``devices``: as JAX has them."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def attention(self) -> str:
        """What ``model.attention=auto`` means on this platform."""
        return {"tpu": "splash", "cuda": "cudnn"}[self.chip.platform]


def read_chip(name: str) -> Chip:
    """A chip by its name, or by the path of a description like those in ``chips/``.

    Raises:
      PlanError: there is none, or the description lacks something.
    """
    path = Path(name) if name.endswith(".toml") else CHIPS / f"{name}.toml"
    if not path.is_file() or not (name.endswith(".toml") or re.fullmatch(r"\w+", name)):
        known = ", ".join(sorted(file.stem for file in CHIPS.glob("*.toml")))
        raise PlanError(
            f"unknown chip {name!r}; known: {known}, or the path of a description like {CHIPS}/h100.toml"
        )
    try:
        return Chip(**tomllib.loads(path.read_text()))
    except (TypeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path} does not describe a chip: {error}; compare {CHIPS}/h100.toml") from None


def open_topology(name: str) -> Topology:
    """The chips called ``name``, to be opened before JAX has used a device; nothing is run on them.

    Raises:
      PlanError: there is no such topology, or its compiler is not installed.
    """
    kind, colon, shape = name.rpartition(":")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise PlanError(f"topology {name!r} is not CHIP:SHAPE, such as v5e:4x4, v5p:4x4x8 or h100:8")
    chip = read_chip(kind)
    if chip.most and ("x" in shape or int(shape) > chip.most):
        raise PlanError(
            f"topology {name!r}: a host has 1 to {chip.most} of these, such as {kind}:{chip.most}"
        )
    require_compiler(chip.platform)
    _prepare()
    try:
        found = _gpus(chip, int(shape)) if chip.most else _tpus(kind, shape)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"topology {name!r} does not exist ({reason}); such as v5e:2x2, v5e:4x4, v5p:2x2x1"
        ) from None
    return Topology(name, chip, tuple(found))


def require_compiler(platform: str) -> None:
    """Raises PlanError, with what to install, where nothing compiles for ``platform`` here."""
    if remedy := missing_compiler(platform):
        raise PlanError(f"planning for {platform.upper()} needs its compiler: {remedy}")


def missing_compiler(platform: str) -> str:
    """What to install so that this machine compiles for ``platform``; '' where it can."""
    module, remedy = COMPILERS[platform]
    return "" if importlib.util.find_spec(module) else remedy


def _prepare() -> None:
    """No device of this machine is touched, and no metadata server is asked for TPUs."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")


def _tpus(kind: str, shape: str) -> list[Any]:
    sizes = [int(size) for size in shape.split("x")]
    alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
    return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **alone).devices


def _gpus(chip: Chip, count: int) -> list[Any]:
    shape = f"1x1x{count}"  # slices, hosts, cards of a host
    return topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=chip.target).devices
