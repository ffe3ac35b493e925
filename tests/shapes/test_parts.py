"""Backbones just made: written and read as the real ones, and measured by the commands' functions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.parts.backbones.minigpt4 import MiniGPT4
from minigpt5_jax.shapes.backbones import describe, pretrain, train_llama, train_vision
from minigpt5_jax.shapes.backbones.tokenizers import write_llama_tokenizer
from minigpt5_jax.shapes.render import render
from minigpt5_jax.shapes.wording import understand
from minigpt5_jax.shapes.world import Object, Scene, draw_scene

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Untrained eyes and language model, stored."""
    folder = tmp_path_factory.mktemp("assets")
    train_vision.write(folder, train_vision.template().init(jax.random.key(0)))
    train_llama.write(folder, train_llama.template().init(jax.random.key(1)))
    write_llama_tokenizer(folder / "llama/tokenizer.model", texts=200)
    return folder


def test_eyes_and_projection_are_those_of_the_backbone(assets):
    _, tongue = train_llama.read(assets)
    eyes = train_vision.read_eyes(assets)
    whole = Template.of(
        lambda rngs: MiniGPT4(
            llm=train_llama.CONFIG, vit=train_vision.VIT, qformer=train_vision.QFORMER, rngs=rngs
        )
    )
    assert whole.shapes.keys() == (tongue | eyes).keys()
    images = render([draw_scene(np.random.default_rng(i), count=2) for i in range(3)])
    theirs = jax.jit(lambda p, x: whole.bind(p).project(whole.bind(p).image_states(x)))(tongue | eyes, images)
    ours = train_vision.make_look(eyes, size=2)(images)
    ours = ours @ np.asarray(tongue["llama_proj/kernel"]) + np.asarray(tongue["llama_proj/bias"])
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-4)


def test_untrained_towers_describe_nothing(assets):
    scenes = [draw_scene(np.random.default_rng(i), count=1 + i % 3) for i in range(3)]
    texts = describe.descriptions(assets, scenes)
    assert len(texts) == 3 and all(isinstance(text, str) for text in texts)


def test_writing_on_is_what_repeated_reading_gives(assets):
    tokenizer = LlamaTokenizer(assets / "llama/tokenizer.model")
    template, params = train_llama.read(assets)
    look = train_vision.make_look(train_vision.read_eyes(assets), size=2)
    random = np.random.default_rng(0)
    scenes = [draw_scene(random, count=n) for n in (1, 3)]
    samples = [
        train_llama.Sample("<Img><ImageHere></Img> " + "what is there? " * n, "", (scene,))
        for n, scene in enumerate(scenes, 1)
    ]
    made = train_llama.make_rows(tokenizer, samples, 40, 2, train_vision.QFORMER.num_query_tokens)
    rows = train_llama.with_states(*made, look)
    written = describe.write_on(template, params, rows, 4)

    @jax.jit
    def logits(params, rows):
        model = template.bind(params)
        return model.llm.logit_blocks(model(rows, jnp.zeros((*rows["ids"].shape, 128))))[0]

    for step in range(4):
        sizes = rows["valid"].sum(1)
        likely = np.asarray(logits(params, rows))[np.arange(2), sizes - 1].argmax(-1)
        assert (written[:, step] == likely).all()
        rows["ids"][np.arange(2), sizes], rows["valid"][np.arange(2), sizes] = likely, 1


def test_attributes_are_counted_place_by_place():
    scene = Scene(0, (Object(0, 0, 0, 0, 0), Object(1, 1, 1, 1, 3)))
    whole = (
        "a small solid red circle in the top left and a large striped green square in the bottom right"
        " on a white background"
    )
    assert describe.attributes_right(understand(whole), scene) == (11, 11)
    assert describe.attributes_right(understand(whole.replace("red", "blue")), scene) == (10, 11)
    assert describe.attributes_right(understand("a red circle"), scene) == (0, 11)
    assert describe.attributes_right(understand(whole + " and a star"), scene) == (11, 12)


def test_parts_are_trained_in_the_order_they_need():
    assert pretrain.parts_of("llama, vision") == ["vision", "llama"]
    with pytest.raises(ValueError, match="unknown part 'ear'; known: vae, text, unet, vision, llama"):
        pretrain.parts_of("vision,ear")


def test_the_run_file_has_what_pretrain_asks_for():
    spec = importlib.util.spec_from_file_location("shapes_backbones", ROOT / "configs/shapes_backbones.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert pretrain.parts_of(config.parts) == list(pretrain.PARTS)
    assert {"out", "work", "seed", "images", "steps"} <= set(config)
    assert set(pretrain.PARTS) <= set(config.steps) and min(config.steps.values()) > 0


def test_a_fit_goes_on_only_on_the_towers_it_was_made_on(assets, tmp_path):
    job = pretrain.Job(assets, tmp_path, seed=0, steps=ConfigDict(), images=1)
    first = job.kept("vit", "qformer")
    assert first.parent == job.kept() == tmp_path and first == job.kept("vit", "qformer")
    path = assets / "qformer/config.json"
    text = path.read_text()
    path.write_text(text + "\n")
    assert job.kept("vit", "qformer") != first
    path.write_text(text)
    with pytest.raises(FileNotFoundError, match="train that part first"):
        job.kept("text_encoder")
