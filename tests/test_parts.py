"""A backbone, a mapper and a generator that the package has never heard of, one file each, and no other file.

This is the proof of "a variant is one file", and CONTRIBUTING's recipe is this test in words: the three files
below are written into a temporary package, named by their modules in a configuration, and then every part of
the program that trains, restores, generates, plans or exports is asked to work with them.
"""

from __future__ import annotations

import json
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from minigpt5_jax.config import ConfigError, apply_variant, choose, get_config, use_stage2, validate
from minigpt5_jax.evaluation.held_out import watchers
from minigpt5_jax.evaluation.verify import verify
from minigpt5_jax.export import export_torch
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.parts.contracts import FROZEN, find
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.weights.export.model import ExportError
from minigpt5_jax.wiring.feature_cache import open_features
from minigpt5_jax.wiring.features import prepare_features
from minigpt5_jax.wiring.generation import Request, generate_page
from minigpt5_jax.wiring.inputs import open_sources
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.restore import load_run, open_run
from minigpt5_jax.wiring.training import make_loop, parameter_table
from minigpt5_jax.wiring.weight_paths import check_sources
from minigpt5_jax.wiring.weights_plan import make_plan

WORDS, WIDTH, QUERIES, CHANNELS = 1000, 16, 3, 8  # the tokenizer of the oracle has 1000 pieces

