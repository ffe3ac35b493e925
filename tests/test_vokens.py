"""Other numbers of vokens than eight, from the words of a sample to an image (the papers' Figure 6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from minigpt5_jax.batch import Batch
from minigpt5_jax.data.batches.collate import collate
from minigpt5_jax.data.batches.encode import EncodeConfig, encode
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.text.templates import IGNORE, target_text
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer
from minigpt5_jax.diffusion.samplers import make_sampler
from minigpt5_jax.diffusion.schedule import NoiseSchedule
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.inference.session import Prompt, Session, stop_sequences
from minigpt5_jax.minigpt5 import LossOptions
from minigpt5_jax.training.optimizer import make_optimizer
from minigpt5_jax.training.state import init_state
from minigpt5_jax.training.step import StepOptions, make_train_step
from minigpt5_jax.training.tuning import FROZEN, label_parameters

V, END = 1000, "###"  # of the oracle's tokenizer
CAPTIONS = ("a red dog", "the lake near the sea", "a dog")


def make_batch(oracle_dir, images, count: int) -> tuple[Batch, LlamaTokenizer]:
    """A stage-1 batch as the data pipeline makes it."""
    tokenizer = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model", count)
    config = EncodeConfig(tokenizer, ClipTokenizer(oracle_dir / "tokenizer_clip", 12))
    spec = BatchSpec(
        rows=3,
        length=40,
        items=3,
        images=0,
        targets=3,
        image_size=0,
        target_size=16,
        caption_length=12,
        num_vokens=count,
        image_tokens=0,
    )
    target = target_text("", draws=True, num_vokens=count)
    samples = [
        encode(Example(c, target, (), p, c, "cc3m", c, "f:1"), config, spec, (0, 0, 0))
        for c, p in zip(CAPTIONS, images, strict=True)
    ]
    numbers = np.arange(3)[:, None]
    return Batch(**collate([[sample] for sample in samples], spec, numbers, config)), tokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [str(folder / f"{i}.png") for i in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize(
    "count, labels",
    # Fidelity 2.2: the slice behind [IMG0] ends one short, so the last voken stays a target.
    [(1, [V]), (2, [V, V + 1]), (4, [V, V + 3]), (16, [V, V + 15])],
)
def test_data(oracle_dir, images, count, labels):
    batch, tokenizer = make_batch(oracle_dir, images, count)
    [end] = tokenizer.encode(END)
    for row, caption in enumerate(CAPTIONS):
        start = 1 + len(tokenizer.encode(caption))
        assert batch.voken_start[row] == start
        assert batch.tokens[row, start : start + count + 1].tolist() == [*range(V, V + count), end]
        assert [label for label in batch.labels[row] if label != IGNORE] == [*labels, end]
        places = batch.label_positions[row]
        assert batch.labels[row, places[places > 0]].tolist() == [*labels, end]
        assert (batch.segment_ids[row] > 0).sum() == start + count + 1


@pytest.fixture(scope="module", params=[(1, "decoder_only"), (16, "encoder_decoder")], ids=str)
def model(request, oracle_dir, images):
    """(number of vokens, template, parameters, batch, tokenizer); 16 are more than the 12 queries."""
    count, mapper = request.param
    batch, tokenizer = make_batch(oracle_dir, images, count)
    template = tiny.make_tiny_template(V, 528, count, mapper)
    return count, template, tiny.make_tiny_params(template), batch, tokenizer


def test_a_train_step(model):
    count, template, params, batch, _ = model
    labels = label_parameters(template.shapes, tiny.rules("stage1"))
    trainable = {path: jnp.array(params[path]) for path in labels if labels[path] != FROZEN}
    frozen = {path: value for path, value in params.items() if labels[path] == FROZEN}
    rates = {group: optax.constant_schedule(1e-2) for group in ("llm", "mapper")}
    optimizer = make_optimizer(labels, rates, weight_decay=0.0)
    options = StepOptions(LossOptions(), cfg_dropout=0.0)
    step = jax.jit(make_train_step(template, labels, optimizer, options))
    state, metrics = step(init_state(trainable, labels, optimizer, seed=0), frozen, batch)
    assert all(np.isfinite(metrics[name]) for name in ("loss", "text", "image", "caption"))
    moved = {path: np.array(value) != params[path] for path, value in state.trainable.items()}
    still = {path for path, leaf in moved.items() if not leaf.any()}
    choices = {path for path in moved if "/q_proj/" in path or "/k_proj/" in path}
    assert still == (choices if count == 1 else set()), "one voken attends to itself, whatever is asked"
    rows = moved["backbone/llm/embed_tokens/voken"].any(-1)
    assert rows.tolist() == [True] * count + [False], "every voken learns; <ImageHere> was never read"


def test_what_is_decoded_is_what_was_trained(model, oracle_configs):
    """An answer's image is that of the states which training reads on the same words."""
    count, template, params, batch, tokenizer = model
    session = Session(
        template,
        params,
        tokenizer,
        batch_size=1,
        guidance_scale=3.0,
        max_length=32,
        sampler=make_sampler("ddim", NoiseSchedule.from_hf(oracle_configs["scheduler"]), 2),
        sampling=SamplingConfig(
            force_image="first", max_new_tokens=3, stop_sequences=stop_sequences(tokenizer)
        ),
    )

    @jax.jit
    def states_of(params, batch):
        model = template.bind(params)
        hidden = model.backbone.hidden(model.backbone.embed(batch), batch, None)
        return model.voken_states(hidden, batch.voken_row, batch.voken_start)

    states = np.asarray(states_of(params, batch))
    assert states.shape == (3, count, 32)
    [answer] = session.generate([Prompt(CAPTIONS[0], seed=5)])
    assert answer.token_ids[0] == V and answer.token_ids.count(V) == 1 and "[IMG" not in answer.text
    right, wrong = session.draw([states[0], 3 * states[1]], [5, 5], [0, 0])
    [image] = answer.images
    assert np.abs(image.astype(int) - right).max() <= 1
    assert np.abs(image.astype(int) - wrong).max() > 3
