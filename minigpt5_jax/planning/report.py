"""A plan as numbers, and as text."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.planning import hlo
from minigpt5_jax.planning.predict import Work, assumptions, count_work, run_steps, wire_seconds
from minigpt5_jax.planning.remedies import remedies
from minigpt5_jax.planning.step import Compiled, Step, bytes_per_chip, plan_step
from minigpt5_jax.planning.topology import Topology

GIGA = 1e9


def make_plan(config: ConfigDict, topology: Topology, *, length: int = 0) -> dict[str, Any]:
    """The plan of a run: everything that ``plan --json`` prints, in GB of 10^9 bytes, FLOP and seconds.

    Raises:
      ConfigError, ShardingError, PlanError: what does not go together, before anything is compiled.
    """
    step = plan_step(config, topology, length=length)
    return describe(step, step.compile())


def describe(step: Step, compiled: Compiled) -> dict[str, Any]:
    """The plan of a step that was compiled."""
    chip, chips, work = step.topology.chip, len(step.topology.devices), count_work(step)
    needed = compiled.needed + step.encoders
    fits = compiled.memory is not None and needed <= chip.memory
    plan: dict[str, Any] = {
        "topology": step.topology.name,
        "chips": chips,
        "mesh": dict(step.mesh.shape),
        "global_batch": step.config.data.global_batch,
        "accumulation": step.config.data.accumulation,
        "rows_of_micro_batch": [step.shapes.rows, step.shapes.length],
        "remat": step.remat,
        "attention": step.config.model.attention,
        "fits": fits,
        "gb_per_chip": needed / GIGA,
        "hbm_gb": chip.memory / GIGA,
        "memory_gb": _memory(step, compiled),
        "flops_per_step": work.flops,
        "flops_backbone": work.backbone_flops,
        "compile_seconds": compiled.seconds,
    }
    plan |= _moved(step, compiled, work)
    if not fits:
        plan["would_fit"] = [{"flags": flags, "gb": size / GIGA} for flags, size in remedies(step, needed)]
    return plan


def _memory(step: Step, compiled: Compiled) -> dict[str, float]:
    state, frozen, batch = (bytes_per_chip(part) for part in step.arguments)
    trainable = bytes_per_chip(step.arguments[0].trainable)
    parts = {"frozen": frozen, "trainable": trainable, "optimizer": state - trainable, "batch": batch}
    if compiled.memory is not None:
        parts |= {"activations": compiled.memory.temporary, "code": compiled.memory.code}
        parts["padding"] = compiled.memory.total - sum(parts.values())
    parts["encoders"] = step.encoders
    return {name: size / GIGA for name, size in parts.items()}


def _moved(step: Step, compiled: Compiled, counted: Work) -> dict[str, Any]:
    """Collectives and kernels of the program, and the time that follows."""
    names = (
        "collectives",
        "collective_gb",
        "wire_gb",
        "step_seconds",
        "efficiency",
        "steps",
        "hours",
        "chip_hours",
    )
    chip, chips = step.topology.chip, len(step.topology.devices)
    work = counted.seconds(chip, chips)
    told: dict[str, Any] = {"work_seconds": work, "assumptions": assumptions(counted, chip)}
    told |= dict.fromkeys(names)
    if not compiled.text:
        return told
    program = compiled.program()
    traffic = hlo.collectives(program, chips)
    seconds = work + (wire := wire_seconds(chip, traffic))
    fusions, calls = hlo.kernels(program)
    told |= {
        "collectives": {kind: dataclasses.asdict(moved) for kind, moved in traffic.items()},
        "collective_gb": sum(moved.result for moved in traffic.values()) / GIGA,
        "wire_gb": sum(moved.wire for moved in traffic.values()) / GIGA,
        "wire_seconds": wire,
        "step_seconds": seconds,
        "efficiency": work / seconds,
        "fusions": fusions,
        "kernels": calls,
        "loops_of_unknown_length": len(program.unknown),
    }
    if steps := run_steps(step.config):
        hours = steps * seconds / 3600
        told |= {"steps": steps, "hours": hours, "chip_hours": hours * chips}
    return told


def as_text(plan: dict[str, Any], topology: Topology) -> str:
    """The plan for people."""
    chip, spare = topology.chip, plan["hbm_gb"] - plan["gb_per_chip"]
    fits = f"fits, {spare:.2f} GB left" if plan["fits"] else f"does not fit: {-spare:.2f} GB too much"
    rows, length = plan["rows_of_micro_batch"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [
        f"{plan['topology']}: {plan['chips']} x {chip.title}, mesh {mesh}",
        f"batch {plan['global_batch']} in {plan['accumulation']} micro-batches of {rows} rows x "
        f"{length} positions; computed again: {plan['remat']}; attention: {plan['attention']}",
        f"memory of a chip: {plan['gb_per_chip']:.2f} of {plan['hbm_gb']:.2f} GB: {fits}",
        *(f"  {name:12} {size:8.3f}" for name, size in plan["memory_gb"].items()),
        f"work of a step: {plan['flops_per_step'] / 1e12:.2f} TFLOP, of which the "
        f"backbone {plan['flops_backbone'] / 1e12:.2f}",
    ]
    if plan["collectives"] is None:
        lines.append("collectives and time: not known, as the compiler refused the program")
    else:
        lines += _time_lines(plan, topology)
    lines.append(f"compiled in {plan['compile_seconds']:.0f} s")
    if not plan["fits"]:
        ways = [f"  {way['flags']}: about {way['gb']:.1f} GB" for way in plan["would_fit"]]
        lines += (
            ["it would fit with:", *ways]
            if ways
            else ["no mesh or accumulation makes it fit: take more chips"]
        )
    return "\n".join(lines)


def _time_lines(plan: dict[str, Any], topology: Topology) -> list[str]:
    chip = topology.chip
    lines = ["collectives of a step, on each chip:"]
    lines += [
        f"  {kind:18} {moved['count']:6} of {moved['result'] / GIGA:8.4f} GB in all, "
        f"{moved['wire'] / GIGA:8.4f} GB on the wire of a ring"
        for kind, moved in plan["collectives"].items()
    ] or ["  none"]
    lines += [
        f"predicted: {plan['step_seconds'] * 1e3:.1f} ms a step ({plan['work_seconds'] * 1e3:.1f} work, "
        f"{plan['wire_seconds'] * 1e3:.1f} wire), efficiency against one chip {plan['efficiency']:.1%}",
        f"  with {chip.peak_flops / 1e12:g} TFLOP/s, {chip.bandwidth / GIGA:g} GB/s, {chip.links} x "
        f"{chip.link_bandwidth / GIGA:g} GB/s links; {plan['assumptions']}",
    ]
    if plan["steps"]:
        lines.append(
            f"run: {plan['steps']:,} steps, {plan['hours']:.1f} hours, {plan['chip_hours']:.1f} chip-hours"
        )
    else:
        lines.append("run: its length follows from the data; give --config.run.num_steps")
    if chip.platform == "cuda":
        attention = {name: count for name, count in plan["kernels"].items() if "fmha" in name}
        told = ", ".join(f"{count} {name}" for name, count in attention.items()) or "none fused"
        lines.append(f"kernels: {plan['fusions']} fusions; attention: {told}")
    if plan["loops_of_unknown_length"]:
        lines.append(f"{plan['loops_of_unknown_length']} loops of unknown length are counted as run once")
    return lines
