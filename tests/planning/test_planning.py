"""Plans: what is read off a compiled program, what is predicted of it, and what cannot be planned."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from minigpt5_jax.config import get_config, use_shapes_backbones, validate
from minigpt5_jax.planning import generation, hlo, report, topology
from minigpt5_jax.planning.predict import UTILISATION, Work, run_steps, weight_passes, wire_seconds
from minigpt5_jax.planning.remedies import remedies
from minigpt5_jax.planning.shapes import planned_shapes
from minigpt5_jax.planning.step import Compiled, Memory, _refused, plan_step
from minigpt5_jax.planning.topology import Chip, PlanError, Topology, open_topology, read_chip
from minigpt5_jax.training.sharding import ShardingError, make_mesh
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.wiring import placement
from minigpt5_jax.wiring.features import encoder_bytes
from minigpt5_jax.wiring.memory import USABLE, resident_bytes, residual_bytes
from minigpt5_jax.wiring.model import parameter_layout
from minigpt5_jax.wiring.placement import (
    RESIDENT,
    devices_of_a_host,
    fewest_that_fit,
    fit_accumulation,
    open_mesh,
    with_accumulation,
)
from minigpt5_jax.wiring.used_towers import abstract_batch

ROOT = Path(__file__).resolve().parents[2]
CHIP = Chip("tpu", "Toy", 1e12, 1e9, 10**9, 2, 5e8)

# ------------------------------------------------------------------------------------------- programs

LOOP = """HloModule toy

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[]{:T(128)} constant(32)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %sum = f32[8]{0:T(256)S(1)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %next = (s32[], f32[8]{0}) tuple(%j, %sum)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %gathered = (f32[8]{0}, f32[32]{0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[32]{0} all-gather-done(%gathered)
  %part = f32[2]{0} reduce-scatter(%y), replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, to_apply=%add
  %kernel = f32[8]{0} custom-call(%y), custom_call_target="tpu_custom_call"
  %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[8]{0} add(%kernel, %y)
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    program = hlo.read(LOOP)
    assert program.runs == {"main": 1, "body": 32} and program.unknown == ()
    assert hlo.collectives(program, 8) == {
        "all-reduce": hlo.Traffic(32, 1024.0, 32 * 32 * 2 * 3 / 4),
        "all-gather": hlo.Traffic(1, 128.0, 96.0),
        "reduce-scatter": hlo.Traffic(1, 8.0, 24.0),
    }
    assert hlo.kernels(program) == (0, {"tpu_custom_call": 1, "AllocateBuffer": 1})
    told = hlo.count_bytes(program, compiler=1000.0)
    assert told == hlo.Bytes(1000.0, 64.0, 31 * 32.0) and told.total == 1064 + 31 * 32
    assert hlo.loop_bytes(program, "body") == 32  # its result stays inside the chip


FUSED = """HloModule fused

%start.1 (p: f32[4]) -> (f32[4], f32[16]) {
  %p = f32[4]{0} parameter(0)
  %all-gather.1 = f32[16]{0} all-gather(%p), channel_id=56, replica_groups={}, dimensions={0}
  ROOT %pair = (f32[4]{0}, f32[16]{0}) tuple(%p, %all-gather.1)
}

%async_collective_fusion (q: f32[4]) -> f32[16] {
  %q = f32[4]{0} parameter(0)
  ROOT %all-gather.2 = f32[16]{0} all-gather(%q), channel_id=56, replica_groups={}, dimensions={0}
}

%all-reduce-scatter.3 (input: f32[16]) -> f32[4] {
  %input = f32[16]{0} parameter(0)
  %all-reduce = f32[16]{0} all-reduce(%input), channel_id=50, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%all-reduce, %place), dynamic_slice_sizes={4}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %begun = (f32[4]{0}, f32[16]{0}) fusion(%a), kind=kCustom, calls=%start.1
  %whole = f32[16]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion
  ROOT %sum = f32[4]{0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_collectives_inside_fusions_count_once():
    assert hlo.collectives(hlo.read(FUSED), 4) == {
        "all-gather": hlo.Traffic(1, 64.0, 48.0),
        "reduce-scatter": hlo.Traffic(1, 16.0, 48.0),
    }


@pytest.mark.parametrize(
    "line, kind, result, wire",
    [
        ("((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%a)", "reduce-scatter", 16.0, 48.0),
        ("((f32[8]{0}, f32[8]{0}), (f32[8]{0}, f32[8]{0})) all-to-all-start(%a)", "all-to-all", 64.0, 48.0),
        ("f32[16]{0} all-reduce-start(%a)", "all-reduce", 64.0, 96.0),
    ],
)
def test_the_result_of_a_collective_that_is_begun(line, kind, result, wire):
    text = f"ENTRY %main (a: f32[16]) -> f32[4] {{\n  %begun = {line}, replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert hlo.collectives(hlo.read(text), 16) == {kind: hlo.Traffic(1, result, wire)}


def test_a_loop_of_unknown_length_is_told():
    program = hlo.read(LOOP.replace("constant(32)", "parameter(1)"))
    assert program.unknown == ("body",) and program.runs["body"] == 1


def test_bytes_of_a_scan_are_those_of_its_layers_written_out():
    layers, width = 8, 256
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((4, width), jnp.float32)

    def scanned(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def written_out(weights, x):
        for layer in range(layers):
            x = jnp.tanh(x @ weights[layer])
        return x

    def total(function) -> tuple[float, hlo.Bytes]:
        compiled = jax.jit(function).lower(weights, x).compile()
        counted = compiled.cost_analysis()["bytes accessed"]
        return counted, hlo.count_bytes(hlo.read(compiled.as_text()), counted)

    compiler, ours = total(scanned)
    once, unrolled = total(written_out)
    assert unrolled.loops == 0 and compiler < once / 2  # XLA counts the body once
    assert layers * width * width * 4 < once  # all weights are read
    assert 0.6 * once < ours.total < 1.6 * once


# ------------------------------------------------------------------------------------------ prediction


def test_work_takes_its_flops_or_the_reading_of_its_weights():
    work = Work(10**12, 10**12, backbone_bytes=10, other_bytes=10, trainable_bytes=0, micro_batches=1)
    assert work.seconds(CHIP, 4) == pytest.approx(2 / 4 / UTILISATION)
    heavy = dataclasses.replace(work, backbone_bytes=10**9, micro_batches=3, trainable_bytes=4 * 10**7)
    assert heavy.seconds(CHIP, 4) == pytest.approx(1 / 4 / UTILISATION + 2 * 3 * 1.0 + 28 * 10**7 / 1e9)
    again = dataclasses.replace(heavy, backbone_passes=4)
    assert again.seconds(CHIP, 4) - heavy.seconds(CHIP, 4) == pytest.approx(2 * 3 * 1.0)
    assert weight_passes("none", False) == (2, 2) and weight_passes("all", True) == (4, 3)
    assert wire_seconds(CHIP, {"all-reduce": hlo.Traffic(1, 1.0, 1e9)}) == pytest.approx(1.0)


def test_the_length_of_a_run_is_known_or_not():
    config = get_config()
    config.run.num_steps, config.data.format = 7, "jsonl"
    assert run_steps(config) == 7
    config.run.num_steps = None
    assert run_steps(config) is None
    config.data.update(format="vist", global_batch=39)
    config.run.epochs = 4.0
    assert run_steps(config) == 45_904


# ---------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def config():
    config = use_shapes_backbones(get_config())
    config.data.update(format="shapes", train="drawn", global_batch=8)
    config.run.eval_every = config.run.grid_every = 0
    config.model.attention = "blockwise"
    return validate(config)


@pytest.fixture(scope="module")
def step(config):
    """The step of the small world for one CPU, described as a chip."""
    return plan_step(config, Topology("toy:1", CHIP, tuple(jax.devices()[:1])))


def compiled(step, needed: int) -> Compiled:
    return Compiled(Memory(needed - 10, 0, 10, 0), needed, 2.0, LOOP, 1000.0)


def test_a_plan_has_its_keys_and_can_be_read_back(step):
    plan = report.describe(step, compiled(step, 500_000_000))
    keys = "fits gb_per_chip hbm_gb flops_per_step collective_gb wire_gb step_seconds efficiency"
    assert {*keys.split(), "compile_seconds"} <= set(plan) and json.loads(json.dumps(plan)) == plan
    assert plan["fits"] and plan["gb_per_chip"] == 0.5 and plan["hbm_gb"] == 1.0
    assert plan["flops_per_step"] > plan["flops_backbone"] > 0 and 0 < plan["efficiency"] < 1
    assert plan["steps"] * plan["step_seconds"] == pytest.approx(3600 * plan["hours"])
    text = report.as_text(plan, step.topology)
    assert "0.50 of 1.00 GB: fits, 0.50 GB left" in text and "all-reduce" in text and "chip-hours" in text


@pytest.mark.slow  # traces the step under several policies
def test_a_plan_that_does_not_fit_names_what_would(step, config):
    topology = Topology("toy:4", CHIP, tuple(jax.devices()[:4]))
    wide = plan_step(config, topology)
    assert wide.remat == "none"
    needed = 1_001_000_000
    ways = remedies(wide, needed)
    assert ways and all(size <= topology.chip.memory for _, size in ways)
    plan = report.describe(wide, dataclasses.replace(compiled(wide, needed), memory=None, text=""))
    assert not plan["fits"] and plan["collective_gb"] is None and plan["step_seconds"] is None
    assert plan["would_fit"][0]["flags"] == ways[0][0]
    text = report.as_text(plan, topology)
    assert "does not fit: 0.00 GB too much" in text and ways[0][0] in text


def test_remedies_keep_stories_whole(step, monkeypatch):
    monkeypatch.setattr("minigpt5_jax.planning.remedies.residual_bytes", lambda *_: 26 * 10**8)
    config = step.counted[0].copy_and_resolve_references()
    config.data.update(global_batch=26, accumulation=1)
    given = dataclasses.replace(step, config=config, counted=(config, step.spec))
    ways = dict(remedies(given, 2_700_000_000))
    assert any("accumulation=13" in flags for flags in ways)
    assert any("backbone.llm_quantization=int8" in flags for flags in ways)
    config.data.packing = "tree"  # 13 micro-batches would be two samples each
    assert not remedies(given, 2_700_000_000)


def test_batches_are_those_of_the_loader(step, config):
    assert (step.shapes.rows, step.shapes.split, step.shapes.pack) == (8, True, 1)
    assert planned_shapes(config, step.spec, step.topology.devices, 20).length == 20
    with pytest.raises(PlanError, match=r"--length=4000: rows of this run have at most \d+ positions"):
        planned_shapes(config, step.spec, step.topology.devices, 4000)


def test_features_are_planned_where_the_run_reads_them(step, config):
    config = config.copy_and_resolve_references()
    for cache, planned in (("on", True), ("off", False)):
        config.data.cache = cache
        shapes = planned_shapes(config, step.spec, step.topology.devices)
        assert (shapes.target_moments is not None) is planned


def test_accumulation_follows_the_devices(config):
    config = config.copy_and_resolve_references()
    config.data.update(global_batch=48, accumulation=6)
    assert fit_accumulation(config, make_mesh(devices=jax.devices()[:8])) is config
    config.data.accumulation = 12
    assert fit_accumulation(config, make_mesh(devices=jax.devices()[:8])).data.accumulation == 6
    assert config.data.accumulation == 12
    config.data.global_batch = 12
    assert fit_accumulation(config, make_mesh(devices=jax.devices()[:8])) is config  # its error comes later
    config.data.update(global_batch=4 * 26, packing="tree", accumulation=3)
    four = make_mesh(tensor=2, devices=jax.devices()[:8])
    assert fit_accumulation(config, four, story=13, items=8).data.accumulation == 2  # stories stay whole
    # The 36 items of four stories lie over eight devices, which do not divide them.
    assert fit_accumulation(config, four, story=13, items=9).data.accumulation == 1
    config.data.accumulation = None
    assert fit_accumulation(config, four, story=13, items=8, fewest=max).data.accumulation == 2
    assert fit_accumulation(config, four, story=13, items=9, fewest=max).data.accumulation == 1


def test_the_language_model_is_split_inside_a_host():
    hosts = [types.SimpleNamespace(process_index=number // 4) for number in range(16)]
    assert devices_of_a_host(hosts) == 4
    assert devices_of_a_host([types.SimpleNamespace()] * 8) == 8


def test_what_is_left_open_follows_the_memory(step, config, monkeypatch):
    # In this world the mapper, which is spread over fewer chips then, is larger than the language model.
    monkeypatch.setattr("minigpt5_jax.training.sharding.LARGE", 10**9)
    spec, devices, config = step.spec, jax.devices()[:4], with_accumulation(config, 1)
    config.mesh.tensor = None
    sizes = {}
    for tensor in (1, 2, 4):
        layout = parameter_layout(config, spec, make_mesh(tensor=tensor, devices=devices))
        sizes[tensor] = resident_bytes(spec, layout)
    for tensor, size in sizes.items():
        settled, mesh = open_mesh(config, spec, devices, int(size / RESIDENT) + 1)
        assert settled.mesh.tensor == mesh.shape["tensor"] == tensor
    assert open_mesh(config, spec, devices, 1)[1].shape["tensor"] == 4  # nothing fits: the least
    assert open_mesh(config, spec, devices)[1].shape["tensor"] == 1  # a CPU tells no limit
    assert config.mesh.tensor is None

    batch, places = abstract_batch(step.shapes), parameter_layout(config, spec, step.mesh)
    kept, there = residual_bytes(spec, batch), resident_bytes(spec, places)
    for count in (1, 2, 4):
        limit = int((there + kept / count) / USABLE) + 1
        assert fewest_that_fit(config, spec, batch, places, limit)([1, 2, 4]) == count
    assert fewest_that_fit(config, spec, batch, places, there)([1, 2, 4]) == 4
    assert fewest_that_fit(config, spec, batch, places)([1, 2, 4]) == 1


def test_layers_are_computed_again_before_micro_batches_get_smaller_in_vain(step, config, monkeypatch):
    """Where none fits otherwise, the fewest under the first policy with which some do."""
    kept = {"none": 80.0, "backbone": 60.0, "generator": 12.0, "all": 1.0}
    monkeypatch.setattr(placement, "kept_room", lambda *_, **__: (7.0, 1))
    monkeypatch.setattr(placement, "recomputing", lambda config, spec, policy: policy)
    monkeypatch.setattr(placement, "residual_bytes", lambda policy, batch: kept[policy])
    config = config.copy_and_resolve_references()
    config.model.remat = "auto"
    layout = parameter_layout(config, step.spec, step.mesh)
    choose = fewest_that_fit(config, step.spec, abstract_batch(step.shapes), layout, 1)
    assert choose([1, 2, 4, 8]) == 2
    assert choose([1, 2, 4, 8, 16]) == 16  # nothing is computed again where that is enough
    config.model.remat = "none"
    assert choose([1, 2, 4, 8]) == 8


def test_what_writes_features_is_counted(step, config):
    starts = ("generator/vae/encoder/", "generator/vae/quant_conv/")
    shapes, places = step.spec.template.shapes, parameter_layout(config, step.spec, step.mesh).stored
    size = sum(4 * math.prod(shape.shape) for path, shape in shapes.items() if path.startswith(starts))
    loaded = step.spec.without(())
    assert encoder_bytes(config, loaded, places) == 0, "the step has them"
    assert encoder_bytes(config, loaded.without({"vae"}), places) == size > 0
    writing = dataclasses.replace(step, encoders=size)
    plan = report.describe(writing, compiled(writing, CHIP.memory))
    assert not plan["fits"] and plan["memory_gb"]["encoders"] == size / 1e9
    assert plan["gb_per_chip"] == pytest.approx(1.0 + size / 1e9)


def test_a_session_is_planned_on_the_mesh(config, monkeypatch):
    four = Topology("toy:4", CHIP, tuple(jax.devices()[:4]))
    seen = []

    def compile_for(topology, jitted, *arguments):
        seen.append(arguments)
        return Compiled(Memory(10, 0, 10, 0), 500_000_000, 2.0, LOOP, 0.0)

    monkeypatch.setattr(generation, "compile_for", compile_for)
    plan = generation.make_generation_plan(config, four, batch=8)
    (params, tokens, *_), (again, vokens, *_) = seen
    assert tokens.sharding.spec == vokens.sharding.spec == P(("data", "fsdp")) and tokens.shape[0] == 8
    assert params is again and all(x.sharding.mesh.size == 4 for x in jax.tree.leaves(params))
    assert any(isinstance(x, tuple) for x in params.values()), "a TPU's session takes layers apart"
    assert plan["fits"] and plan["gb_per_chip"] == 0.5 and json.loads(json.dumps(plan)) == plan
    assert plan["seconds_of_images"] > 0 and plan["seconds_a_token"] > 0 and plan["compile_seconds"] == 4.0
    assert "texts: 0.50 of 1.00 GB of a chip" in generation.as_text(plan, four)
    with pytest.raises(ShardingError, match=r"3 prompts at once .* 4 chips .* --batch_size=4"):
        generation.plan_programs(config, four, batch=3)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e", "not CHIP:SHAPE, such as v5e:4x4"),
        ("v5e:4x0", "not CHIP:SHAPE"),
        ("v9:2x2", "unknown chip 'v9'; known: a6000, h100, h200, v5e, v5p, v6e"),
        ("../v5e:2x2", "unknown chip"),
        ("h100:16", "a host has 1 to 8 of these, such as h100:8"),
        ("h100:2x2", "a host has 1 to 8"),
    ],
)
def test_a_topology_that_does_not_exist(name, message):
    with pytest.raises(PlanError, match=message):
        open_topology(name)


@pytest.mark.parametrize("name, package", [("v5e:2x2", r"\[plan\]"), ("h100:1", r"\[plan-gpu\]")])
def test_a_machine_without_the_compiler(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PlanError, match=f"needs its compiler: pip install 'minigpt5_jax{package}'"):
        open_topology(name)


def test_a_chip_of_ones_own(tmp_path):
    text = (topology.CHIPS / "h100.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("NVIDIA H100 80GB HBM3", "Mine"))
    assert read_chip(str(tmp_path / "mine.toml")).title == "Mine"
    (tmp_path / "bad.toml").write_text('platform = "tpu"')
    with pytest.raises(PlanError, match=r"bad.toml does not describe a chip: .*missing"):
        read_chip(str(tmp_path / "bad.toml"))


def test_a_mesh_or_a_batch_that_does_not_divide(config):
    four = Topology("toy:4", CHIP, tuple(jax.devices()[:4]))
    config = config.copy_and_resolve_references()
    config.mesh.tensor = 3
    with pytest.raises(ShardingError, match="tensor=3 does not divide 4 devices"):
        plan_step(config, four)
    config.mesh.tensor, config.data.global_batch = 1, 6
    with pytest.raises(ShardingError, match=r"6 entries per micro-batch, which 4 devices .* a multiple of 4"):
        plan_step(config, four)


def test_weights_that_are_quantised_already(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.model.backbone.llm_quantization = "int8"
    config.weights.llm = str(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(WeightFileError, match=r"these weights are quantised already \(gptq\)"):
        plan_step(config, Topology("toy:1", CHIP, tuple(jax.devices()[:1])))


def test_the_compilers_refusal_is_read():
    assert _refused("RESOURCE_EXHAUSTED: Used 20.12G of 15.75G hbm. Exceeded") == int(20.12 * 2**30)
    temporaries = "the total memory required for HLO temporaries (18.67G) exceeds available HBM (15.75G)"
    assert _refused(temporaries) == int(18.67 * 2**30)
    assert _refused("INVALID_ARGUMENT: something else") is None


@pytest.mark.slow  # compiles for devices that are not here
@pytest.mark.parametrize(
    "name, module, extra",
    [
        ("v5e:1x1", "libtpu", "plan"),
        ("v5e:2x2", "libtpu", "plan"),
        ("h100:1", "jax_cuda13_plugin", "plan-gpu"),
    ],
)
def test_the_command(name, module, extra):
    plan = command(name, module, extra)
    assert plan["fits"] and plan["chips"] == (4 if name.endswith("2x2") else 1)
    assert 0 < plan["gb_per_chip"] < 1 and plan["compile_seconds"] > 1
    assert plan["loops_of_unknown_length"] == 0
    assert (plan["wire_gb"] > 0) == (plan["chips"] > 1) and (plan["efficiency"] < 1) == (plan["chips"] > 1)


@pytest.mark.slow  # the same
def test_the_command_of_a_session():
    plan = command("v5e:2x2", "libtpu", "plan", "--generation", "--config.inference.layers=stacked")
    assert plan["fits"] and plan["batch"] == 4 and plan["mesh"]["data"] == 4
    for program in (plan["texts"], plan["images"]):
        assert 0 < program["weights_gb"] < program["gb_per_chip"] < 1
    assert plan["texts"]["loops_of_unknown_length"] == 1, "as many turns as a text takes"
    assert plan["images"]["loops_of_unknown_length"] == 0


def command(name: str, module: str, extra: str, *flags: str) -> dict:
    """What ``plan --json`` prints for the small world; a skip where its compiler is not installed."""
    pytest.importorskip(module, reason=f"{module} is not installed; pip install '.[{extra}]'")
    code = [sys.executable, "-m", "minigpt5_jax.plan", "--config", "configs/shapes_stage1.py", "--json"]
    code += ["--topology", name, "--config.data.global_batch=8", *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(code, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
