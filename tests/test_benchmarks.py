"""The scoreboard's pure parts: drawn lengths, lines and goals, what the peers are made of."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import lengths, report, run, scaling, timing
from benchmarks.goals import GOALS, P1_TFLOP, Goal
from benchmarks.peers import count, towers
from benchmarks.peers.p1 import P1
from benchmarks.peers.p2 import P2
from benchmarks.peers.samples import Sample
from benchmarks.rows import compiled, flops, startup
from benchmarks.rows.step import worst_leaf
from benchmarks.run_files import on_drawn_samples, read_run_file
from benchmarks.samples import WORDS, Captions, Stories
from minigpt5_jax.data.batches.lengths import longest
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.planning.step import Compiled
from minigpt5_jax.planning.topology import PlanError
from minigpt5_jax.shapes.files import ASSETS

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------------- lengths


def test_mean_lengths_are_those_of_the_accounting():
    story = np.full(lengths.STEPS, 13)
    sizes = [lengths.story_sequence(story, sample) for sample in lengths.SAMPLES]
    assert (len(sizes), sum(sizes), min(sizes), max(sizes)) == (13, 2769, 85, 323)
    assert sum(map(lengths.draws, lengths.SAMPLES)) == 9
    assert sum(map(lengths.input_images, lengths.SAMPLES)) == 34
    drawn = lengths.caption_lengths(20_000, 0)
    assert abs(drawn.mean() - lengths.CAPTION_MEAN) < 0.1 and abs(drawn.std() - lengths.CAPTION_STD) < 0.3
    assert abs(lengths.story_texts(4_000, 0).mean() - lengths.TEXT_MEAN) < 0.1
    np.testing.assert_array_equal(drawn, lengths.caption_lengths(20_000, 0))
    assert (drawn != lengths.caption_lengths(20_000, 1)).any()
    assert lengths.caption_lengths(1_000, 0, longest=21).max() == 21


def test_sources_have_the_drawn_lengths_under_the_packaged_tokenizer():
    tokenizer = LlamaTokenizer(ASSETS / "llama" / "tokenizer.model", 8, vocab_size=4_000)
    assert [len(tokenizer.encode(word)) for word in WORDS] == [1] * len(WORDS)
    counts, texts = lengths.caption_lengths(8, 0), lengths.story_texts(2, 0)
    captions, stories = Captions(counts), Stories(texts)
    measured = [longest(captions.texts(i), tokenizer, 32) for i in range(8)]
    assert measured == [(lengths.caption_sequence(int(n)), 0) for n in counts]
    measured = [longest(stories.texts(i), tokenizer, 32) for i in range(len(stories))]
    assert measured == [
        (lengths.story_sequence(story, sample), lengths.input_images(sample))
        for story in texts
        for sample in lengths.SAMPLES
    ]
    first, second = stories.example(1), stories.example(2)  # both of step 1: they share what was before
    before = lengths.SYSTEM + int(texts[0][0]) + lengths.IMAGE_TOKENS + lengths.IMAGE_WORDS - 1
    ids = [tokenizer.encode(example.source) for example in (first, second)]
    shared = before - lengths.IMAGE_TOKENS + 1  # an image is one id here
    assert ids[0][:shared] == ids[1][:shared] and ids[0][shared:] != ids[1][shared:]


# --------------------------------------------------------------------------------------------- lines


def test_a_line_has_its_keys_and_can_be_read_back():
    told = report.line(12, "P1", ours=2.0, peer=3.0, limit=0.5, spread=[1.4, 1.6], unit="s/step")
    assert tuple(told)[: len(report.KEYS)] == report.KEYS
    assert (told["ratio"], told["fraction_of_limit"], told["met"]) == (1.5, 0.25, True)
    assert json.loads(json.dumps(told)) == told and "jax" in told["versions"]
    assert report.line(12, "P1", ours=2.0, peer=2.0)["met"] is False
    assert report.line(12, "P1", ours=2.0, peer=None)["met"] is None
    assert report.line(12, "P2 torch.compile", ours=1.0, peer=2.0)["met"] is None  # no goal
    flawed = report.line(3, "stage 2", ours=2.95, peer=9.4, over_minimum=1.0, frozen_gradients=1)
    assert flawed["ratio"] > 3 and flawed["met"] is False


def test_every_bound_of_a_goal_counts():
    goal = Goal({"ratio": 1.0}, {"error": 0.1})
    assert goal.met({"ratio": 1.0, "error": 0.1}) is True
    assert goal.met({"ratio": 0.9, "error": 0.0}) is goal.met({"ratio": 2.0, "error": 0.2}) is False
    assert goal.met({"ratio": 2.0}) is None and Goal().met({"ratio": 2.0}) is None
    assert goal.described() == "ratio >= 1, error <= 0.1"
    assert {row for row, _ in GOALS} == set(run.ROWS) and all(goal.source for goal in GOALS.values())


def test_flags():
    assert run.parse(["--rows", "3,12"]).rows == [3, 12] and run.parse([]).rows == list(run.ROWS)
    assert run.rows("5b,6") == ["5b", 6]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no row 7; known: 3, 4, 5b, 6, 7b, 9, 12, 13"):
        run.rows("3,7")
    with pytest.raises(argparse.ArgumentTypeError, match="at least 5"):
        run.blocks("3")


def test_rows_compiled_for_other_chips_come_last_on_any_device(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "function_of", lambda row: lambda options: seen.append(row) or iter(()))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run.main(["--rows", "7b,12,6,3", "--device", "tpu"]) == 0 and seen == [3, "7b", 6]


def test_a_program_that_does_not_fit_is_told():
    with pytest.raises(PlanError, match="does not fit: 20.12 GB"):
        compiled._program(Compiled(None, 20_120_000_000, 1.0, "", 0.0))


def test_the_cases_of_the_scaling_page(monkeypatch):
    pod, chip = scaling.CASES[:2]  # those with goals
    assert pod.command[2:] == ["--config", "configs/stage1.py:int8", "--topology", "v5e:4x4"]
    assert chip.command[3:6] == ["configs/stage1.py:int8", "--topology", "v5e:1x1"]
    assert "--config.data.global_batch=1" in chip.command
    assert not any("tensor" in part for part in chip.command)
    silent = subprocess.CompletedProcess([], returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: silent)
    assert scaling.run_case(chip) == {"error": "ended with status -9 and no message"}


def test_a_started_command_is_timed_and_its_failure_told(tmp_path):
    seen = tmp_path / "seen"
    program = f"import pathlib, time; pathlib.Path({str(seen)!r}).write_text('1'); time.sleep(0.1)"
    cpu, until_seen = startup._run(["-c", program], seen)
    assert 0 < cpu < 10 and 0 < until_seen < 60
    with pytest.raises(RuntimeError, match="failed:(.|\n)*out of luck"):
        startup._run(["-c", "import sys; sys.exit('out of luck')"])


def test_the_command_imports_nothing_large():
    code = "import sys, benchmarks.run; print(sorted({'jax', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


def test_sides_take_turns():
    calls = []
    times = timing.alternate({"ours": lambda: calls.append("a"), "peer": lambda: calls.append("b")}, 5)
    assert calls == ["a", "b"] * 6  # one turn each before the clock runs
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 2.0, 4.0]}
    compared = timing.Times(seconds, {"ours": [2.0, 2.0, 2.0], "peer": [1.0, 1.0, 1.0]}).compared("peer")
    assert compared.pop("cpu_ratio") == 0.5
    assert compared == {"ours": 2.0, "peer": 3.0, "ratio": 1.0, "spread": [1.0, 3.0], "blocks": 3}
    assert len(times.seconds["ours"]) == 5


def test_small_gradients_are_measured_against_the_large_ones():
    theirs = {"large": np.array([1.0, -2.0]), "small": np.array([1e-9])}
    error, where = worst_leaf({"large": np.array([1.0, -2.0 + 4e-6]), "small": np.array([2e-9])}, theirs)
    assert where == "large" and error == pytest.approx(2e-6)
    error, where = worst_leaf({"large": np.array([1.0, -2.0]), "small": np.array([1e-3])}, theirs)
    assert where == "small" and error == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one side only"):
        worst_leaf({"large": np.zeros(2)}, theirs)


# --------------------------------------------------------------------------------------------- row 3


def test_ours_is_counted_on_the_loaders_batches(tmp_path):
    config = on_drawn_samples(
        read_run_file("shapes_stage1"),
        str(tmp_path),
        data__global_batch=16,
        data__accumulation=2,
        model__backbone__vit="none",
        model__backbone__qformer="none",
    )
    work = flops.measure(config, Captions(np.full(32, 6)))
    assert sum(work.shapes.values()) == 2  # steps of an epoch
    assert work.frozen_gradients == 0
    assert work.on_images == pytest.approx(work.step + work.once, rel=1e-6) and work.once > 0


# --------------------------------------------------------------------------------------------- peers


@pytest.mark.slow  # row 3 holds every run to it as well
def test_the_originals_recipe_does_the_originals_work():
    p1 = count.full_size_p1(lora=False)
    pair = [count.blank_sample(towers.FULL, length, draws=True) for length in (22, 27)]
    assert count.count(p1, pair) / 2 / 1e12 == pytest.approx(P1_TFLOP, rel=0.03)


TINY = towers.Sizes(
    llama=towers._llama(40, 32, 48, 2, 4, 64),
    unet={
        **{"sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": [16]},
        **{"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": [2], "cross_attention_dim": 32},
        **{"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]},
    },
    vae=towers.VAE | {"sample_size": 32, "block_out_channels": [8] * 4, "norm_num_groups": 4},
    clip=towers._clip(40, 32, 1, 4),
    mapper=(1, 1, 64),
)


def test_a_micro_batch_costs_what_the_polynomial_says():
    cost = count.measure(lora=False, sizes=TINY)
    p1 = count.full_size_p1(lora=False, sizes=TINY)
    samples = [count.blank_sample(TINY, 70, draws=True), count.blank_sample(TINY, 33, draws=False)]
    assert cost.of(70, 1, 0) == pytest.approx(count.count(p1, samples), rel=1e-9)


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads wait for each other longer than such small models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(random: np.random.Generator, caption: int, dropped: bool) -> Sample:
    ids = np.concatenate([[1], random.integers(3, 40, caption), 40 + np.arange(8), [5]])
    labels = np.full(len(ids), -100)
    places = np.array([caption + 1, caption + 8, caption + 9])
    labels[places] = ids[places]
    noise = random.standard_normal((2, 4, 4, 4)).astype(np.float32)
    mask = (np.arange(77) < 9).astype(np.int64)
    image = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    words = random.integers(3, 37, 77) * mask
    return Sample(ids, labels, caption + 1, words, mask, 300, noise[0], noise[1], dropped, image)


def test_both_peers_have_one_loss():
    random = np.random.default_rng(0)
    samples = [sample(random, caption, caption == 5) for caption in (5, 3, 7, 4)]
    made = towers.make_towers(TINY, "cpu", bos_token_id=38, eos_token_id=39)
    torch.manual_seed(1)
    mapper = towers.Mapper(TINY).state_dict()
    rows = tuple(random.standard_normal((2, 9, 32)).astype(np.float32) * 0.1)
    empty = (np.arange(77) % 40, (np.arange(77) < 2).astype(np.int64))
    p1, p2 = P1(made, mapper, rows, empty), P2(made, mapper, rows, empty, samples)
    first = p1.step(samples)
    assert p2.step() == pytest.approx(first, rel=1e-5)
    assert p2.step() == pytest.approx(p1.step(samples), rel=1e-4) and p1.step(samples) < first
    frozen = made.llama.model.embed_tokens.weight
    moved = (p1.tables[0].detach()[:40] - frozen).abs().max()
    assert float(p1.tables[0].grad[:40].abs().max()) == 0 and 0 < float(moved) < 1e-4  # by weight decay alone