BACKBONE = '''
"""A toy backbone: the state of a word is the mean of all words so far."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt5_jax.data.text.prompts import VICUNA_V0
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.models.common import normal, param, zeros
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.parts.contracts import STAGE2, Key, Origin, Part, Use
from minigpt5_jax.weights.table import LINEAR, Rule, Table


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    vocab_size: int = 1000
    hidden_size: int = 16

    @classmethod
    def from_hf(cls, config):
        return cls(**config)


class Words(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = param(rngs, normal(1.0), shape, ("vocab", "embed"), param_dtype)
        self.mix = param(rngs, normal(0.5), shape[1:] * 2, ("embed", None), param_dtype)


class Backbone(nnx.Module):
    image_tokens, image_size, max_positions, position_axes, voken_state_shift = 2, 8, 512, 1, 1
    uses_dropout = False

    def __init__(self, *, config, num_vokens, tuned, param_dtype, rngs):
        self.hidden_size, self.vocab_size, self.num_vokens = config.hidden_size, config.vocab_size, num_vokens
        self.words = Words(config, rngs=rngs, param_dtype=param_dtype)
        self.new = param(rngs, normal(1.0), (num_vokens + 1, config.hidden_size), (None, "embed"))
        if tuned:
            self.shift = param(rngs, zeros, (config.hidden_size,), ("embed",))

    @property
    def decoder(self):
        return self

    def _look_up(self, tokens):
        old = self.words.embedding[...][jnp.clip(tokens, 0, self.vocab_size - 1)]
        new = self.new[...][jnp.clip(tokens - self.vocab_size, 0, self.num_vokens)]
        return jnp.where((tokens < self.vocab_size)[..., None], old.astype(jnp.float32), new)

    def image_states(self, images):
        means = images.astype(jnp.float32).mean((1, 2)) / 255.0
        return jnp.stack([means, 1.0 - means], 1)

    def _place(self, embeds, states, row, start):
        wide = jnp.tile(states, (1, 1, self.hidden_size // 3 + 1))[..., : self.hidden_size]
        columns = start[:, None] + jnp.arange(self.image_tokens)
        return embeds.at[row[:, None], columns].set(wide.astype(embeds.dtype), mode="drop")

    def embed(self, batch):
        # Training gives a batch, decoding the ids alone.
        if not hasattr(batch, "tokens"):
            return self._look_up(batch)
        embeds = self._look_up(batch.tokens)
        states = self.image_states(batch.images) if batch.image_states is None else batch.image_states
        row = jnp.where(batch.image_mask, batch.image_row, embeds.shape[0])
        return self._place(embeds, states, row, batch.image_start) if states.shape[0] else embeds

    def prompt(self, tokens, images, image_row, image_start):
        embeds = self._look_up(tokens)
        if not images.shape[0]:
            return embeds
        return self._place(embeds, self.image_states(images), image_row, image_start)

    def _states(self, sums, counts):
        mean = sums / jnp.maximum(counts, 1.0)[..., None]
        return mean @ self.words.mix[...].astype(jnp.float32) + getattr(self, "shift", 0.0)

    def hidden(self, embeds, batch, dropout_keys=None):
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        seen = (same & jnp.tri(same.shape[1], dtype=bool)).astype(jnp.float32)
        return self._states(seen @ embeds, seen.sum(-1))

    def logit_blocks(self, hidden):
        return hidden @ self.words.embedding[...].astype(jnp.float32).T, hidden @ self.new[...].T

    def voken_rows(self):
        return self.new[...][: self.num_vokens]

    def init_cache(self, batch, max_length):
        return jnp.zeros((batch, self.hidden_size)), jnp.zeros(batch)

    def decode(self, inputs_embeds, *, positions, valid, cache):
        sums, counts = cache
        ours = jnp.where(valid[..., None], inputs_embeds, 0.0)
        sums, counts = sums[:, None] + jnp.cumsum(ours, 1), counts[:, None] + jnp.cumsum(valid, 1)
        return self._states(sums, counts), (sums[:, -1], counts[:, -1])

    def logits(self, hidden):
        return jnp.concatenate(self.logit_blocks(hidden), -1)


TOWER = Tower(
    WordsConfig,
    {"toy": WordsConfig()},
    Words,
    lambda *_: Table((Rule("words.weight", "embedding"), Rule("mix.weight", "mix", LINEAR))),
    marks=("words.",),
)
TOY = Origin("Toy words", ("model.safetensors",), 0.001, "none", elsewhere="a test", command="toy_words")


def make(keys, sizes, context):
    return {
        "config": sizes["toy_words"],
        "num_vokens": keys["num_vokens"],
        "tuned": keys["tuned"],
        "param_dtype": context.param_dtype,
    }


def tokenizer(find, keys, sizes, bos_id):
    rows = sizes["toy_words"].vocab_size
    return LlamaTokenizer(find("toy_pieces"), keys["num_vokens"], bos_id=bos_id, vocab_size=rows)


PART = Part(
    kind="backbone",
    name="toy",
    module=Backbone,
    make=make,
    keys={
        "toy_words": Key("toy", "preset, or source", choices=("toy", "source")),
        "num_vokens": Key(4, "vokens of an image", low=1),
        "tuned": Key(False, "a shift of all states, for stage 2"),
    },
    uses={
        "toy_words": Use("toy words", "make them in a test", TOY, "none", tower=TOWER, at="words/"),
        "toy_pieces": Use("pieces", "copy it", TOY, "none", beside="toy_words", file="tokenizer.model"),
    },
    tokenizer=tokenizer,
    tokenizer_use="toy_pieces",
    prompts=VICUNA_V0,
    offers=lambda sizes: {"hidden_size": sizes["toy_words"].hidden_size},
    trainable={"stage1": ((r"new", "llm"),), "stage2": ((r"new|shift", "llm"),)},
    sharding={"words/": {"vocab": "tensor"}},
    initial=lambda fresh, pretrained, keys, key: {"new": 0.5 * fresh["new"]},
    settings={STAGE2: {"tuned": True}},
)
'''

MAPPER = '''
"""A toy mapper: one matrix."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt5_jax.minigpt5 import Loss
from minigpt5_jax.models.common import normal, param
from minigpt5_jax.parts.contracts import Export, Key, Part
from minigpt5_jax.weights.formats.save import save_safetensors


class Mapper(nnx.Module):
    def __init__(self, *, hidden_size, condition_shape, scale, rngs):
        self.condition_shape, self.scale = condition_shape, scale
        queries, width = condition_shape
        self.kernel = param(rngs, normal(0.1), (hidden_size, queries * width), ("embed", "mlp"))
        self.bias = param(rngs, normal(0.1), (queries * width,), ("mlp",))

    def __call__(self, vokens):
        flat = self.scale * vokens.mean(1) @ self.kernel[...] + self.bias[...]
        return flat.reshape(-1, *self.condition_shape)


def make(keys, sizes, context):
    return {**context.neighbours, "scale": keys["scale"]}


def write(model, folder, *, dtype=None):
    named = {name: np.asarray(value) for name, value in model.below("mapper/").items()}
    save_safetensors(folder / "toy.safetensors", named)
    (folder / "config.json").write_text(json.dumps({"scale": model.made["mapper"]["scale"]}))
    return len(named)


PART = Part(
    kind="mapper",
    name="toy",
    module=Mapper,
    make=make,
    keys={"scale": Key(1.0, "of the states", low=0.0), "loss_size": Key(0.1, "weight of its own loss")},
    losses={
        "size": Loss(
            lambda batch, randomness, options: batch.item_mask,
            lambda model, outputs, batch: (jnp.square(outputs.condition).mean((1, 2)), {}),
        )
    },
    trainable={"stage1": ((r".*", "mapper"),), "stage2": ((r"bias", "frozen"), (r".*", "mapper"))},
    sharding={"": {"mlp": "fsdp"}},
    exports={"toy": Export(write, "its matrix")},
)
'''

