"""Bad input of the small world, as a user gives it: an error in a line, or what minigpt5_jax/shapes/README.md
says happens ("Bad input")."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import tiny
from minigpt5_jax import generate
from minigpt5_jax.config import ConfigError, get_config, use_prefix, validate
from minigpt5_jax.data.batches.encode import EncodeConfig, encode
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.samples.stories import StoryRules
from minigpt5_jax.data.sources import VistSource
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.shapes import files
from minigpt5_jax.shapes.dataset import write_stories
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import CheckpointError, describe_run, hash_parameters
from minigpt5_jax.training.tuning import FROZEN
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.wiring import restore, weight_paths
from minigpt5_jax.wiring import training as train
from minigpt5_jax.wiring.model import build, initial_trainable, load_frozen, tokenizer_identity

USES = {name: use for name, (_, use) in weight_paths.uses_of(get_config()).items()}

ROOT = Path(__file__).parents[2]
OUTSIDE = "a plaid 猫 zeppelin on a rötes background"


@pytest.fixture(autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def command(mode=None, **values):
    """Runs the generate command with these flags."""
    with flagsaver.flagsaver(**values):
        return generate.generate(mode)


def records(path, *turns, name="it"):
    """A file of one conversation."""
    line = {"id": name, "turns": [{"role": role, "content": content} for role, content in turns]}
    path.write_text(json.dumps(line))
    return str(path)


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """``make(sees=False) -> configuration`` of a random model, its weights in files, on data of scenes."""
    made = tiny.write_oracle_sources(tmp_path_factory.mktemp("weights"))
    made.data.update(
        format="shapes",
        shapes_train=8,
        shapes_validation=8,
        global_batch=8,
        worker_count=0,
        max_length=64,
        flip_mode="off",
    )
    made.inference.update(sampler="ddim", num_inference_steps=1, max_new_tokens=4, force_image="first")

    def make(sees=False):
        config = made.copy_and_resolve_references()
        if not sees:
            config.model.backbone.update(vit="none", qformer="none")
        return config

    return make


@pytest.fixture(scope="module")
def stage1(tiny_config, tmp_path_factory):
    """Folder of a stage-1 run that saved itself before its first step."""
    config = validate(tiny_config(sees=True))
    spec = build(config)
    frozen = load_frozen(config, spec)
    fresh = initial_trainable(config, spec, frozen)
    tokenizer = tokenizer_identity(config, spec.sizes)
    meta = describe_run(config.to_dict(), tokenizer=tokenizer, frozen=hash_parameters(frozen))
    trainable = {path: value for path, value in fresh.items() if spec.labels[path] != FROZEN}
    return save(tmp_path_factory.mktemp("stage1"), meta, trainable)


@pytest.fixture(scope="module")
def only_described(tiny_config, tmp_path_factory):
    """Folder of a run of which nothing but its description is asked."""
    meta = describe_run(tiny_config().to_dict(), tokenizer={}, frozen={})
    return save(tmp_path_factory.mktemp("described"), meta)


def save(folder, meta, trainable=None):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"trainable": trainable or {"x": np.zeros(1)}}, 0, meta)
    checkpoints.close()
    return folder


# -- prompts ----------------------------------------------------------------------------------------


def test_tokenizers_take_any_words():
    clip, llama = (
        kind(files.ASSETS / path)
        for kind, path in ((ClipTokenizer, "sd/tokenizer"), (LlamaTokenizer, "llama/tokenizer.model"))
    )
    ids, mask = clip.encode([OUTSIDE, "", "zeppelin " * 100])
    assert ids.min() >= 0 and ids.max() < clip.vocab_size and ids.shape == (3, 77)
    assert mask[1].sum() == 2 and mask[2].all() and ids[2, -1] == ids[1, 1], "cut, the end kept"
    assert llama.decode(llama.encode(OUTSIDE)) == OUTSIDE


@pytest.mark.slow
def test_words_outside_the_world_and_too_many_of_them_still_give_a_image(stage1, tmp_path, caplog):
    prompts = [OUTSIDE, " ".join([OUTSIDE] * 8)]
    with caplog.at_level("WARNING"):
        page = command(checkpoint=str(stage1), prompt=prompts, output=str(tmp_path / "page")).read_text()
    assert len(list((tmp_path / "page/images").glob("*.png"))) == 2
    assert "猫 zeppelin" in page and page.count("positions of the prompt did not fit") == 1
    assert "prompt 2: its first" in caplog.text and "(max_length)" in caplog.text


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever is refused, is refused before weights are read."""
    for module, name in ((restore, "load_frozen"), (train, "load_frozen")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    "mode, line, message",
    [
        (None, {"caption": " .", "image": "x.png"}, r"in.jsonl:1: caption"),
        (None, {"turns": [{"role": "user", "content": ""}]}, r"in.jsonl:1: turns\[0\].content\[0\].text"),
        ("story", {"turns": []}, r"in.jsonl:1: turns: expected a list with at least one turn"),
        ("chat", {"turns": [{"role": "user", "content": " "}]}, r"in.jsonl:1: turns\[0\].content"),
    ],
)
def test_empty_prompts_of_a_file_are_named(mode, line, message, only_described, tmp_path, no_weights):
    run = str(only_described)
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        command(mode, checkpoint=run, jsonl=str(tmp_path / "in.jsonl"), output=str(tmp_path / "page"))
    assert not (tmp_path / "page").exists()


