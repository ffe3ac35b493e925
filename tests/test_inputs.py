"""Every data.format opens its source from the configuration, for training and held out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import jax
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from minigpt5_jax.batch import Batch
from minigpt5_jax.config import ConfigError, get_config, use_shapes_backbones, validate
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.sources import Cc3mSource, MMDialogSource, VistSource
from minigpt5_jax.shapes.dataset import read_scenes
from minigpt5_jax.training.sharding import ShardingError, make_mesh
from minigpt5_jax.wiring import inputs
from minigpt5_jax.wiring.model import build


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def write_cc3m(folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(jpeg())
    (folder / "pairs.tsv").write_text("caption\timage_path\na dog\ta.jpg\n")
    return folder / "pairs.tsv"


def write_tar(folder: Path) -> Path:
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for name, content in {"000000000.jpg": jpeg(), "000000000.txt": b"a dog"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "00000.tar"


def write_vist(folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(jpeg())
    steps = [{"caption": f"step {i}", "image_id": "7", "sequence_index": i} for i in range(2)]
    (folder / "val_cleaned.json").write_text(json.dumps({"1": steps}))
    (folder / "val_image_mapping.json").write_text(json.dumps({"7": "a.jpg"}))
    return folder / "val_cleaned.json"


def write_mmdialog(folder: Path) -> Path:
    (folder / "9.jpg").write_bytes(jpeg())
    turns = [[{"__TEXT__": "hello"}], [{"__TEXT__": "look"}, {"__MEDIA__": "9"}]]
    line = {"conversation_id": 3, "conversation": [{"turn": turn} for turn in turns]}
    (folder / "conversations.jsonl").write_text(json.dumps(line))
    return folder / "conversations.jsonl"


def write_jsonl(folder: Path) -> Path:
    (folder / "a.jpg").write_bytes(jpeg())
    (folder / "own.jsonl").write_text(json.dumps({"caption": "a dog", "image": "a.jpg"}))
    return folder / "own.jsonl"


def write_parquet(folder: Path) -> Path:
    rows = {"caption": ["a dog"], "image": [{"bytes": jpeg(), "path": None}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "a.parquet")
    return folder / "a.parquet"


CASES = {
    "cc3m": (write_cc3m, 2, ["cc3m_0"]),
    "cc3m_tar": (write_tar, 2, ["cc3m_0"]),
    "parquet": (write_parquet, 2, ["cc3m_0"]),
    "vist": (write_vist, 4, ["1_0-gen", "1_1-gen", "1_1-multimodal", "1_1-understanding"]),
    "mmdialog": (write_mmdialog, 1, ["3_1-mm"]),
    "jsonl": (write_jsonl, 1, ["own_1"]),
}


@pytest.fixture
def config(tmp_path):
    made = use_shapes_backbones(get_config())
    made.run.workdir = str(tmp_path / "run")
    made.data.update(index_cache=str(tmp_path / "cache"), global_batch=1, worker_count=0)
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_format_opens_its_source(name, config, tmp_path):
    write, count, held_out_ids = CASES[name]
    path = write(tmp_path)
    config.data.update(format=name, train=str(path), validation=str(path))
    spec = build(validate(config))
    train, held_out = inputs.open_sources(config, spec.sizes)
    assert len(train) == count
    assert [held_out[i].item_id for i in range(len(held_out))] == held_out_ids
    assert inputs.data_identity(config, train)["samples"] == count


def test_every_format_has_a_case():
    assert set(inputs.OPENERS) == {*CASES, *inputs.SHAPES, "prepared"}


@pytest.mark.parametrize(
    "name, reader, of_two",
    [("shapes", Cc3mSource, 2), ("shapes_stories", VistSource, 26), ("shapes_dialogs", MMDialogSource, None)],
)
def test_the_small_world_is_drawn_once_and_read_by_the_readers_of_the_real_data(config, name, reader, of_two):
    config.data.update(format=name, shapes_train=2, shapes_validation=1, instruction_every=0)
    spec = build(validate(config))
    train, held_out = inputs.open_sources(config, spec.sizes)
    assert type(train) is type(held_out) is reader and len(train) == (of_two or len(train)) > len(held_out)
    files = {path: path.stat().st_mtime_ns for path in Path(config.run.workdir).rglob("*.*g")}
    again, _ = inputs.open_sources(config, spec.sizes)
    assert again.fingerprint() == train.fingerprint() != held_out.fingerprint()
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_scenes_have_as_many_objects_as_are_asked_for(config):
    config.data.update(format="shapes", shapes_train=20, shapes_validation=1, shapes_max_objects=3)
    inputs.open_sources(config, build(validate(config)).sizes)
    scenes = read_scenes(Path(config.run.workdir) / "data", "train")
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    config.data.shapes_max_objects = 4
    with pytest.raises(ConfigError, match="data.shapes_max_objects=4 is more than 3"):
        validate(config)


def test_release_wording_and_loader_reach_the_sources(config, tmp_path):
    path = write_mmdialog(tmp_path)
    config.data.update(format="mmdialog", train=str(path), dialog_loader="release")
    source, held_out = inputs.open_sources(config, build(validate(config)).sizes)
    assert held_out is None and source[0].item_id == "mmdialog3_1"
    config.data.update(format="vist", train=str(write_vist(tmp_path)), tasks=("gen",), prompt_set="release")
    source, _ = inputs.open_sources(config, build(config).sizes)
    assert len(source) == 2
    assert any("Generate a image" in words for words, _ in source.texts(0))


def test_contexts_are_thinned_in_training_alone(config, tmp_path):
    path = str(write_vist(tmp_path))
    config.data.update(format="vist", train=path, validation=path, tasks=("gen",), context_dropout=1.0)
    train, held_out = inputs.open_sources(config, build(validate(config)).sizes)
    counts = {(len(x.images), x.source.count("step 0")) for x in (train.example(1, n) for n in range(20))}
    assert counts == {(1, 0), (0, 1)}
    whole = {(len(x.images), x.source.count("step 0")) for x in (held_out.example(1, n) for n in range(20))}
    assert whole == {(1, 1)}
    config.data.context_dropout = 1.5
    with pytest.raises(ConfigError, match=r"data.context_dropout"):
        validate(config)


def test_training_data_must_be_given(config):
    with pytest.raises(ConfigError, match=r"--config.data.train=PATH \(data.format=cc3m\)"):
        inputs.open_sources(config, build(config).sizes)


def test_rows_longer_than_the_language_model_are_refused(config):
    config.data.max_length = 513
    with pytest.raises(ConfigError, match="data.max_length=513 exceeds the language model's 512 positions"):
        inputs.batch_spec(config, build(config), 1)


def test_an_unknown_task_is_one_clear_error(config, tmp_path):
    config.data.update(format="vist", train=str(write_vist(tmp_path)), tasks=("drawing",))
    with pytest.raises(DataError, match="some of gen, multimodal, understanding; got drawing"):
        inputs.open_sources(config, build(config).sizes)


def test_buckets_and_packing_are_planned_from_an_index_kept_in_the_cache(config, tmp_path):
    config.data.update(format="cc3m", train=str(write_cc3m(tmp_path)), max_length=64, buckets=(40, 64))
    spec = build(validate(config))
    source, _ = inputs.open_sources(config, spec.sizes)
    loader = inputs.open_loader(config, spec, source, training=True)
    shapes = {next(loader).tokens.shape for _ in range(4)}
    loader.close()
    assert shapes <= {(1, 40 - 9), (1, 64 - 9)} and len(list((tmp_path / "cache").glob("lengths-*.npz"))) == 1
    assert inputs.data_identity(config, source)["buckets"] == [40, 64]
    config.data.update(buckets=(), pack=2, global_batch=2, max_length=128)
    loader = inputs.open_loader(config, spec, source, training=True)
    assert next(loader).tokens.shape == (1, 128)
    loader.close()


def test_captions_stand_apart_from_vokens_unless_something_acts_on_them(config, tmp_path):
    config.data.update(format="cc3m", train=str(write_cc3m(tmp_path)), max_length=64, buckets=(64,))
    config.data.update(global_batch=8, accumulation=1)

    def first() -> Batch:
        spec = build(validate(config))
        loader = inputs.open_loader(config, spec, inputs.open_sources(config, spec.sizes)[0], training=True)
        batch = next(loader)
        loader.close()
        return batch

    batch = first()
    assert batch.labels.shape == (8, 10) and batch.prompt_end.shape == batch.voken_row.shape == (8,)
    assert batch.tokens.max() < build(config).backbone.vocab_size  # no voken among the prompts
    config.data.split_vokens = False
    assert first().prompt_end is None
    config.data.split_vokens = True
    config.model.backbone.lora_rank = 2
    for stage in ("stage1", "stage2"):  # LoRA acts on captions, whether it trains or not
        config.tuning.stage = stage
        assert first().prompt_end is None


def test_rows_of_packed_samples_that_do_not_divide_are_named_with_the_remedy(config, tmp_path):
    config.data.update(format="cc3m", train=str(write_cc3m(tmp_path)), max_length=64, buckets=(64,))
    config.data.update(global_batch=8, pack=4)
    spec = build(validate(config))
    loader = inputs.open_loader(config, spec, inputs.open_sources(config, spec.sizes)[0], training=True)
    shard = inputs.make_batch_sharder(make_mesh(devices=jax.devices()[:4]), 1)
    with pytest.raises(ShardingError, match=r"has 2 entries.*a multiple of 16, or lower data.pack=4"):
        shard(next(loader))
    loader.close()
    config.data.update(pack=2)  # the remedy
    loader = inputs.open_loader(config, spec, inputs.open_sources(config, spec.sizes)[0], training=True)
    assert shard(next(loader)).tokens.shape[0] == 4
    loader.close()


def test_trees_are_of_whole_stories(config, tmp_path):
    config.data.update(format="vist", train=str(write_vist(tmp_path)), max_images=2, max_length=200)
    config.data.update(packing="tree", global_batch=6, max_targets=30)
    spec = build(validate(config))
    source, _ = inputs.open_sources(config, spec.sizes)
    with pytest.raises(ConfigError, match="not whole stories of 4 samples; choose data.global_batch=4 or 8"):
        inputs.open_loader(config, spec, source, training=True)
    config.data.global_batch = 8  # the remedy: two rows, of which the second is empty
    assert inputs.data_identity(config, source)["packing"] == "tree"
    assert inputs.epoch_samples(config, source) == 4
    loader = inputs.open_loader(config, spec, source, training=True)
    batch = next(loader)
    assert batch.item_mask.sum() == 3 and batch.tokens.shape[0] == 2 and batch.target.shape[0] == 6
    shard = inputs.make_batch_sharder(make_mesh(devices=jax.devices()[:4]), 1)
    with pytest.raises(ShardingError, match=r"2 stories.*4 devices.*a multiple of 4"):
        shard(batch)
    loader.close()
    config.data.global_batch = 16  # the remedy
    loader = inputs.open_loader(config, spec, source, training=True)
    assert shard(next(loader)).tokens.shape[0] == 4
    loader.close()
    pairs = inputs.OPENERS["cc3m"](config, spec.sizes, write_cc3m(tmp_path), True)
    with pytest.raises(ConfigError, match="tree is for stories, and .* are none; set data.packing=shuffled"):
        inputs.open_loader(config, spec, pairs, training=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"buckets": (40, 60), "max_length": 64}, r"must ascend and end in data.max_length=64"),
        ({"buckets": (64, 40), "max_length": 40}, "must ascend"),
        ({"pack": 3, "global_batch": 4}, r"data.pack=3 does not divide the 4 samples.*a batch of 3 or 6"),
        (
            {"features": "store", "flip_each_epoch": True},
            "mirrored once and for all; set data.flip_each_epoch",
        ),
        ({"packing": "off", "pack": 2, "global_batch": 2}, "data.pack=2 is for data.packing=shuffled"),
        ({"packing": "tree"}, "tree is for stories .*format is 'cc3m', so set data.packing=shuffled"),
        ({"packing": "tree", "format": "vist", "context_dropout": 0.1}, "set data.context_dropout=0"),
        ({"packing": "tree", "format": "vist", "buckets": (256,)}, "so set data.buckets=()"),
    ],
)
def test_settings_that_do_not_go_together(config, changes, message):
    config.data.update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config)
