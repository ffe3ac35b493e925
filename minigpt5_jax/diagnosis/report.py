"""Everything that ``diagnose`` says, as one JSON object and as text."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.diagnosis import measure
from minigpt5_jax.training.provenance import git_revision
from minigpt5_jax.training.sharding import ShardingError, make_mesh
from minigpt5_jax.wiring.feature_cache import checkpoint_bytes
from minigpt5_jax.wiring.inputs import open_loader, open_sources
from minigpt5_jax.wiring.model import ModelSpec, build
from minigpt5_jax.wiring.placement import fit_accumulation, open_mesh
from minigpt5_jax.wiring.used_towers import unused_towers

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
ACCELERATORS = {
    "/dev/nvidia0": ("an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("a TPU", "tpu"),
    "/dev/vfio/0": ("a TPU", "tpu"),
}
"""File of a device -> what it is, and the extra that drives it."""
SLOW_WRITE, SLOW_READ = 50.0, 100.0  # MB/s: a checkpoint of stage 1 takes half a minute
LITTLE_SHARED = 2**30  # bytes of /dev/shm


@dataclasses.dataclass
class Diagnosis:
    """What was found.  ``wrong``: a line for everything that looks wrong, with the remedy."""

    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)


def diagnose(config: ConfigDict, *, data: bool, folder: str | None = None) -> dict[str, Any]:
    """One object of versions, host, devices, mesh, storage, rates, compile cache, and what looks ``wrong``.

    What cannot be measured is missing, and ``wrong`` says why.  Of several processes all must call it.

    Args:
      config: for the mesh, the cache and, with ``data``, the loader of its training data.
      folder: where a run would write, to measure the storage; its workdir or the present folder by default.
    """
    here = Diagnosis()
    _versions(here)
    _host(here, config.data.worker_count if data else 0)
    _devices(here)
    place = _existing(Path(folder or config.run.workdir or "."))
    spec = build(config) if data else None
    config, mesh = _settled(here, config, spec)
    here.found["mesh"] = dict(mesh.shape)
    here.found["rates"] = {
        **{f"{name}_gb_s": rate for name, rate in measure.transfers().items()},
        **{f"collectives_{axis}_gb_s": rate for axis, rate in measure.collectives(mesh).items()},
    }
    _storage(here, place)
    _compile_cache(here, config)
    if spec is not None:
        _data(here, config, spec, mesh, place)
    return {**here.found, "wrong": here.wrong}


def _versions(here: Diagnosis) -> None:
    versions = {"python": platform.python_version(), "minigpt5_jax": git_revision()}
    for name in (*PACKAGES, *PLUGINS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    here.found["versions"] = versions
    for text in _required():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            here.wrong.append(
                f"{wanted.name} is not installed: pip install '{wanted.name}{wanted.specifier}'"
            )
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            here.wrong.append(
                f"{wanted.name} {installed} is installed, not {wanted.specifier}: "
                f"pip install '{wanted.name}{wanted.specifier}'"
            )


def _required() -> list[str]:
    """What the installed package asks for; nothing where it runs from a bare checkout."""
    try:
        return importlib.metadata.requires("minigpt5_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _host(here: Diagnosis, workers: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here.found["host"] = {"system": platform.platform(), "cores": cores, "memory_gb": memory / 1e9}
    if workers > cores:
        here.wrong.append(f"{workers} reader processes for {cores} cores: --config.data.worker_count={cores}")
    shared = Path("/dev/shm")
    if workers and shared.is_dir() and shutil.disk_usage(shared).total < LITTLE_SHARED:
        size = shutil.disk_usage(shared).total / 2**20
        here.wrong.append(
            f"/dev/shm has {size:.0f} MiB, through which reader processes hand over images: more of it "
            "(docker run --shm-size=4g), or --config.data.worker_count=0"
        )


def _devices(here: Diagnosis) -> None:
    devices = jax.devices()
    limits = devices[0].memory_stats() if devices[0] in jax.local_devices() else None
    here.found["devices"] = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "memory_gb": limits["bytes_limit"] / 1e9 if limits and "bytes_limit" in limits else None,
    }
    if devices[0].platform != "cpu":
        return
    chosen = os.environ.get("JAX_PLATFORMS", "")
    for file, (what, extra) in ACCELERATORS.items():
        if Path(file).exists():
            remedy = (
                f"unset JAX_PLATFORMS={chosen}"
                if chosen
                else f"pip install 'minigpt5_jax[{extra}]', and see what JAX says when it starts"
            )
            here.wrong.append(f"{what} is here ({file}), but JAX runs on the CPU: {remedy}")


def _settled(
    here: Diagnosis, config: ConfigDict, spec: ModelSpec | None
) -> tuple[ConfigDict, jax.sharding.Mesh]:
    """(configuration with its mesh settled, mesh) as training does it; without a model nothing is split."""
    sizes = config.mesh
    try:
        if spec is not None:
            return open_mesh(config, spec.without(unused_towers(config, spec, watched=True)))
        return config, make_mesh(sizes.data, sizes.fsdp, 1 if sizes.tensor is None else sizes.tensor)
    except ShardingError as error:
        here.wrong.append(f"{error}: choose mesh.data, mesh.fsdp and mesh.tensor whose product is that")
        return config, make_mesh()


def _existing(path: Path) -> Path:
    """``path``, or the first folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _storage(here: Diagnosis, place: Path) -> None:
    free = shutil.disk_usage(place).free
    here.found["storage"] = {"folder": str(place), "free_gb": free / 1e9}
    try:
        rates = measure.storage(place)
    except OSError as error:
        here.wrong.append(f"{place} cannot be written ({error.strerror}): choose another --workdir")
        return
    here.found["rates"] |= {f"storage_{name}_mb_s": rate for name, rate in rates.items()}
    for name, slow in (("write", SLOW_WRITE), ("read", SLOW_READ)):
        if rates[name] < slow:
            here.wrong.append(
                f"{place}: {name}s {rates[name]:.0f} MB/s: checkpoints and images want a faster disk"
            )


