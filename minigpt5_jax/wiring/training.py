"""From a configuration to a training loop: model, data, state and where it goes on from."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.config import ConfigError, num_steps, rate_groups, setting_errors, warmup_steps
from minigpt5_jax.data.batches.pipeline import Loader
from minigpt5_jax.data.sources import Source
from minigpt5_jax.data.sources.features import FeatureStore
from minigpt5_jax.diffusion.samplers import Sampler
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.compiling import Announced
from minigpt5_jax.training.distributed import main_process
from minigpt5_jax.training.loop import Loop
from minigpt5_jax.training.metrics import Metrics
from minigpt5_jax.training.optimizer import linear_warmup_decay, make_optimizer
from minigpt5_jax.training.owner import Owner
from minigpt5_jax.training.prefetch import DevicePrefetch
from minigpt5_jax.training.provenance import NOT_LOADED, CheckpointError, check_compatible, require_same
from minigpt5_jax.training.sharding import Layout, state_shardings
from minigpt5_jax.training.state import TrainState, init_state
from minigpt5_jax.training.step import make_train_step
from minigpt5_jax.training.tracking import Tracker, check_tracker, open_tracker
from minigpt5_jax.wiring.feature_cache import FeatureCache, Opened, open_features
from minigpt5_jax.wiring.features import load_towers, plans_features
from minigpt5_jax.wiring.inputs import (
    data_identity,
    epoch_samples,
    make_batch_sharder,
    open_loader,
    open_sources,
    samples_of_a_story,
)
from minigpt5_jax.wiring.memory import device_bytes, fit_memory
from minigpt5_jax.wiring.model import (
    ModelSpec,
    build,
    initial_trainable,
    load_frozen,
    parameter_layout,
    with_micro_batches,
)
from minigpt5_jax.wiring.placement import (
    fewest_that_fit,
    fit_accumulation,
    open_mesh,
    with_accumulation,
)
from minigpt5_jax.wiring.restore import (
    describe,
    earlier_hashes,
    open_parent_run,
    upgrade_meta,
    warm_start,
)
from minigpt5_jax.wiring.run_settings import (
    check_end,
    check_new_parameters,
    compare_settings,
    saved_accumulation,
)
from minigpt5_jax.wiring.session import open_sampler
from minigpt5_jax.wiring.used_towers import abstract_batch, unused_towers
from minigpt5_jax.wiring.weight_paths import check_sources

Watch = Callable[..., tuple[Any, Any]]


def parameter_table(spec: ModelSpec) -> str:
    """Parameters, trainable, frozen and bytes of every tower, bytes that are not loaded, and their totals."""
    rows: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    counted = spec.template.file_shapes
    for path, shape in spec.template.shapes.items():
        parts = path.split("/")
        tower = "/".join(parts[: 1 if parts[0] == "mapper" else 2])
        # Scales are bytes, and no parameters.
        count = math.prod(counted[path].shape) if path in counted else 0
        size = math.prod(shape.shape) * shape.dtype.itemsize
        for name in (tower, "total"):
            rows[name][0] += count
            rows[name][1] += count if spec.labels[path] != FROZEN else 0
            rows[name][2] += size
            rows[name][3] += size if path in spec.template.absent else 0
    rows["total"] = rows.pop("total")
    heads = ("parameters", "trainable", "frozen", "bytes", "not loaded")
    widths = (16, 14, 16, 18, 16)
    lines = [" ".join([f"{'tower':24}", *(f"{head:>{width}}" for head, width in zip(heads, widths))])]
    for name, (count, trainable, size, unused) in rows.items():
        values = zip((count, trainable, count - trainable, size, unused), widths)
        lines.append(" ".join([f"{name:24}", *(f"{value:{width},}" for value, width in values)]))
    return "\n".join(lines)


def split_parameters(
    config: ConfigDict, spec: ModelSpec, shardings: dict[str, Any], checkpoints: Checkpoints
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """(trainable, frozen, inherited): inherited ones are frozen here but in no pretrained source.

    They come from the run's own newest checkpoint, else from ``run.init_from``, else from nothing.
    """

    def place(path: str, value: Any) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, shardings[path], lambda index: value[index])

    pretrained = load_frozen(config, spec, shardings)
    fresh = {path: place(path, v) for path, v in initial_trainable(config, spec, pretrained).items()}
    frozen = {path: value for path, value in pretrained.items() if spec.labels[path] == FROZEN}
    resumed = checkpoints.latest_step is not None
    if config.run.init_from and not resumed:
        fresh = warm_start(config, spec, fresh, frozen, shardings)
    inherited = {path: value for path, value in fresh.items() if spec.labels[path] == FROZEN}
    own = set(inherited) | set(checkpoints.paths("inherited") if resumed else ())
    if own and resumed:
        shapes = {path: spec.template.shapes[path] for path in own}
        like = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])
            for path, x in shapes.items()
        }
        inherited = checkpoints.restore({"inherited": like})[0]["inherited"]
    values = {**pretrained, **fresh}
    trainable = {path: value for path, value in values.items() if spec.labels[path] != FROZEN}
    return trainable, {**frozen, **inherited}, inherited


def resume(
    checkpoints: Checkpoints, state: TrainState, meta: dict[str, Any], places: Any
) -> tuple[TrainState, int]:
    """(state, data position) of the newest checkpoint, after checking that it is of this run.

    Raises:
      CheckpointError: another model, tokenizer, frozen weights or data; the message has both values.
    """
    saved = upgrade_meta(checkpoints.meta())
    check_compatible(saved, meta)
    require_same(
        saved,
        meta,
        ["data"],
        "the training data or its order changed since the checkpoint; change it back or start in another "
        "workdir:",
        "{}: checkpoint {!r}, now {!r}",
    )
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    wanted = dict(vars(like))
    # Earlier versions kept clipping in a chain before the optimizer, where it had a state, if an empty one.
    chained = any(name.startswith("[1]") for name in checkpoints.paths("opt_state"))
    if chained:
        wanted["opt_state"] = (None, wanted["opt_state"])
    parts, data_state, _ = checkpoints.restore(wanted)
    if chained:
        parts["opt_state"] = parts["opt_state"][1]
    return TrainState(**parts), data_state


def keep_hashes(hashes: dict[str, str], earlier: dict[str, str]) -> dict[str, str]:
    """``hashes`` of towers with those that the run before knew of what is not loaded here."""
    return {
        tower: earlier.get(tower, digest) if digest == NOT_LOADED else digest
        for tower, digest in hashes.items()
    }


def place_state(
    trainable: dict[str, jax.Array],
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Any]:
    """(start of the run, where each of its leaves lies), made in place on every process's devices."""

    def init(values: dict[str, jax.Array]) -> TrainState:
        return init_state(values, spec.labels, optimizer, seed)

    places = state_shardings(jax.eval_shape(init, trainable), shardings, mesh)
    return jax.jit(init, donate_argnums=0, out_shardings=places)(trainable), places


