"""From a configuration to batches on the devices: sources, shapes of a batch, loaders, placement."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from minigpt5_jax.batch import Batch
from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.lengths import LengthIndex, length_index
from minigpt5_jax.data.batches.pipeline import Loader, make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.batches.stories import longest_story, story_index
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.samples.records import RecordRules
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import (
    Cc3mSource,
    Cc3mTarSource,
    ColumnSource,
    JsonlSource,
    MMDialogSource,
    PreparedSource,
    Source,
    VistSource,
)
from minigpt5_jax.data.sources.base import stories_of
from minigpt5_jax.data.sources.features import FeatureSpec, FeatureStore
from minigpt5_jax.data.sources.kinds import Rules
from minigpt5_jax.parts.contracts import FROZEN
from minigpt5_jax.shapes.dataset import write_dialogs, write_pairs, write_stories
from minigpt5_jax.training.distributed import main_process
from minigpt5_jax.training.sharding import ShardingError, batch_shardings, make_mesh
from minigpt5_jax.wiring.model import ModelSpec, Sizes, caption_tokenizer, language_tokenizer


def open_sources(config: ConfigDict, sizes: Sizes) -> tuple[Source, Source | None]:
    """Training and held-out samples; ``shapes*`` are drawn into the workdir first.

    Raises:
      ConfigError: no training file was given.  DataError: a file cannot be read.
    """
    data = config.data
    train, validation = data.train, data.validation
    if data.format in SHAPES:
        train, validation = draw_shapes(config)
    if not train:
        raise ConfigError(f"give the training data: --config.data.train=PATH (data.format={data.format})")
    open_one = OPENERS[data.format]
    held_out = open_one(config, sizes, validation, False) if validation else None
    return open_one(config, sizes, train, True), held_out


def _rules(config: ConfigDict, training: bool, dataset: str) -> Rules:
    """How the samples of a data set are made, in training or held out."""
    data, vokens = config.data, config.model.backbone.num_vokens
    wording = {
        "prompt_set": data.prompt_set,
        "seed": config.run.seed,
        "resample_prompts": data.resample_prompts,
        "num_vokens": vokens,
    }
    if dataset == "cc3m":  # held-out captions give no instruction samples, unlike the original's validation
        return PairRules(training, data.instruction_every, **wording)
    if dataset == "vist":  # held-out stories have the tasks of training, as the original's, unthinned
        dropout = data.context_dropout if training else 0.0
        return StoryRules(tasks=tuple(data.tasks) or None, context_dropout=dropout, **wording)
    if dataset == "mmdialog":  # held-out dialogues are filtered as those of training, as the original's
        bad = tuple(data.bad_media_ids)
        return DialogRules(data.dialog_loader, bad_media_ids=bad, num_vokens=vokens)
    return RecordRules(num_vokens=vokens)


def _open_cc3m(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    outside = config.data.allow_outside_images
    rules = _rules(config, training, "cc3m")
    return Cc3mSource(path, config.data.image_root, rules, allow_outside_images=outside)


def _open_tar(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    cache = Path(config.data.index_cache).expanduser()
    return Cc3mTarSource(path, _rules(config, training, "cc3m"), cache_dir=cache)


def _open_columns(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    outside = config.data.allow_outside_images
    rules = _rules(config, training, "cc3m")
    return ColumnSource(path, config.data.image_root, rules, allow_outside_images=outside)


def _open_vist(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    data = config.data
    mapping = data.train_mapping if training else data.validation_mapping
    rules, outside = _rules(config, training, "vist"), data.allow_outside_images
    return VistSource(path, mapping, data.image_root, rules, allow_outside_images=outside)


def _open_mmdialog(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    rules, tokenizer = _rules(config, training, "mmdialog"), language_tokenizer(config, sizes)
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    return MMDialogSource(path, config.data.image_root, rules, count_tokens=count)


def _open_jsonl(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    rules, outside = _rules(config, training, "jsonl"), config.data.allow_outside_images
    return JsonlSource(path, config.data.image_root, rules, allow_outside_images=outside)


def _open_prepared(config: ConfigDict, sizes: Sizes, path: str | Path, training: bool) -> Source:
    """What ``minigpt5_jax.prepare`` wrote; held-out samples as the raw files' sources give them."""
    rules, tokenizer = functools.partial(_rules, config, training), language_tokenizer(config, sizes)
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    return PreparedSource(path, "train" if training else None, rules, count_tokens=count)


OPENERS: dict[str, Callable[[ConfigDict, Sizes, str | Path, bool], Source]] = {
    "cc3m": _open_cc3m,
    "cc3m_tar": _open_tar,
    "parquet": _open_columns,
    "vist": _open_vist,
    "mmdialog": _open_mmdialog,
    "jsonl": _open_jsonl,
    "prepared": _open_prepared,
    "shapes": _open_cc3m,
    "shapes_stories": _open_vist,
    "shapes_dialogs": _open_mmdialog,
}
"""``data.format`` -> ``open(config, sizes, path, training)``."""