GENERATOR = '''
"""A toy generator: latents are small images, and the condition is a colour."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt5_jax.diffusion.samplers import make_sampler
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.models.common import normal, param
from minigpt5_jax.models.tower import Tower
from minigpt5_jax.parts.contracts import Key, Origin, Part, Use
from minigpt5_jax.weights.table import Rule, Table


@dataclasses.dataclass(frozen=True)
class PaintConfig:
    width: int = 8
    queries: int = 3

    @classmethod
    def from_hf(cls, config):
        return cls(**config)


class Paint(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        self.letters = param(rngs, normal(1.0), (256, config.width), (None, None), param_dtype)
        self.colour = param(rngs, normal(1.0), (config.width, 3), (None, None), param_dtype)


class Captions:
    """Bytes of the caption."""

    def __init__(self, length):
        self.max_length = length

    def encode(self, texts):
        ids = np.zeros((len(texts), self.max_length), np.int32)
        for row, text in enumerate(texts):
            line = list(text.encode())[: self.max_length]
            ids[row, : len(line)] = line
        return ids, (ids > 0).astype(np.int32)

    def identity(self):
        return {"bytes": self.max_length}


class Generator(nnx.Module):
    num_train_timesteps = 1000

    def __init__(self, *, config, image_size, param_dtype, rngs):
        self.image_size, self.latent_shape = image_size, (image_size // 2, image_size // 2, 3)
        self.condition_shape = (config.queries, config.width)
        self.schedule = NoiseSchedule()
        self.paint = Paint(config, rngs=rngs, param_dtype=param_dtype)

    def moments(self, images):
        small = images.astype(jnp.float32).reshape(-1, *[n for s in self.latent_shape[:2] for n in (s, 2)], 3)
        mean = small.mean((2, 4)) / 127.5 - 1.0
        return jnp.concatenate([mean, jnp.full_like(mean, -30.0)], -1)

    def latents(self, moments, posterior_noise):
        return moments[..., :3]

    def caption_features(self, caption_ids, caption_mask):
        return self.paint.letters[...].astype(jnp.float32)[caption_ids] * caption_mask[..., None]

    def empty_caption_features(self):
        return jnp.zeros(self.condition_shape)

    empty_prompt_features = empty_caption_features

    def denoiser(self, condition):
        colour = jnp.tanh(condition.mean(1) @ self.paint.colour[...].astype(jnp.float32))

        def denoise(noisy, timestep):
            abar = jnp.asarray(self.schedule.alphas_cumprod)[timestep]
            abar = jnp.broadcast_to(abar, noisy.shape[:1])[:, None, None, None]
            return (noisy - jnp.sqrt(abar) * colour[:, None, None]) / jnp.sqrt(1.0 - abar)

        return denoise

    def denoising_loss(self, latents, condition, timesteps, noise):
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        return jnp.square(self.denoiser(condition)(noisy, timesteps) - noise).mean((1, 2, 3))

    def make_sampler(self, name, num_inference_steps):
        return make_sampler(name, self.schedule, num_inference_steps)

    def decode(self, latents):
        pixels = jnp.repeat(jnp.repeat(latents, 2, 1), 2, 2)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


TOWER = Tower(
    PaintConfig,
    {"toy": PaintConfig()},
    Paint,
    lambda *_: Table((Rule("letters", "letters"), Rule("colour", "colour"))),
)
TOY = Origin("Toy paint", ("model.safetensors",), 0.001, "none", elsewhere="a test", command="toy_paint")
PART = Part(
    kind="generator",
    name="toy",
    module=Generator,
    make=lambda keys, sizes, context: {
        "config": sizes["toy_paint"],
        "image_size": keys["image_size"],
        "param_dtype": context.param_dtype,
    },
    keys={
        "toy_paint": Key("toy", "preset, or source", choices=("toy", "source")),
        "image_size": Key(8, "side in pixels", low=2),
    },
    uses={"toy_paint": Use("toy paint", "make it in a test", TOY, "none", tower=TOWER, at="paint/")},
    tokenizer=lambda find, keys, sizes, bos_id: Captions(sizes["toy_paint"].queries),
    offers=lambda sizes: {"condition_shape": (sizes["toy_paint"].queries, sizes["toy_paint"].width)},
    features={"toy_paint": ("paint/",)},
    samplers=("ddim", "dpm_solver++"),
)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The three files in a package of their own, importable while the module's tests run."""
    root = tmp_path_factory.mktemp("package")
    folder = root / "toy_parts"
    folder.mkdir()
    for name, source in (("backbone", BACKBONE), ("mapper", MAPPER), ("generator", GENERATOR)):
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    (folder / "__init__.py").touch()
    sys.path.insert(0, str(root))
    yield "toy_parts"
    sys.path.remove(str(root))


@pytest.fixture(scope="module")
def files(tmp_path_factory, oracle_dir):
    """Weights of the toy towers, and captions with images."""
    root, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    (root / "words").mkdir()
    tensors = {"words.weight": draw(WORDS, WIDTH), "mix.weight": draw(WIDTH, WIDTH)}
    save_file(tensors, root / "words/model.safetensors")
    pieces = (oracle_dir / "tokenizer_llama/tokenizer.model").read_bytes()
    (root / "words/tokenizer.model").write_bytes(pieces)
    save_file({"letters": draw(256, CHANNELS), "colour": draw(CHANNELS, 3)}, root / "paint.safetensors")
    lines = []
    for number in range(16):
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        Image.new("RGB", (10, 8), colour).save(root / f"{number}.png")
        lines.append({"caption": f"a colour of kind {number}", "image": f"{number}.png"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talk = {
        "turns": [
            {
                "role": "user",
                "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "and now?"}],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "look"}, {"type": "image", "path": "1.png"}],
            },
        ]
    }
    (root / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 8)
    (root / "talk.jsonl").write_text(json.dumps({"turns": talk["turns"][:1]}) + "\n")
    return root


def configure(package, files, workdir, data):
    """Stage 1 of the toy model on a JSONL file, two steps."""
    config = get_config()
    for kind in ("backbone", "mapper", "generator"):
        choose(config, kind, f"{package}.{kind}")
    config.model.update(dtype="float32", param_dtype="float32", remat="none")
    config.weights.update(toy_words=str(files / "words"), toy_paint=str(files / "paint.safetensors"))
    config.data.update(
        format="jsonl",
        train=str(files / data),
        validation=str(files / data),
        global_batch=8,
        max_length=64,
        worker_count=0,
        max_images=1,
        flip_mode="off",
    )
    config.run.update(
        workdir=str(workdir),
        num_steps=2,
        eval_every=1,
        eval_batches=1,
        save_every=1,
        grid_every=1,
        compile_cache="",
        log_every=1,
    )
    config.optimizer.update(warmup_steps=1, lr_llm=1e-2, lr_mapper=1e-2)
    config.inference.update(num_inference_steps=2, max_new_tokens=8, top_k=0)
    config.mesh.update(data=1, fsdp=4, tensor=2)
    return config


@pytest.fixture(scope="module")
def stage1(package, files, tmp_path_factory):
    """(workdir, last validation) of a first stage."""
    workdir = tmp_path_factory.mktemp("stage1")
    loop = make_loop(validate(configure(package, files, workdir, "pairs.jsonl")), watchers)
    return workdir, loop.run()


def test_a_configuration_holds_the_keys_of_its_parts(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    assert set(config.weights.keys()) == {"toy_words", "toy_pieces", "toy_paint"}
    assert config.inference.sampler == "ddim", "the generator's first, as it has no PNDM"
    with pytest.raises(ConfigError, match="is not one of 'ddim', 'dpm_solver..'"):
        config.inference.sampler = "pndm"
        validate(config)
    with pytest.raises(ConfigError, match="is a mapper, not a generator"):
        choose(config, "generator", f"{package}.mapper")
    with pytest.raises(ConfigError, match="unknown mapper 'toy_parts.none'"):
        apply_variant(config, f"mapper={package}.none")


def test_a_backbone_that_does_not_read_trees_is_told_from_one_that_does(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    config.data.update(packing="tree", format="vist")
    with pytest.raises(ConfigError, match="does not read trees .*; set data.packing=shuffled"):
        validate(config)
    config.data.packing = "shuffled"  # the remedy
    validate(config)


def test_a_parts_own_loss_alone_is_enough_to_train_on(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    config.loss.update(text=0.0, image=0.0, caption=0.0)
    validate(config)
    config.model.mapper.loss_size = 0.0
    with pytest.raises(ConfigError, match="are all 0; there is nothing to train on"):
        validate(config)


def test_a_missing_file_is_named_with_the_parts_own_words(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    config.weights.toy_paint = ""
    with pytest.raises(ConfigError, match=r"weights.toy_paint: not given\n +make it in a test"):
        check_sources(config)


def test_it_trains_validates_draws_and_saves(stage1, package):
    workdir, validation = stage1
    expected = {"text", "image", "caption", "size", "image_unconditional", "voken_emission"}
    assert expected <= validation.keys(), "the mapper's own loss is among them"
    assert all(np.isfinite(value) for value in validation.values())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and len(set(losses)) == 2
    assert sorted(path.name for path in (workdir / "images").iterdir())[-1] == "held_out_000002.png"
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps == [1, 2]
    spec = open_run(workdir).spec
    trained = {path for path, group in spec.labels.items() if group != FROZEN}
    assert trained == {"backbone/new", "mapper/kernel", "mapper/bias"}
    assert "backbone/words" in parameter_table(spec) and "generator/paint" in parameter_table(spec)


def test_a_run_that_never_evaluates_reads_no_held_out_batch(package, files, tmp_path):
    config = configure(package, files, tmp_path / "run", "pairs.jsonl")
    config.run.update(eval_every=0, grid_every=0)
    loop = make_loop(validate(config), watchers)
    assert loop.validate is None and loop.grid is None


def test_it_resumes(stage1, package, files, tmp_path):
    """Three steps at once, and two with a third behind a restart, end in the same numbers."""
    import shutil

    config = configure(package, files, tmp_path / "whole", "pairs.jsonl")
    config.run.update(num_steps=3, save_every=3, grid_every=0, eval_every=0)
    # The rate falls to the last step, so the stopped run is one of three steps as well.
    stopped = configure(package, files, tmp_path / "part", "pairs.jsonl")
    stopped.run.update(num_steps=3, save_every=2, grid_every=0, eval_every=0)
    make_loop(validate(config)).run()
    loop = make_loop(validate(stopped))
    loop.num_steps = 2
    loop.run()
    again = make_loop(validate(stopped))
    assert again.first_step == 2
    again.run()
    whole, part = (load_run(tmp_path / name).params for name in ("whole", "part"))
    for path, value in whole.items():
        np.testing.assert_array_equal(value, part[path], err_msg=path)
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def stage2(stage1, package, files, tmp_path_factory):
    """Workdir of a second stage that starts from the first."""
    workdir = tmp_path_factory.mktemp("stage2")
    config = configure(package, files, workdir, "talks.jsonl")
    use_stage2(config)
    config.data.update(global_batch=8, accumulation=1, max_length=128, max_targets=16)
    config.run.update(num_steps=2, init_from=str(stage1[0]), save_every=2, grid_every=0, eval_every=2)
    config.data.error_budget = 0.0
    make_loop(validate(config), watchers).run()
    return workdir


def test_a_second_stage_starts_from_the_first(stage1, stage2):
    first, second = load_run(stage1[0]), load_run(stage2)
    assert second.config.model.backbone.tuned, "the part's own setting for stage 2"
    trained = {path for path, group in second.spec.labels.items() if group != FROZEN}
    assert trained == {"backbone/new", "backbone/shift", "mapper/kernel"}
    np.testing.assert_array_equal(first.params["mapper/bias"], second.params["mapper/bias"])
    assert not np.array_equal(first.params["mapper/kernel"], second.params["mapper/kernel"])
    assert open_run(stage2).stage == 2


def test_other_frozen_weights_are_refused(stage1, files, tmp_path):
    tensors = load_file(files / "paint.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"frozen.generator/paint"):
        load_run(stage1[0], weights={"toy_paint": str(tmp_path / "other.safetensors")})


def test_it_generates(stage2, files, tmp_path):
    run = open_run(stage2, inference={"force_image": "first"})
    session = run.session(batch_size=2)
    prompt = "<Img><ImageHere></Img> and now?"
    alone, other = session.generate([Prompt(prompt, (str(files / "2.png"),), 3), Prompt("a colour", (), 4)])
    assert alone.images[0].shape == other.images[0].shape == (8, 8, 3)
    [again] = session.generate([Prompt(prompt, (str(files / "2.png"),), 3)])
    assert again.token_ids == alone.token_ids and np.array_equal(again.images[0], alone.images[0])
    page = generate_page(run, Request(texts=["a colour"]), tmp_path / "page")
    assert "a colour" in page.read_text()
    page = generate_page(run, Request(mode="chat", jsonl=str(files / "talk.jsonl")), tmp_path / "chat")
    assert "and now?" in page.read_text() and (tmp_path / "chat/conversations.jsonl").is_file()


def test_its_checkpoint_is_verified(stage1):
    """By the protocols alone: the toy generator predicts the noise that it was given."""
    report = verify(stage1[0])
    assert report.forced and report.correlation > 0.9 and "all finite" in str(report)


def test_its_weights_are_planned(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    plan = make_plan(config)
    assert "Toy words" in plan and "2 tensors fit, 0 ignored" in plan and "is on disk and fits" in plan
    config.weights.toy_paint = ""
    plan = make_plan(config)
    assert "weights.toy_paint: not given" in plan and "--config.weights.toy_paint=weights/toy_paint" in plan


def test_its_mapper_is_exported(stage1, tmp_path):
    result = export_torch(stage1[0], tmp_path / "out", to="toy")
    assert result.tensors == 2 and set(result.files) == {"toy.safetensors", "config.json"}
    exported = load_file(tmp_path / "out/toy.safetensors")
    np.testing.assert_array_equal(exported["kernel"], load_run(stage1[0]).params["mapper/kernel"])
    with pytest.raises(ExportError, match=r"no format 'diffusers' \(stable_diffusion has\); .*: toy$"):
        export_torch(stage1[0], tmp_path / "sd", to="diffusers")


def test_its_features_are_precomputed(package, files, tmp_path):
    config = configure(package, files, tmp_path, "pairs.jsonl")
    config.data.max_images = 0
    source, _ = open_sources(config, build(config).sizes)
    config.data.features = str(tmp_path / "store")
    made = len({source[i].target_image for i in range(16)})
    assert f"features of {made} images" in prepare_features(config, source, tmp_path / "store")
    store = open_features(config, build(config), source)[0].store
    assert store.complete and len(store) == made and store.spec.target == (4, 4, 6)


def test_parts_are_found_by_their_files():
    assert find("mapper", "decoder_only").name == "decoder_only"
    with pytest.raises(ValueError, match="unknown mapper 'gill'; known: decoder_only, encoder_decoder"):
        find("mapper", "gill")
    with pytest.raises(ValueError, match="unknown part 'decoder'"):
        find("decoder", "toy")


def test_a_module_that_is_no_part_is_told_from_one_that_is_broken(tmp_path, monkeypatch):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/__init__.py").write_text("")
    (tmp_path / "odd/no_part_here.py").write_text("")
    (tmp_path / "odd/broken_part.py").write_text("import math\nmath.no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="odd.no_part_here has no PART; see minigpt5_jax/parts/contracts.py"):
        find("mapper", "odd.no_part_here")
    with pytest.raises(AttributeError, match="no_such_name"):
        find("mapper", "odd.broken_part")