def open_optimizer(config: ConfigDict, spec: ModelSpec, steps: int) -> optax.GradientTransformation:
    """AdamW with the configured rates.

    Raises:
      ConfigError: rates and groups that do not go together.
    """
    settings, warmup = config.optimizer, warmup_steps(config, steps)
    with setting_errors():
        return make_optimizer(
            spec.labels,
            {group: linear_warmup_decay(rate, warmup, steps) for group, rate in rate_groups(config).items()},
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
        )


def claim(workdir: str) -> Owner | None:
    """The owner of the run's folder, in the main process; all processes are refused together.

    Raises:
      CheckpointError: another run trains there.
      OSError: the folder cannot be written.
    """
    owner, refusal = None, None
    if main_process():
        try:
            owner = Owner(workdir)
        except (CheckpointError, OSError) as error:
            refusal = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(refusal is not None)):
        refusal = refusal or CheckpointError(f"the main process says why it cannot train in {workdir}")
    if refusal is not None:
        raise refusal
    return owner


def open_run_checkpoints(config: ConfigDict, owner: Owner | None = None) -> Checkpoints:
    """Checkpoints of the workdir, which its owner is let go of with.

    Raises:
      CheckpointError: there are some, but the run shall not continue them.
    """
    run = config.run
    checkpoints = Checkpoints(
        Path(run.workdir) / "checkpoints",
        keep_latest=run.keep_latest,
        keep_best=run.keep_best,
        best_metric=run.best_metric,
        owner=owner,
    )
    if checkpoints.latest_step is not None and not run.resume:
        raise CheckpointError(
            f"{run.workdir} holds checkpoints, but run.resume is False; choose another workdir"
        )
    return checkpoints