def _compile_cache(here: Diagnosis, config: ConfigDict) -> None:
    if not config.run.compile_cache:
        here.found["compile_cache"] = None
        here.wrong.append("no compile cache, so every start compiles anew: set run.compile_cache")
        return
    folder = Path(config.run.compile_cache).expanduser()
    programs = [file.stat().st_size for file in folder.glob("*-cache")] if folder.is_dir() else []
    here.found["compile_cache"] = {
        "folder": str(folder),
        "programs": len(programs),
        "gb": sum(programs) / 1e9,
    }
    if not os.access(_existing(folder), os.W_OK):
        here.wrong.append(f"the compile cache {folder} cannot be written: set run.compile_cache")


@contextlib.contextmanager
def _somewhere(config: ConfigDict) -> Iterator[ConfigDict]:
    """The configuration in a workdir of its own: the small world is drawn there."""
    with tempfile.TemporaryDirectory() as folder:
        changed = config.copy_and_resolve_references()
        changed.run.workdir = folder
        yield changed


def _data(here: Diagnosis, config: ConfigDict, spec: ModelSpec, mesh: jax.sharding.Mesh, place: Path) -> None:
    """The loader, and whether checkpoints fit."""
    free, wanted = here.found["storage"]["free_gb"] * 1e9, checkpoint_bytes(config, spec)
    here.found["storage"]["checkpoints_gb"] = wanted / 1e9
    if wanted > free:
        here.wrong.append(
            f"{place} has {free / 1e9:.1f} GB, the checkpoints of this run take {wanted / 1e9:.1f}: make "
            "room, or lower run.keep_latest and run.keep_best"
        )
    try:
        with _somewhere(fit_accumulation(config, mesh)) as moved:
            source, _ = open_sources(moved, spec.sizes)
            loader = open_loader(moved, spec, source, training=True)
            with contextlib.closing(loader):
                here.found["rates"]["loader_samples_s"] = measure.samples(loader)
            skipped = len(loader.skipped)
    except (DataError, ShardingError, OSError) as error:
        here.wrong.append(f"training data: {error}")
        return
    here.found["data"] = {"source": source.describe(), "samples": len(source), "unusable_seen": skipped}
    if skipped:
        here.wrong.append(f"{skipped} unusable samples: python -m minigpt5_jax.prepare check lists them")


def as_text(found: dict[str, Any]) -> str:
    """The object for reading."""
    lines = []
    for title, section in found.items():
        if title == "wrong":
            continue
        lines.append(title.replace("_", " "))
        rows = {"none": ""} if section is None else section
        lines += [f"  {name.replace('_', ' '):<26} {_shown(value)}" for name, value in rows.items()]
    wrong = found["wrong"]
    lines += ["what looks wrong", *(f"  * {line}" for line in wrong or ["nothing"])]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "unknown" if value is None else str(value)