def test_more_images_than_there_are_positions(only_described, tmp_path, no_weights):
    with pytest.raises(ConfigError, match=r"max_length=64 .* 500 images\) exceed .*'s \d+ positions"):
        command(
            checkpoint=str(only_described),
            prompt=["a red circle"],
            inference=["max_images=500"],
            output=str(tmp_path / "page"),
        )


# -- stories ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """VIST files with stories of 1, 3, 10 and no steps."""
    folder = tmp_path_factory.mktemp("stories")
    path = write_stories(folder, "train", 4, 0)
    told = json.loads(path.read_text())
    told = {name: steps[:count] for (name, steps), count in zip(told.items(), (1, 3, 5, 0))}
    again = [{**step, "sequence_index": 5 + number} for number, step in enumerate(told["2"])]
    path.write_text(json.dumps(told | {"2": told["2"] + again}))
    return VistSource(path, rules=StoryRules(training=True))


def test_stories_of_another_length_are_read(uneven):
    assert "; 3 with more or fewer than 5 steps; 1 unusable" in uneven.describe()
    empty = len(uneven) - 1
    assert empty == 1 + 7 + 28, "3 n - 2 samples of n steps"
    assert len(uneven.example(0).images) == 0 and len(uneven.example(empty - 1).images) == 10
    with pytest.raises(DataError, match="no steps"):
        uneven.example(empty)


def test_a_history_longer_than_a_row_loses_its_oldest_steps(uneven):
    llama = LlamaTokenizer(files.ASSETS / "llama/tokenizer.model")
    clip = ClipTokenizer(files.ASSETS / "sd/tokenizer")
    config = EncodeConfig(llama, clip)
    spec = BatchSpec(
        rows=1, length=150, items=1, images=5, targets=40, image_size=16, target_size=64, image_tokens=8
    )
    number = next(n for n in range(len(uneven) - 1) if uneven.example(n).item_id.endswith("_9-gen"))
    example = uneven.example(number)
    sample = encode(example, config, spec, (0, 0, 0))
    assert len(sample.text.tokens) <= 150 and sample.text.dropped > 0
    left = len(sample.text.images)
    assert 0 < left <= 5 and sample.text.images == tuple(range(9 - left, 9)), "the last ones are left"
    kept = llama.decode([int(i) for i in sample.text.tokens if 0 < i < llama.first_voken_id])
    assert example.source.split("</Img>")[-1].strip().split()[-1] in kept, "the request stays"
    with pytest.raises(DataError, match="reads 9 images, but a row has room for none; set data.max_images"):
        encode(example, config, dataclasses.replace(spec, images=0), (0, 0, 0))


@pytest.mark.slow
def test_a_story_goes_on_from_any_length_and_forgets_its_oldest(stage1, uneven, tmp_path, caplog):
    """From one scene and from more than fit; and by a stage-1 run, with a warning."""
    images = [str(uneven.story(2).steps[n].image) for n in range(4)]

    def scene(n):
        return "user", [{"type": "text", "text": f"scene {n}"}, {"type": "image", "path": images[n]}]

    lines = [records(tmp_path / "one", scene(0), name="short")]
    lines += [records(tmp_path / "two", *map(scene, range(4)), name="long")]
    (tmp_path / "in.jsonl").write_text("\n".join(Path(line).read_text() for line in lines))
    with caplog.at_level("WARNING"):
        page = command(
            "story",
            checkpoint=str(stage1),
            jsonl=str(tmp_path / "in.jsonl"),
            allow_outside_images=True,
            scenes=2,
            output=str(tmp_path / "page"),
        ).read_text()
    told = list(map(json.loads, (tmp_path / "page/conversations.jsonl").read_text().splitlines()))
    assert [line["id"] for line in told] == ["short", "long"]
    drawn = [
        sum(part["type"] == "image" for turn in line["turns"][-2:] for part in turn["content"])
        for line in told
    ]
    assert drawn == [2, 2] and "positions of the past did not fit" in page
    assert "this run is of stage 1" in caplog.text and "are dropped" in caplog.text