def closing_words(config: ConfigDict) -> str:
    """Where the results of a finished run are, and what can be done with them."""
    workdir = Path(config.run.workdir)
    kept = {
        "metrics.jsonl": "losses",
        "tensorboard": "the same for TensorBoard",
        "images": "held-out images",
        "checkpoints": "what was trained",
    }
    lines = [f"  {workdir / name}  {what}" for name, what in kept.items() if (workdir / name).exists()]
    run = shlex.quote(str(workdir))
    return "\n".join(
        [
            "Training is done.  It wrote:",
            *lines,
            "Next:",
            f'  python -m minigpt5_jax.generate --checkpoint {run} --prompt "..." --output page',
            f"  a second stage that starts here: --config.run.init_from={run}/checkpoints",
            "  in PyTorch: docs/export.md",
        ]
    )


def make_loop(
    config: ConfigDict, watch: Watch | None = None, reached: Callable[[int], Any] = lambda step: None
) -> Loop:
    """Everything up to the first step; what is wrong with the input is found here, before any compile.

    Args:
      watch: makes (validation, image grid) of held-out samples (:mod:`minigpt5_jax.evaluation.held_out`).
      reached: told every step that is sent off (:func:`minigpt5_jax.training.peers.watched`).
    """
    if not config.run.workdir:
        raise ConfigError("give the folder of this run: --workdir DIR")
    check_tracker(config.run.tracker)
    owner = claim(config.run.workdir)
    try:
        return dataclasses.replace(_make_loop(config, watch, owner), reached=reached)
    except BaseException:
        if owner is not None:
            owner.release()
        raise


@dataclasses.dataclass(frozen=True)
class _Settled:
    """What a run is, before weights are read: how the devices and the data settled its configuration.

    Attributes:
      config: with what it left open.  spec: without what is not loaded.
      recomputed: what is computed again.  note: about the features, '' where there is none.
      shard: places the loader's batches on the mesh.
    """

    config: ConfigDict
    spec: ModelSpec
    layout: Layout
    recomputed: str
    sampler: Sampler
    source: Source
    held_out: Source | None
    features: Opened | None
    note: str
    loader: Loader
    shard: Callable[[Batch], Batch]


def micro_batch_note(count: int, given: int | None, before: int | None) -> str:
    """What the devices made of ``data.accumulation``, '' where that is nothing new.

    Args:
      count: micro-batches of an update.  given: as configured.  before: of the checkpoint, if any.
    """
    if given is not None:
        return (
            f"{count} micro-batches per update, not data.accumulation={given}, which the devices do not "
            "divide; the update is the same"
            if count != given
            else ""
        )
    changed = before not in (None, count)
    if count == 1 and not changed:
        return ""
    was = f"; {before} before this resume" if changed else ""
    what = f"{count} micro-batch{'es' * (count > 1)} per update"
    return f"{what}, as few as fit the devices (data.accumulation{was})"