SHAPES: dict[str, Callable[..., Path]] = {
    "shapes": write_pairs,
    "shapes_stories": write_stories,
    "shapes_dialogs": write_dialogs,
}
"""``data.format`` of the small world -> ``write(folder, split, count, seed)``, which returns what is read."""


def draw_shapes(config: ConfigDict) -> tuple[Path, Path]:
    """Training and held-out files of the small world, drawn into the workdir by one process."""
    folder, data, write = Path(config.run.workdir) / "data", config.data, SHAPES[config.data.format]
    more = {"max_objects": data.shapes_max_objects} if data.format == "shapes" else {}
    wishes = {"wishes": data.shapes_wishes} if data.format == "shapes_dialogs" else {}

    def draw() -> tuple[Path, Path]:
        return (
            write(folder, "train", data.shapes_train, config.run.seed, **more, **wishes),
            write(folder, "held_out", data.shapes_validation, config.run.seed, **more),
        )

    if main_process():
        draw()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("shapes are drawn")
    return draw()  # what is there is left as it is


def encode_config(config: ConfigDict, sizes: Sizes, *, training: bool) -> EncodeConfig:
    """How samples become numbers; held-out samples are never mirrored (Q16)."""
    data = config.data
    return EncodeConfig(
        language_tokenizer(config, sizes),
        caption_tokenizer(config, sizes),
        flip_mode=data.flip_mode if training else "off",
        pad_input_square=data.pad_input_square,
        truncation=data.truncation,
        mask_all_inner_vokens=data.mask_all_inner_vokens,
        strict_image_count=data.strict_image_count,
        images_as_shown=data.images_as_shown,
        flip_each_epoch=data.flip_each_epoch,
    )


def splits_prompts(config: ConfigDict, spec: ModelSpec, *, ends_in_vokens: bool) -> bool:
    """Whether vokens stand apart from their prompts: samples end in them, and nothing before them trains."""
    data, backbone = config.data, spec.parts["backbone"]
    trainable = [path for path, group in spec.labels.items() if group != FROZEN]
    own = [path.removeprefix(backbone.prefix) for path in trainable if path.startswith(backbone.prefix)]
    fits = data.split_vokens and ends_in_vokens and not data.max_images
    return bool(fits and backbone.frozen_prompts(own, spec.keys["backbone"]))


def micro_batch(config: ConfigDict) -> int:
    """Samples of a micro-batch; of a whole update where ``data.accumulation`` is not settled yet."""
    return config.data.global_batch // (config.data.accumulation or 1)


def samples_a_row(config: ConfigDict, split: bool, devices: Sequence[jax.Device] | None = None) -> int:
    """``data.pack``; where it is left open (0), up to 4 captions, as long as rows divide over the devices.

    Args:
      devices: of the run; all that JAX has by default.
    """
    data = config.data
    if data.packing == "off":
        return 1
    if data.pack or not (split and data.buckets):
        return data.pack or 1
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor or 1, devices).shape
    samples, places = micro_batch(config), mesh["data"] * mesh["fsdp"]
    return next(pack for pack in (4, 3, 2, 1) if pack == 1 or samples % (pack * places) == 0)


def batch_spec(
    config: ConfigDict, spec: ModelSpec, samples: int, pack: int = 1, split: bool = False
) -> BatchSpec:
    """Static shapes of a (micro-)batch of ``samples`` samples, ``pack`` to a row."""
    data, backbone, generator = config.data, spec.backbone, spec.generator
    if data.max_images and not backbone.image_tokens:
        raise ConfigError(
            f"data.max_images={data.max_images}, but this backbone has no vision tower and cannot see; "
            "set data.max_images=0 or give the backbone a vision tower"
        )
    if data.max_length > backbone.max_positions:
        raise ConfigError(
            f"data.max_length={data.max_length} exceeds the language model's "
            f"{backbone.max_positions} positions (max_position_embeddings)"
        )
    return BatchSpec(
        rows=samples // pack,
        length=data.max_length,
        items=samples,
        images=samples * data.max_images,
        targets=data.max_targets,
        image_size=backbone.image_size,
        target_size=generator.image_size,
        caption_length=generator.condition_shape[0],
        num_vokens=backbone.num_vokens,
        image_tokens=backbone.image_tokens,
        pack=pack,
        split=split,
    )


def size_index(config: ConfigDict, spec: ModelSpec, source: Source) -> LengthIndex | None:
    """Sizes of the samples, where buckets or packing need them; None where they do not."""
    if not config.data.buckets and config.data.pack <= 1:
        return None
    tokenizer = language_tokenizer(config, spec.sizes)
    return length_index(source, tokenizer, spec.backbone.image_tokens, config.data.index_cache)