# -- checkpoints ------------------------------------------------------------------------------------


def lora(config):
    config.model.backbone.lora_rank = 4
    config.tuning.stage = "stage2"


def prefix(config):
    use_prefix(config).model.backbone.prefix_hidden_size = 16
    config.tuning.stage = "stage2"


def four_vokens(config):
    config.model.backbone.num_vokens = 4


def wider_mapper(config):
    config.model.mapper.dim_feedforward = 64


@pytest.mark.parametrize(
    "there, here, message",
    [
        (lora, lambda config: None, r"\(of stage 2\)(.|\n)*lora_a: .* there, not trained here"),
        (lora, prefix, r"\(of stage 2\)(.|\n)*lora_a: .* there, not trained here"),
        (prefix, lora, r"\(of stage 2\)(.|\n)*prefix_encoder/.* there, not trained here"),
        (four_vokens, lora, r"\(of stage 1\)(.|\n)*voken: \(5, 48\) there, \(9, 48\) here"),
        (wider_mapper, lora, r"\(of stage 1\)(.|\n)*mapper/.*: .*\b64\b.* there, .*\b128\b.* here"),
    ],
)
def test_a_run_starts_from_no_checkpoint_of_another_kind(
    there, here, message, tiny_config, tmp_path, no_weights
):
    """Stage 1 from stage 2, prefix from LoRA and back, another model: told before weights are read."""
    former, config = tiny_config(), tiny_config()
    there(former), here(config)
    meta = describe_run(former.to_dict(), tokenizer={}, frozen={})
    config.run.update(workdir=str(tmp_path / "run"), num_steps=2, init_from=str(tmp_path / "former"))
    config.optimizer.warmup_steps = 1
    save(tmp_path / "former", meta)
    with pytest.raises(
        CheckpointError, match=f"{message}(.|\n)*Start from a run whose model is part of this"
    ):
        train.make_loop(validate(config))
    assert not (tmp_path / "run").exists()


# -- packaged files ---------------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A copy of the language model's files as the package has them."""
    folder = tmp_path / "assets"
    shutil.copytree(files.ASSETS / "llama", folder / "llama")
    hashes = {
        f"llama/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "llama").iterdir()
    }
    (folder / files.PROVENANCE).write_text(json.dumps({"sha256": hashes}))
    monkeypatch.setattr(weight_paths, "ASSETS", folder)
    return folder


def test_unaltered_files_pass(assets):
    assert weight_paths.source_path(USES["llm"], "shapes") == assets / "llama"
    assert weight_paths.source_path(USES["tokenizer"], "shapes") == assets / "llama/tokenizer.model"


def test_an_altered_file_is_named_with_both_hashes(assets, tiny_config, tmp_path):
    file = assets / "llama/model.safetensors"
    known = hashlib.sha256(file.read_bytes()).hexdigest()
    values = bytearray(file.read_bytes())
    values[-1] ^= 1
    file.write_bytes(values)
    found = hashlib.sha256(values).hexdigest()
    config = tiny_config()
    config.weights.llm = "shapes"
    config.run.workdir = str(tmp_path / "run")
    message = f"{file} is altered: its SHA-256 is {found}, .* has {known}; reinstall .*shapes_backbones.py"
    with pytest.raises(WeightFileError, match=message):
        weight_paths.source_path(USES["llm"], "shapes")
    with pytest.raises(ConfigError, match=message):  # as a user sees it
        train.make_loop(validate(config))
    assert not (tmp_path / "run").exists()
    assert weight_paths.source_path(USES["tokenizer"], "shapes"), "that file is not altered"


@pytest.mark.parametrize("name", ["llama/config.json", "llama/tokenizer.model", files.PROVENANCE])
def test_a_missing_file_is_named(name, assets):
    (assets / name).unlink()
    with pytest.raises(WeightFileError, match=f"{assets / name} is missing(.|\n)*reinstall"):
        weight_paths.source_path(USES["llm"], "shapes")
    with pytest.raises(WeightFileError, match="sd/unet is missing|PROVENANCE.json is missing"):
        weight_paths.source_path(USES["unet"], "shapes")