def _fitting_notes(settled: _Settled, steps: int, configured: ConfigDict, before: int | None) -> list[str]:
    """What a run does otherwise than its keys say by themselves, a line each.

    Args:
      steps: of the run.  configured: before the devices settled it.
      before: micro-batches of the checkpoint that it goes on from.
    """
    config, spec = settled.config, settled.spec
    notes, warmup = [], warmup_steps(config, steps)
    if config.model.remat == "auto" and settled.recomputed != "none":
        notes.append(f"layers computed again so that the step fits (model.remat): {settled.recomputed}")
    if warmup != config.optimizer.warmup_steps:
        notes.append(
            f"the rates rise over {warmup} steps, a tenth of the run: it is not longer than "
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}"
        )
    if note := micro_batch_note(config.data.accumulation, configured.data.accumulation, before):
        notes.append(note)
    if configured.mesh.tensor is None and config.mesh.tensor > 1:
        notes.append(
            f"the language model is split over {config.mesh.tensor} devices, so that it fits (mesh.tensor)"
        )
    if spec.unused:
        notes.append(f"not loaded, as this run does not read them: {', '.join(sorted(spec.unused))}")
    return notes


def _resuming_notes(config: ConfigDict, steps: int, first_step: int, changed: list[str]) -> list[str]:
    """Where a run goes on, with which other settings, and that there is nothing left to do."""
    notes = []
    if first_step:
        notes.append(f"continuing behind step {first_step} of {config.run.workdir}")
    if changed:
        notes.append("\n  ".join(["settings that differ from the checkpoint's:", *changed]))
    if first_step >= steps:
        notes.append(f"all {steps} steps are done; to go on, give more of them (run.num_steps)")
    return notes


def _tracker(config: ConfigDict) -> Tracker | None:
    """Of the main process, as ``run.tracker`` says."""
    run = config.run
    return (
        open_tracker(run.tracker, run.name, Path(run.workdir), config.to_dict()) if main_process() else None
    )


def _settle(configured: ConfigDict, checkpoints: Checkpoints, watched: bool) -> tuple[_Settled, list[str]]:
    """(what runs, settings that differ from the checkpoint's); what is wrong with the input is found here."""
    whole, limit = build(configured), device_bytes()
    spec = whole.without(unused_towers(configured, whole, watched=watched))
    config, mesh = open_mesh(configured, spec, limit=limit)
    layout = parameter_layout(config, spec, mesh)
    check_sources(config, spec.unused)
    resumed = checkpoints.latest_step is not None
    changed = compare_settings(configured, spec, checkpoints) if resumed else []
    check_new_parameters(config, spec)
    if config.run.init_from and not resumed:
        open_parent_run(config, spec)
    sampler = open_sampler(config, spec)
    source, held_out = open_sources(config, spec.sizes)
    features, note = open_features(config, spec, source)
    if features is None and plans_features(config):
        spec = whole.without(unused_towers(config, whole, watched=watched, features=False))
        check_sources(config, spec.unused)
    store = features.store if features else None
    extra = features.extra_bytes(spec, layout.stored) if features else 0
    config = _settle_micro_batches(config, spec, source, layout, store, limit, extra)
    spec = with_micro_batches(spec, config)
    loader = open_loader(config, spec, source, training=True, features=store)
    shard = make_batch_sharder(mesh, config.data.accumulation)
    shard(next(loader))  # shapes and the first samples, before weights are read
    loader.restore(0)
    spec, recomputed = fit_memory(config, spec, abstract_batch(loader.largest), layout, limit, extra=extra)
    return _Settled(
        config, spec, layout, recomputed, sampler, source, held_out, features, note, loader, shard
    ), changed


def _settle_micro_batches(
    config: ConfigDict,
    spec: ModelSpec,
    source: Source,
    layout: Layout,
    store: FeatureStore | None,
    limit: int | None,
    extra: int,
) -> ConfigDict:
    """The configuration with as many micro-batches as the devices need."""
    one, trees = with_accumulation(config, 1), config.data.packing == "tree"
    open_and_fits = config.data.accumulation is None and limit is not None
    if not trees and not open_and_fits:
        return fit_accumulation(config, layout.mesh)
    story = samples_of_a_story(one, source) if trees else 1
    # Of an update in one piece, whose shapes the loader knows.
    with contextlib.closing(open_loader(one, spec, source, training=True, features=store)) as loader:
        batch = abstract_batch(loader.largest)
    return fit_accumulation(
        config,
        layout.mesh,
        story=story,
        items=batch.item_id.shape[0] // batch.tokens.shape[0],
        fewest=fewest_that_fit(config, spec, batch, layout, limit, extra=extra),
    )


