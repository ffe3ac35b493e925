"""Sessions: prompts to interleaved parts, images read and drawn, batches, compiled programs, bad input."""

from __future__ import annotations

import dataclasses
import functools
import io
import re

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.templates import IMAGE
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.diffusion.samplers import make_sampler
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.inference.conversation import Conversation, ImagePart, Message, continue_story
from minigpt5_jax.inference.images import initial_latents, sample_images
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.inference.session import Prompt, Session, _keys, stop_sequences
from minigpt5_jax.minigpt5 import make_template
from minigpt5_jax.models.clip_text.model import ClipTextConfig
from minigpt5_jax.models.eva_vit.model import EvaVitConfig
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.mapper.model import MapperConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet.model import UNetConfig
from minigpt5_jax.models.vae.model import VaeConfig
from minigpt5_jax.training.sharding import lay_out, make_mesh

IMG0 = 1000
# Compiling is most of the time here: unoptimised code is ready sooner.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_small_template(configs, *, sees=True):
    """A composite of the oracle tokenizer's vocabulary that draws 16 pixels."""
    llm = LlamaConfig(1000, 32, 48, 2, 4)
    vit = EvaVitConfig(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    qformer = dataclasses.replace(
        QFormerConfig.from_hf(
            configs["qformer_bert"],
            encoder_hidden_size=16,
            num_query_tokens=4,
            cross_attention_frequency=2,
        ),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    text = dataclasses.replace(
        ClipTextConfig.from_hf(configs["sd_text_encoder"]), vocab_size=64, max_position_embeddings=12
    )
    blocks = {"block_out_channels": [16, 32], "attention_head_dim": [2, 4], "layers_per_block": 1}
    unet = UNetConfig.from_hf(
        configs["unet"]
        | blocks
        | {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    )
    vae = VaeConfig.from_hf(
        configs["vae"]
        | {
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        }
    )
    mapper = MapperConfig(
        llm_hidden_size=32,
        d_model=32,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=64,
        num_queries=12,
    )
    return make_template(
        ("minigpt4", {"llm": llm, **({"vit": vit, "qformer": qformer} if sees else {}), "num_vokens": 8}),
        ("encoder_decoder", {"config": mapper}),
        (
            "stable_diffusion",
            {
                "unet": unet,
                "vae": vae,
                "text_encoder": text,
                "image_size": 16,
                "schedule": NoiseSchedule.from_hf(configs["scheduler"]),
                "empty_caption_ids": (62, 63) + (0,) * 10,
            },
        ),
    )


@pytest.fixture(scope="module")
def tokenizer(oracle_dir):
    return LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")


@pytest.fixture(scope="module")
def seeing(oracle_configs):
    """(template, parameters); logits wide enough that sampled texts differ."""
    template = make_small_template(oracle_configs)
    random = np.random.default_rng(0)

    def leaf(path, shape):  # drawn by numpy: nothing to compile
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        size = 4.0 if "lm_head" in path else np.prod(shape[:-1] or (2500,)) ** -0.5
        return (size * random.standard_normal(shape)).astype(np.float32)

    return template, {path: leaf(path, s.shape) for path, s in template.shapes.items()}


@pytest.fixture(scope="module")
def make(seeing, tokenizer, oracle_configs):
    sampler = make_sampler("ddim", NoiseSchedule.from_hf(oracle_configs["scheduler"]), 2)

    def make(force_image="after_text", max_new_tokens=6, params=seeing[1], **settings):
        sampling = SamplingConfig(
            force_image=force_image, max_new_tokens=max_new_tokens, stop_sequences=stop_sequences(tokenizer)
        )
        settings = {"batch_size": 2, "guidance_scale": 3.0, "max_length": 48, **settings}
        session = Session(seeing[0], params, tokenizer, sampler=sampler, sampling=sampling, **settings)
        session._write, session._draw = quick(session._write_rows), quick(session._draw_images)
        return session

    return make


@pytest.fixture(scope="module")
def session(make):
    return make()


def png(seed: int, size=(40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def compiled(session: Session) -> tuple[int, int]:
    return session._write._cache_size(), session._draw._cache_size()


def equal(one, other) -> bool:
    """Same ids, and images that differ by rounding at most."""
    return one.token_ids == other.token_ids and all(
        np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(one.images, other.images)
    )


def test_an_answer_is_a_function_of_prompt_and_seed(session):
    prompts = [Prompt("a red lighthouse", seed=3), Prompt("near the sea", seed=3), Prompt("a dog", seed=9)]
    answers = session.generate(prompts)  # batches of 2 and 1
    assert compiled(session) == (1, 1)
    assert [answer.source for answer in answers] == [prompt.source for prompt in prompts]
    for prompt, answer in zip(prompts, answers):
        assert len(answer.images) == 1 and answer.token_ids.count(IMG0) == 1
        assert answer.images[0].shape == (16, 16, 3) and answer.images[0].dtype == np.uint8
        assert answer.seed == prompt.seed and answer.dropped == 0
        assert equal(session.generate([prompt])[0], answer)
    assert len({answer.token_ids for answer in answers}) == 3
    again = session.generate([dataclasses.replace(prompts[0], seed=4)])[0]
    assert again.token_ids != answers[0].token_ids
    assert np.abs(again.images[0].astype(int) - answers[0].images[0]).max() > 5
    assert compiled(session) == (1, 1), "prompts of one bucket share the programs"


def test_rows_and_images_are_spread_over_a_mesh(session, seeing, make, monkeypatch):
    """The same tokens and images; each device has a row of the cache and an image of its own."""
    template, params = seeing
    monkeypatch.setattr("minigpt5_jax.training.sharding.LARGE", 512)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layout = lay_out(template.shapes, template.axes, (), mesh, tiny.sharding(), frozen="fsdp")
    placed = {path: jax.device_put(value, layout.stored[path]) for path, value in params.items()}
    spread, programs = make(params=placed, batch_size=7), []
    assert spread.batch_size == 8

    def kept(jitted):
        def call(*args):
            programs.append(jitted.lower(*args).compile())
            return programs[-1](*args)

        return call

    spread._write, spread._draw = kept(spread._write), kept(spread._draw)
    prompts = [Prompt(f"a red lighthouse {IMAGE}", (png(n),), seed=n) for n in range(8)]
    answers = spread.generate(prompts)
    assert all(map(equal, answers, session.generate(prompts)))
    write, draw = programs
    assert write.output_shardings.tokens.spec[0] == ("data", "fsdp")
    assert draw.output_shardings.spec[0] == ("data", "fsdp", "tensor")
    # A cache is [layers, rows, heads, slots, width]: of 8 rows and 4 heads a device has 2 and 2 at most.
    slots = 32 + spread.sampling.max_new_tokens + 7 * spread.sampling.max_images
    caches = re.findall(rf"f32\[2,(\d+),(\d+),{slots},8\]", write.as_text())
    assert ("2", "2") in caches and {rows for rows, _ in caches} == {"2"}


def test_answers_without_their_images_sample_none(session, make):
    prompt = Prompt("a red lighthouse", seed=3)
    whole, written = session.generate([prompt])[0], session.generate([prompt], images=False)[0]
    assert written.token_ids == whole.token_ids and IMG0 in written.token_ids
    assert written.images == () and written.text == whole.text and len(whole.images) == 1
    alone = make()
    alone.generate([prompt], images=False)
    assert compiled(alone) == (1, 0)


def test_parts_are_in_the_order_they_were_written(session, tokenizer):
    row = session._read(0, Prompt("a dog"))
    first, second = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    words = tokenizer.encode("the sea")
    ids = [*words, IMG0, *tokenizer.encode("a red dog###"), IMG0, 835, 2]
    answer = session._assemble(row, ids, 2, iter([first, second]))
    assert answer.parts[0] == "the sea" and answer.parts[2] == "a red dog" and len(answer.parts) == 4
    assert answer.parts[1] is first and answer.parts[3] is second
    assert answer.text == "the sea a red dog" and answer.token_ids == tuple(ids)
    stray = session._assemble(row, [IMG0 + 3, *words, IMG0, 1], 0, iter([]))
    assert stray.parts == ("the sea",), "ids that mean nothing leave no trace"
    assert session._assemble(row, [835], 0, iter([])).parts == ()


def test_text_ends_at_the_image_or_has_none(make):
    off = make(force_image="off", max_new_tokens=3)
    off.sampling = dataclasses.replace(off.sampling, max_images=0)
    answer = off.generate([Prompt("a red lighthouse near the sea")])[0]
    assert answer.images == () and answer.parts in ((answer.text,), ())
    assert compiled(off) == (1, 0), "nothing is drawn for nobody"


def test_images_in_the_prompt_are_seen(session):
    source = f"look: {IMAGE} and {IMAGE} what next"
    one, two = png(1), png(2)

    def ask(*images):
        return session.generate([Prompt(source, images, seed=1), Prompt("a dog", seed=2)])

    answers = [ask(one, two), ask(one, two), ask(two, one), ask(one, one)]
    states = [answer[0].images[0].astype(int) for answer in answers]
    assert equal(answers[0][0], answers[1][0])
    for other in (2, 3):
        assert not equal(answers[0][0], answers[other][0]) or np.any(states[0] != states[other])
        assert equal(answers[0][1], answers[other][1]), "the text-only row sees no image"


def test_a_long_prompt_loses_its_oldest_part(session, caplog):
    tail = " ".join(["a red dog near the sea"] * 20)
    with caplog.at_level("WARNING"):
        cut = session.generate([Prompt("lighthouse " + tail, seed=5), Prompt("dog " + tail, seed=5)])
    assert cut[0].dropped > 0 and "dropped" in caplog.text
    assert equal(*cut), "both end alike in what fits"


def test_guidance_is_away_from_the_chosen_negative(session, make, seeing):
    vokens = [np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)]
    zero = session.draw(vokens, [0], [0])[0]
    other = make(cfg_negative="empty_prompt").draw(vokens, [0], [0])[0]
    assert np.abs(zero.astype(int) - other).max() > 5
    assert (session.draw(vokens, [0], [1])[0] != zero).any(), "each image of an answer has its own noise"
    # T(0) against itself: guidance has no effect.
    still = [np.zeros((8, 32), np.float32)]
    plain = make(guidance_scale=1.0).draw(still, [0], [0])[0]
    assert np.abs(session.draw(still, [0], [0])[0].astype(int) - plain).max() <= 1


def test_the_empty_prompt_is_unmasked_and_the_caption_target_is_not(make, seeing):
    template, params = seeing

    def features(params):
        generator = template.bind(params).generator
        return generator.empty_prompt_features(), generator.empty_caption_features()

    prompt, caption = quick(features)(params)
    assert prompt.shape == caption.shape == (12, 32) and prompt.dtype == caption.dtype == np.float32
    np.testing.assert_allclose(prompt[:2], caption[:2], atol=1e-5)  # causal: BOS and EOS see no padding
    assert np.abs(prompt[2:] - caption[2:]).max(1).min() > 0.01
    # At scale 0 a session draws from its negative alone: what the generator makes of that condition.
    alone = make(cfg_negative="empty_prompt", guidance_scale=0.0)
    drawn = alone.draw([np.zeros((8, 32), np.float32)], [0], [0])[0].astype(int)

    @quick
    def draw(params, condition, seed):
        generator = template.bind(params).generator
        keys = jax.random.fold_in(_keys(seed)[1], 0)[None]
        latents = initial_latents(keys, generator.latent_shape)
        return sample_images(generator, alone._sampler, condition[None], condition[None], latents, 1.0)[0]

    assert np.abs(drawn - draw(params, prompt, np.uint32(0))).max() <= 1
    assert np.abs(drawn - draw(params, caption, np.uint32(0))).max() > 1


def test_stories_read_their_own_images_and_go_the_same_way_in_any_batch(session, make):
    draw, session = session._draw, make(max_length=160)
    session._draw = draw  # the same program: longer prompts change nothing in it

    def begun():
        return [
            Conversation(name, seed, [Message("user", ("we left", ImagePart(png(seed))))])
            for name, seed in (("a", 1), ("b", 2), ("c", 3))
        ]

    among, alone = begun(), begun()[1]
    continue_story(session, among, scenes=2)
    continue_story(session, [alone], scenes=2)
    for one, other in zip(alone.answers, among[1].answers):
        assert equal(one, other) and one.source == other.source
    assert among[0].answers[1].source.count(IMAGE) == 2 and not among[0].answers[1].dropped
    blank = begun()[0]
    continue_story(session, [blank], scenes=1)
    blank.messages[-1] = Message("assistant", (blank.answers[0].text, ImagePart(png(77))))
    continue_story(session, [blank], scenes=1)
    one, other = blank.answers[1], among[0].answers[1]
    assert one.token_ids != other.token_ids or (one.images[0] != other.images[0]).any(), (
        "the second scene saw the first one's image"
    )


@pytest.mark.parametrize(
    "prompt, reason",
    [
        (Prompt(" "), "is empty"),
        (Prompt("a dog [IMG0]"), r"\[IMG0\]"),
        (Prompt("a dog <ImageHere>"), "1 <ImageHere> for 0 images"),
        (Prompt("a dog", (b"x",)), "0 <ImageHere> for 1 images"),
        (Prompt("a dog", seed=-1), "seed -1"),
        (Prompt("a dog <ImageHere>", ("no/such.png",)), "no/such.png"),
        (Prompt("a dog <ImageHere>", (b"not an image",)), "no known image format"),
    ],
)
def test_bad_prompts_are_refused_before_anything_compiles(make, prompt, reason):
    session = make()
    with pytest.raises(DataError, match=reason):
        session.generate([Prompt("a dog"), prompt])
    assert compiled(session) == (0, 0)


def test_a_model_that_does_not_fit_says_so(tiny_template, tokenizer, oracle_configs):
    sampler = make_sampler("ddim", NoiseSchedule.from_hf(oracle_configs["scheduler"]), 2)
    with pytest.raises(ValueError, match="1000 ids before"):
        Session(tiny_template, {}, tokenizer, sampler=sampler)
    blind = Session(make_small_template(oracle_configs, sees=False), {}, tokenizer, sampler=sampler)
    with pytest.raises(DataError, match="no vision tower"):
        blind.generate([Prompt("see <ImageHere>", (png(1),))])


def test_settings_out_of_range_are_named(make):
    with pytest.raises(ValueError, match="cfg_negative='zero'"):
        make(cfg_negative="zero")
    with pytest.raises(ValueError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match=r"max_length=2040 and an answer of 13 .*exceed.* 2048 positions"):
        make(max_length=2040)


def test_stop_sequences_of_a_tokenizer(tokenizer):
    stops = stop_sequences(tokenizer)
    assert stops[0] == (835,) == tuple(tokenizer.encode("###"))
    glued = tokenizer.encode("the sea###")
    assert any(tuple(glued[-len(stop) :]) == stop for stop in stops[1:])


def test_no_prompts_no_answers(session):
    assert session.generate([]) == []
    assert session.draw([], [], []) == []
