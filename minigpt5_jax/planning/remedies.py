"""Settings under which a step that does not fit would fit, by estimate: nothing is compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from minigpt5_jax.config import ConfigError, use_int8
from minigpt5_jax.planning.shapes import STORY_SAMPLES
from minigpt5_jax.planning.step import Step
from minigpt5_jax.training.sharding import ShardingError, make_mesh
from minigpt5_jax.wiring.memory import POLICIES, recomputing, resident_bytes, residual_bytes
from minigpt5_jax.wiring.model import ModelSpec, build, parameter_layout
from minigpt5_jax.wiring.placement import divisors
from minigpt5_jax.wiring.used_towers import abstract_batch

SHOWN = 3


def remedies(step: Step, needed: int) -> list[tuple[str, float]]:
    """(flags, bytes of a chip) of up to :data:`SHOWN` ways to fit, those that cost least first.

    What the compiler needs beyond weights and residuals is taken to stay as it is.
    """
    config, spec = step.counted
    samples, chips = config.data.global_batch, step.mesh.size
    kept = {
        policy: residual_bytes(
            spec if policy == step.remat else recomputing(config, spec, policy),
            abstract_batch(step.shapes),
        )
        for policy in {step.remat, POLICIES[-1]}
    }
    now = _parts(step, spec, step.mesh.shape["tensor"])
    if now is None:
        return []
    resident, shares = now
    rest = needed - resident - kept[step.remat] / shares
    found = []
    policies = [step.remat] + [POLICIES[-1]] * (step.remat != POLICIES[-1])
    whole = STORY_SAMPLES if config.data.packing == "tree" else 1
    stored = [(spec, ""), *_in_int8(step)]
    for tensor, (model, quantized), policy in itertools.product(divisors(chips), stored, policies):
        placed = _parts(step, model, tensor)
        for micro in divisors(samples) if placed else ():
            rows = samples // micro
            if rows % chips or rows % whole or micro < config.data.accumulation:
                continue
            residuals = kept[policy] * config.data.accumulation / micro / placed[1]
            total = placed[0] + residuals + max(rest, 0.0)
            if total <= step.topology.chip.memory:
                found.append((_flags(step, tensor, policy, micro, quantized), total))
                break
    return found[:SHOWN]


def _in_int8(step: Step) -> Iterator[tuple[ModelSpec, str]]:
    """The model with its largest frozen tower in 8 bits, and the flags for it; nothing where it cannot be."""
    config = step.counted[0].copy_and_resolve_references()
    before = config.model.backbone.to_dict()
    with contextlib.suppress(ConfigError):
        use_int8(config)
    changed = {key: value for key, value in config.model.backbone.items() if value != before[key]}
    if changed:
        flags = [f"--config.model.backbone.{key}={value}" for key, value in changed.items()]
        yield build(config, remat=step.remat).without(step.spec.unused), " ".join(flags)


def _parts(step: Step, spec: ModelSpec, tensor: int) -> tuple[int, int] | None:
    """(bytes of weights and moments on a chip, chips that share the rows); None where it does not divide."""
    try:
        mesh = make_mesh(-1, step.config.mesh.fsdp, tensor, step.topology.devices)
        layout = parameter_layout(step.config, spec, mesh)
    except ShardingError:
        return None
    return resident_bytes(spec, layout), layout.shards


def _flags(step: Step, tensor: int, policy: str, micro: int, quantized: str) -> str:
    changes = {
        "mesh.tensor": (step.mesh.shape["tensor"], tensor),
        "model.remat": (step.remat, policy),
        "data.accumulation": (step.config.data.accumulation, micro),
    }
    flags = [f"--config.{key}={new}" for key, (old, new) in changes.items() if new != old]
    return " ".join(flags + [quantized] * bool(quantized)) or "as it is, by estimate"
