"""The model a user holds: from a folder and back to one, and what it is asked and answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from minigpt5_jax import MiniGPT5, open_run
from minigpt5_jax.config import ConfigError, validate
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.inference.conversation import Conversation, Message, answer_turn
from minigpt5_jax.inference.page import Entry, write_page
from minigpt5_jax.inference.session import Generation
from minigpt5_jax.inference.transcript import record_of
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.wiring import pipeline
from minigpt5_jax.wiring.model import build, language_tokenizer
from minigpt5_jax.wiring.model_card import model_card
from minigpt5_jax.wiring.session import LoadedModel

QUICK = {"max_new_tokens": 4, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """An untrained run of stage 1 that cannot see; some of what is new in it does not train."""
    config = tiny.shapes_stage1()
    config.tuning.rules = (("mapper/queries", "frozen"),)
    config.inference.update(QUICK)
    return tiny.save_run(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(workdir) -> MiniGPT5:
    return MiniGPT5.from_pretrained(workdir)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The saved model, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def seeing() -> MiniGPT5:
    """A model of stage 2 that reads 64 positions, without weights: for what is made of a prompt."""
    config = tiny.shapes_stage1()
    config.model.backbone.update(vit="source", qformer="source", lora_rank=8)
    config.tuning.stage = "stage2"
    config.data.update(format="shapes_dialogs", max_length=64)
    spec = build(validate(config))
    return MiniGPT5(LoadedModel(config, spec, {}, language_tokenizer(config, spec.sizes), 0))


# ------------------------------------------------------------------------------------- folders


def test_a_saved_model_is_the_same_model(model, folder, monkeypatch):
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model", "README.md"
    }  # fmt: skip
    again = MiniGPT5.from_pretrained(folder)
    assert (again.stage, again.model.step) == (model.stage, 7) == (1, 7)
    assert again.model.params.keys() == model.model.params.keys()
    for path, value in model.model.params.items():
        np.testing.assert_array_equal(again.model.params[path], value, err_msg=path)
    assert again.config.weights.tokenizer == str(folder), "its own tokenizer"
    about = json.loads((folder / "config.json").read_text())
    assert about["run"]["frozen"] and not about["run"]["config"]["run"]["workdir"]


def test_the_model_card_says_what_the_model_stands_on(model, folder):
    card = (folder / "README.md").read_text()
    hashes = json.loads((folder / "config.json").read_text())["run"]["frozen"]
    assert all(f"`{tower}` | `{value}`" in card for tower, value in hashes.items())
    assert "| `llm` | packaged with minigpt5_jax (the small world) | Apache-2.0 |" in card
    assert card.startswith("---\nlibrary_name: minigpt5_jax") and "license: apache-2.0" in card
    real = model.config.copy_and_resolve_references()
    real.weights.update(llm="Vision-CAIR/vicuna-7b", stable_diffusion="/weights/sd")
    card = model_card(real, {"frozen": {}}, 1, {})
    assert "license: other" in card and "LLaMA-1's research licence" in card and "Open RAIL" in card
    assert "terms of all of them hold" in card


def test_half_the_size_in_float16(model, folder, tmp_path):
    small = model.save_pretrained(tmp_path / "small", dtype="float16")
    sizes = [(path / "model.safetensors").stat().st_size for path in (small, folder)]
    assert sizes[0] < 0.55 * sizes[1]
    again = open_run(small).load().params
    path = next(path for path in again if path.startswith("mapper/") and path.endswith("kernel"))
    assert again[path].dtype == np.float32
    np.testing.assert_allclose(again[path], model.model.params[path], atol=1e-3)
    assert (np.asarray(again["mapper/queries"]) != model.model.params["mapper/queries"]).any(), "rounded too"


def test_a_saved_model_is_a_run_for_every_reader(folder):
    run = open_run(folder, inference={"sampler": "ddim"})
    run.check()
    assert run.stage == 1 and run.reader.fingerprint(7)
    with pytest.raises(CheckpointError, match=r"no step 3; it has \[7\]"):
        open_run(folder, step=3)


def test_only_floating_dtypes_that_hold_the_numbers(model, tmp_path):
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        model.save_pretrained(tmp_path / "small", dtype="int8")
    large = {**model.model.params, "mapper/queries": model.model.params["mapper/queries"] * 1e30}
    wide = MiniGPT5(dataclasses.replace(model.model, params=large), model._meta)
    with pytest.raises(ConfigError, match="mapper/queries does not fit into float16; save it as bfloat16"):
        wide.save_pretrained(tmp_path / "small", dtype="float16")
    assert wide.save_pretrained(tmp_path / "small", dtype="bfloat16")


def test_settings_of_a_session_are_not_saved(workdir, tmp_path):
    other = MiniGPT5.from_pretrained(workdir, sampler="ddim", num_inference_steps=3)
    saved = open_run(other.save_pretrained(tmp_path / "model")).config.inference
    assert (saved.sampler, saved.num_inference_steps) == (
        MiniGPT5.from_pretrained(workdir).config.inference.sampler,
        1,
    )


def test_a_folder_gives_neither_code_nor_programs(copy, monkeypatch):
    about = json.loads((copy / "config.json").read_text())
    usual = about["run"]["config"]["run"]["compile_cache"]
    about["run"]["config"]["run"]["compile_cache"] = str(copy / "programs")
    (copy / "config.json").write_text(json.dumps(about))
    assert open_run(copy).config.run.compile_cache == usual
    about["run"]["config"]["model"]["mapper"]["name"] = "theirs.mapper"
    (copy / "config.json").write_text(json.dumps(about))
    (copy / "theirs").mkdir()
    (copy / "theirs" / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(copy))
    with pytest.raises(CheckpointError, match="'theirs.mapper' is code that came with the model"):
        open_run(copy)


def test_a_folder_of_a_newer_version(copy):
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="newer version .*format 2.*update your checkout"):
        MiniGPT5.from_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(about))
    assert open_run(copy).step == 7


def test_a_folder_that_was_damaged_or_mixed(copy):
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors is not what was saved: its SHA-256 differs"):
        MiniGPT5.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        MiniGPT5.from_pretrained(copy)


def test_a_folder_of_another_model(copy):
    about = json.loads((copy / "config.json").read_text())
    about["run"]["config"]["model"]["backbone"]["num_vokens"] = 4
    (copy / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="is of another model:\n"):
        MiniGPT5.from_pretrained(copy)


def test_nothing_of_ours_is_overwritten(model, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "path, message",
    [
        ("/no/such/run", "no complete checkpoint in /no/such/run"),
        ("someone/a-model", r"(?s)not in the local cache.*hf download someone/a-model"),
    ],
)
def test_a_model_that_is_not_there(path, message):
    with pytest.raises(CheckpointError, match=message):
        MiniGPT5.from_pretrained(path)


def test_an_address_of_object_storage():
    with pytest.raises(ConfigError, match="gs://bucket/run is an address.*mount the bucket"):
        MiniGPT5.from_pretrained("gs://bucket/run")


def test_a_hugging_face_id_in_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    assert open_run("someone/a-model").step == 7


def test_nothing_is_uploaded_unasked(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "_upload", lambda *given: asked.append(given) or "https://address")
    folder = model.save_pretrained(tmp_path / "fox")
    assert not asked
    model.save_pretrained(folder, push_to_hub=True)
    assert asked == [(folder, "fox", None)]
    assert model.push_to_hub("me/fox", private=True) == "https://address" and asked[1][1:] == ("me/fox", True)


# ------------------------------------------------------------------------------------- answers


def test_texts_and_images_in_order(model):
    answer = model.generate(["a large red circle"], seed=3, force_image="after_text")
    [image] = answer.images
    assert image.size == (64, 64) and image.mode == "RGB" and answer.parts[-1] is image and answer.seed == 3
    assert answer.message()["content"][-1] == {"type": "image", "image": image}
    again = model.generate("a large red circle", seed=3, force_image="after_text")
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(image))
    assert len(model._sessions) == 1, "the same settings are compiled once"


def test_several_images_in_one_answer_stand_where_they_were_written(model, tmp_path, monkeypatch):
    session = model._session({"max_images": 3})
    word, voken = session.tokenizer.encode("circle"), session.tokenizer.first_voken_id
    states = np.random.default_rng(0).standard_normal((2, 8, 128)).astype(np.float32)
    ids = [voken, *word, voken, *word, 2]
    monkeypatch.setattr(session, "_answer", lambda rows: [(ids, [*states])])
    answer = model.generate("go on", max_images=3)
    assert [part if isinstance(part, str) else "image" for part in answer.parts] == [
        "image", "circle", "image", "circle"
    ]  # fmt: skip
    assert np.any(np.asarray(answer.images[0]) != np.asarray(answer.images[1]))
    parts = [part if isinstance(part, str) else np.asarray(part) for part in answer.parts]
    page = write_page(tmp_path, "Several", [Entry(["go on"], parts)]).read_text()
    order = [page.index(mark) for mark in ("001-output-1.png", "<p>circle</p>", "001-output-2.png")]
    assert order == sorted(order) and len([*tmp_path.glob("images/*.png")]) == 2
    turn = answer_turn(Generation(tuple(parts), "", (), "", 0))
    said = record_of(Conversation("c", 0, [Message("user", ("go on",)), turn]), 1, 1)["turns"][1]
    assert [part["type"] for part in said["content"]] == ["image", "text", "image", "text"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_q": 1}, "unknown key inference.top_q"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"top_k": 2.5}, "must be of type int"),
        ({"max_images": 100}, "100 images.* exceed the language .*lower one of them"),
    ],
)
def test_settings_that_are_refused(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.generate("a dog", **settings)


def user(content):
    return {"role": "user", "content": content}


HELLO = {"role": "assistant", "content": "hello."}


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        ([user("hi"), HELLO, user("")], "message 3 is empty"),
        ([user([])], "message 1 is empty"),
        ("draw [IMG0] please", r"contains \[IMG0\], a token of the model"),
        (["see <ImageHere>"], "contains <ImageHere>.*give images as images"),
        ([user("hi ### there")], "message 1 contains ###, which ends a turn"),
        ([user("hi"), HELLO], "ends in a message of the user"),
        ([HELLO], "ends in a message of the user"),
        ([user("hi"), HELLO, HELLO, user("so?")], "messages 2 and 3 are both the assistant's"),
        ([{"role": "robot", "content": "hi"}], "message 1 has role 'robot'"),
        ([user("hi"), {"role": "system", "content": "S"}, user("so?")], "message 2 has role 'system'"),
        ([user([{"type": "video", "video": 1}])], "message 1: expected .*type.*found dict"),
        ([np.zeros((4, 4))], r"must be uint8\[H W 3\], found float64\[4, 4\]"),
        ([Path("/no/such.png"), "hi"], "/no/such.png"),
        ([Image.new("RGB", (10_000, 10_000)), "hi"], "10000x10000 has more than 89,478,485 pixels"),
        ([Image.new("F", (4, 4)), "hi"], "floating-point pixels"),
        ([Image.new("RGB", (4, 4))] * 100, "100 images of 8 positions each.* reads 64 .*give at most 7"),
    ],
)
def test_prompts_that_are_refused(seeing, prompt, message):
    with pytest.raises(DataError, match=message):
        seeing.generate(prompt)


def test_a_model_without_eyes_reads_no_images(model):
    with pytest.raises(DataError, match="no vision tower"):
        model.generate([Image.new("RGB", (4, 4)), "what is it?"])


def test_what_the_model_reads_of_texts_and_images(seeing):
    red = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    made, _ = seeing.prompt(["before", red, "behind", np.full((2, 2, 3), 9, np.uint8)], 5)
    assert (
        "###Human: before <Img><ImageHere></Img> behind <Img><ImageHere></Img> ###Assistant:" in made.source
    )
    assert made.seed == 5
    row = seeing._session({"max_new_tokens": 4})._read(0, made)
    assert [image.max() for image in row.images] == [255, 9] and row.images[0].min() == 255, "on white"
    same, _ = seeing.prompt(
        [{"role": "system", "content": "S."}, user(["hi"]), HELLO, user([{"type": "text", "text": "so?"}])], 0
    )
    assert same.source == "S. ###Human: hi ###Assistant: hello. ###Human: so? ###Assistant:"


def test_a_photo_of_50_megapixels_is_read(seeing):
    made, _ = seeing.prompt([Image.new("RGB", (8_000, 6_250), "blue"), "what is it?"], 0)
    [image] = seeing._session({"max_new_tokens": 4})._read(0, made).images
    assert image.shape == (64, 64, 3) and (image[0, 0] == (0, 0, 255)).all()


def test_a_history_that_is_too_long_loses_its_oldest_turns_and_says_so(model):
    talk = dataclasses.replace(model.model, config=model.config.copy_and_resolve_references())
    talk.config.tuning.stage = "stage2"
    holder = MiniGPT5(talk)
    history = [turn for _ in range(8) for turn in (user("a large red circle at the top left"), HELLO)]
    answer = holder.generate([{"role": "system", "content": ""}, *history, user("why?")], max_images=0)
    assert any("the oldest turns did not fit" in note for note in answer.notes)
    talk.config.data.format = "shapes_dialogs"
    _, [note] = holder.prompt([*history, user("why?")], 0)
    assert note == "the last 3 of 17 messages were read, as in training"


def test_a_conversation_remembers(model, caplog):
    chat = model.chat(system="", seed=1)
    assert "stage 1, trained on single captions" in caplog.text
    first = chat.send("a red circle", max_images=0)
    with pytest.raises(DataError, match="is empty"):
        chat.send("")
    second = chat.send("a blue square", max_images=0)
    assert chat.answers == [first, second] and first.seed != second.seed
    said = [turn["role"] for turn in chat.messages if turn["role"] != "assistant"]
    assert said == ["system", "user", "user"] and chat.messages[1]["content"][0]["text"] == "a red circle"


def test_a_chat_as_transformers_writes_it(seeing, tmp_path):
    file = tmp_path / "photo.png"
    Image.new("RGB", (20, 20), "red").save(file)
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": "what?"}],
        },
    ]
    made, _ = seeing.prompt(chat)
    assert (
        made
        == seeing.prompt(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [file, "what?"]}]
        )[0]
    )
    assert seeing.prompt(file)[0] == seeing.prompt([file])[0], "one image alone"
    for content, message in (
        ([{"type": "text", "text": 3}], "message 1: expected"),
        ([{"type": "image", "image": str(tmp_path / "none.png")}], "none.png"),
    ):
        with pytest.raises((DataError, OSError), match=message):
            seeing.prompt([{"role": "user", "content": content}])
    with pytest.raises(DataError, match="the system prompt must be text"):
        seeing.prompt([{"role": "system"}, {"role": "user", "content": "hi"}])