def samples_of_a_story(config: ConfigDict, source: Source) -> int:
    """Samples of the longest story, where rows are trees.

    Raises:
      ConfigError: the samples are no stories, or micro-batches are not whole stories.
    """
    starts = stories_of(source)
    if starts is None:
        raise ConfigError(
            f"data.packing=tree is for stories, and {source.describe()} are none; set data.packing=shuffled"
        )
    data, count, micro = config.data, longest_story(starts), config.data.accumulation or 1
    samples = micro_batch(config)
    if samples % count:
        lower, upper = (n * micro for n in (samples // count * count, -(-samples // count) * count))
        raise ConfigError(
            f"data.packing=tree: data.global_batch={data.global_batch} over data.accumulation={micro} "
            f"is not whole stories of {count} samples; choose data.global_batch="
            f"{f'{lower} or ' if lower else ''}{upper}"
        )
    return count


def epoch_samples(config: ConfigDict, source: Source) -> int:
    """Samples of an epoch as its steps count them: with trees, stories times the samples of the longest."""
    starts = stories_of(source) if config.data.packing == "tree" else None
    return len(source) if starts is None else (len(starts) - 1) * longest_story(starts)


def with_features(batch: BatchSpec, store: FeatureSpec) -> BatchSpec:
    """Shapes of a batch that holds a store's features in the place of images."""
    return dataclasses.replace(
        batch,
        target_moments=store.target if batch.items else None,
        image_states=store.image if batch.images else None,
        moments_dtype=store.target_dtype,
        states_dtype=store.image_dtype,
    )


def open_loader(
    config: ConfigDict,
    spec: ModelSpec,
    source: Source,
    *,
    training: bool,
    features: FeatureStore | None = None,
) -> Loader:
    """Batches of this process.  Held-out ones have one shape and one sample a row.

    Args:
      features: those of the samples' images, which batches hold in the place of pixels.
    """
    data, samples = config.data, micro_batch(config)
    trees = training and data.packing == "tree"
    split = training and not trees and splits_prompts(config, spec, ends_in_vokens=source.ends_in_vokens)
    if trees:
        pack = samples_of_a_story(config, source)
    else:
        pack = samples_a_row(config, split) if training else 1
    shapes = batch_spec(config, spec, samples, pack, split)
    encoding = encode_config(config, spec.sizes, training=training)
    if features is not None:
        shapes = with_features(shapes, features.spec)
        encoding = dataclasses.replace(encoding, features=features)
    stories = story_index(source, encoding, shapes, data.index_cache) if trees else None
    return make_loader(
        source,
        encoding,
        shapes,
        global_batch=data.global_batch if training else samples,
        accumulation=data.accumulation or 1 if training else 1,
        seed=config.run.seed,
        shuffle=training,
        num_epochs=None if training else 1,
        buckets=tuple(data.buckets) if training else (),
        index=size_index(config, spec, source) if training else None,
        stories=stories,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=data.worker_count if training else 0,
        prefetch=data.prefetch,
        error_budget=data.error_budget,
    )


def data_identity(config: ConfigDict, source: Source) -> dict[str, object]:
    """What a checkpoint stores of its data: the samples and everything that orders them."""
    data = config.data
    order = {"global_batch": data.global_batch, "seed": config.run.seed}
    if data.packing == "tree":
        order["packing"] = "tree"
    if data.buckets:
        order["buckets"] = list(data.buckets)
    if data.pack > 1 and not data.buckets:  # with buckets it lays a step out and does not choose its samples
        order["pack"] = data.pack
    return {"fingerprint": source.fingerprint(), "samples": len(source), **order}


def make_batch_sharder(mesh: jax.sharding.Mesh, accumulation: int):
    """``numpy batch of this process -> global arrays``; sharding errors come before any compile."""
    count = jax.process_count()
    lead = int(accumulation > 1)

    def whole(value: np.ndarray) -> tuple[int, ...]:
        shape = list(value.shape)
        shape[lead] *= count
        return tuple(shape)

    def shard(batch: Batch) -> Batch:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(whole(x), x.dtype), batch)
        places = batch_shardings(shapes, mesh, accumulation)
        if count > 1:
            check_rows(places.tokens, shapes.tokens.shape, lead)
            check_rows(places.target, shapes.target.shape, lead)
        return jax.tree.map(
            lambda s, x: jax.make_array_from_process_local_data(s, x, whole(x)), places, batch
        )

    return shard


def check_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int) -> None:
    """Whether this process's devices hold just the rows that this process reads.

    Raises:
      ShardingError: they do not (a mesh that spreads a row's copies, or its order, over processes).
    """
    part = shape[axis] // jax.process_count()
    want = set(range(part * jax.process_index(), part * (jax.process_index() + 1)))
    mine = sharding.addressable_devices_indices_map(shape).values()
    have = {row for index in mine for row in range(*index[axis].indices(shape[axis]))}
    if have != want:
        raise ShardingError(
            f"process {jax.process_index()} reads rows {min(want)} to {max(want)} of {shape[axis]}, but "
            f"its devices hold {len(have)} rows from {min(have)} to {max(have)}; choose mesh.data x "
            f"mesh.fsdp as a multiple of the {jax.process_count()} processes, tensor axes inside a process"
        )