def _start(
    settled: _Settled, checkpoints: Checkpoints, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Any, dict[str, jax.Array], dict[str, jax.Array], dict[str, Any]]:
    """(state, where its leaves lie, frozen, inherited, description): of a new or a resumed run.

    The loader goes on behind the newest checkpoint.
    """
    config, spec, stored = settled.config, settled.spec, settled.layout.stored
    trainable, frozen, inherited = split_parameters(config, spec, stored, checkpoints)
    meta = {**describe(config, spec, frozen), "data": data_identity(config, settled.source)}
    meta["frozen"] = keep_hashes(meta["frozen"], earlier_hashes(config, checkpoints))
    state, places = place_state(trainable, spec, optimizer, config.run.seed, stored, settled.layout.mesh)
    if checkpoints.latest_step is not None:
        state, data_state = resume(checkpoints, state, meta, places)
        settled.loader.restore(data_state)
    return state, places, frozen, inherited, meta


def _make_loop(configured: ConfigDict, watch: Watch | None, owner: Owner | None) -> Loop:
    checkpoints = open_run_checkpoints(configured, owner)
    before = saved_accumulation(checkpoints)
    settled, changed = _settle(configured, checkpoints, watch is not None)
    config, spec, loader, source = settled.config, settled.spec, settled.loader, settled.source
    layout, mesh, features = settled.layout, settled.layout.mesh, settled.features
    steps = num_steps(config, epoch_samples(config, source))
    check_end(config, steps, checkpoints)
    optimizer = open_optimizer(config, spec, steps)
    state, places, frozen, inherited, meta = _start(settled, checkpoints, optimizer)
    first_step = int(state.step)
    metrics = Metrics(
        config.run.workdir,
        steps,
        first_step=first_step,
        samples_per_step=config.data.global_batch,
        log_every=config.run.log_every,
        active=main_process(),
        tracker=_tracker(config),
        last_checkpoint=lambda: (
            f"step {at} in {checkpoints.directory}" if (at := checkpoints.latest_step) else None
        ),
        samples=lambda step: loader.samples(step - 1),
    )
    fitted = [*_fitting_notes(settled, steps, configured, before), settled.note]
    for line in filter(None, [*fitted, *_resuming_notes(config, steps, first_step, changed)]):
        metrics.message(line)
    cache = None
    if features is not None:
        epoch_steps = math.ceil(epoch_samples(config, source) / config.data.global_batch)
        cache = loader.complete = FeatureCache(
            features,
            source,
            spec,
            frozen,
            loader,
            epoch_steps=epoch_steps,
            tell=metrics.message,
            load=lambda kind: load_towers(config, spec, kind)[0],
        )
    step = jax.jit(
        make_train_step(spec.template, spec.labels, optimizer, spec.options, layout=layout),
        donate_argnums=0,
        out_shardings=(places, None),
    )
    validate, grid = (
        watch(config, spec, settled.held_out, frozen, mesh, settled.sampler) if watch else (None, None)
    )
    return Loop(
        state,
        frozen,
        Announced(step, "the step", metrics),
        mesh,
        DevicePrefetch(loader, settled.shard, closing=cache.close if cache else None),
        metrics,
        checkpoints,
        meta,
        first_step,
        steps,
        config.run.eval_every,
        config.run.save_every,
        config.run.grid_every,
        validate and Announced(validate, "the validation", metrics),
        grid and Announced(grid, "the sampler of held-out images", metrics),
        {"inherited": inherited} if inherited else {},
    )
