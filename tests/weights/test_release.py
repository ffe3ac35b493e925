"""The original's checkpoints: which tensor goes where, and every way in which files do not fit together."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.weights.foreign.minigpt5 import LLAMA_PREFIX
from minigpt5_jax.weights.foreign.release import TABLES, compare_rows, read_release
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.table import WeightTableError

PEFT = LLAMA_PREFIX + "base_model.model."
EMBED, HEAD = LLAMA_PREFIX + llama.EMBED, LLAMA_PREFIX + llama.HEAD
RANK, LAYERS, WIDTH = 2, 3, 48


@pytest.fixture(scope="module")
def stage1(oracle_dir):
    return dict(open_weights(oracle_dir / "stage1.ckpt", "state_dict"))


@pytest.fixture(scope="module")
def shapes(stage1):
    """What a stage-1 model takes from training."""
    from minigpt5_jax.models.mapper.weights import TABLE

    found = {}
    for key, value in stage1.items():
        item = TABLE.resolve(key)
        for path, part in zip(item.targets if item else (), item.op.forward(value) if item else ()):
            old = found.get(path, (0,))
            found[path] = part.shape if item.index is None else (max(old[0], item.index + 1), *part.shape)
    rows = {f"backbone/llm/{name}/voken": (9, WIDTH) for name in ("embed_tokens", "lm_head")}
    return {f"mapper/{path}": shape for path, shape in found.items()} | rows


def lora_shapes(rank=RANK):
    path = "backbone/llm/layers/self_attn/{}/lora_{}"
    return {
        path.format(name, leaf): (LAYERS, WIDTH, rank) if leaf == "a" else (LAYERS, rank, WIDTH)
        for name in ("q_proj", "v_proj")
        for leaf in "ab"
    }


@pytest.fixture(scope="module")
def stage2(stage1):
    """Under the names of fidelity 7.3: tables wrapped by PEFT, LoRA, encoder-decoder; no fc, no queries."""
    random = np.random.default_rng(0)
    tensors = {
        f"{PEFT}model.embed_tokens.modules_to_save.default.weight": stage1[EMBED] + 1,
        f"{PEFT}lm_head.modules_to_save.default.weight": stage1[HEAD] + 1,
    }
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            at = f"{PEFT}model.layers.{layer}.self_attn.{name}.lora_"
            tensors[f"{at}A.default.weight"] = random.standard_normal((RANK, WIDTH)).astype(np.float32)
            tensors[f"{at}B.default.weight"] = random.standard_normal((WIDTH, RANK)).astype(np.float32)
    mapping = {k: v + 2 for k, v in stage1.items() if k.startswith("llm_to_t2i_mapping.")}
    return tensors | mapping


def read(stage1, stage2, shapes, **kwargs):
    return read_release(stage1, stage2, shapes, vocab_size=kwargs.pop("vocab_size", 1000), **kwargs)


def test_stage_1_gives_the_last_nine_rows_and_the_mapper(stage1, shapes):
    release = read(stage1, None, shapes)
    assert release.params.keys() == shapes.keys() and release.vocab_size == 1000
    np.testing.assert_array_equal(release.params["backbone/llm/embed_tokens/voken"], stage1[EMBED][1000:])
    np.testing.assert_array_equal(release.params["backbone/llm/lm_head/voken"], stage1[HEAD][1000:])
    np.testing.assert_array_equal(release.params["mapper/fc/fc1/kernel"], stage1["fc.0.weight"].T)
    [coverage] = release.coverage
    assert len(coverage.consumed) == 131 and not coverage.ignored and "new rows only" in coverage.notes[0]
    assert set(coverage.written) == shapes.keys()


def test_whole_tables_are_taken_on_request(stage1, shapes):
    release = read(stage1, None, shapes, rows="all")
    assert release.params.keys() == shapes.keys() | set(TABLES.values())
    np.testing.assert_array_equal(release.params[TABLES[llama.EMBED]], stage1[EMBED][:1000])
    np.testing.assert_array_equal(release.params[TABLES[llama.HEAD]], stage1[HEAD][:1000].T)
    assert release.coverage[0].notes == ()


def test_stage_2_lies_on_top_of_stage_1(stage1, stage2, shapes):
    release = read(stage1, stage2, shapes | lora_shapes())
    np.testing.assert_array_equal(release.params["backbone/llm/embed_tokens/voken"], stage1[EMBED][1000:] + 1)
    np.testing.assert_array_equal(release.params["mapper/fc/fc1/kernel"], stage1["fc.0.weight"].T)
    np.testing.assert_array_equal(release.params["mapper/queries"], stage1["t2i_decoder_prompt"][0])
    norm = "llm_to_t2i_mapping.encoder.norm.weight"
    np.testing.assert_array_equal(release.params["mapper/encoder/norm/scale"], stage1[norm] + 2)
    factor = release.params["backbone/llm/layers/self_attn/v_proj/lora_a"]
    np.testing.assert_array_equal(
        factor[2], stage2[f"{PEFT}model.layers.2.self_attn.v_proj.lora_A.default.weight"].T
    )
    first, second = release.coverage
    assert first.consumed.keys() == {k for k in stage1 if k.startswith(("fc.", "t2i_"))}
    assert first.ignored[EMBED] == "replaced by the stage-2 file" and len(first.ignored) == 126
    assert second.consumed.keys() == stage2.keys() and not second.ignored


def test_a_prefix_in_place_of_lora(stage1, stage2, shapes):
    random = np.random.default_rng(1)
    tensors = {k: v for k, v in stage2.items() if "llm_to" in k} | {EMBED: stage1[EMBED], HEAD: stage1[HEAD]}
    prefix = {
        "model.prefix_encoder.embedding.weight": random.standard_normal((5, WIDTH)),
        "model.prefix_encoder.transform.0.weight": random.standard_normal((16, WIDTH)),
        "model.prefix_encoder.transform.0.bias": random.standard_normal(16),
        "model.prefix_encoder.transform.2.weight": random.standard_normal((288, 16)),
        "model.prefix_encoder.transform.2.bias": random.standard_normal(288),
    }
    more = {
        "embedding": (5, WIDTH),
        "transform/0/kernel": (WIDTH, 16),
        "transform/0/bias": (16,),
        "transform/1/kernel": (16, 288),
        "transform/1/bias": (288,),
    }
    wanted = shapes | {f"backbone/llm/prefix_encoder/{name}": shape for name, shape in more.items()}
    params = read(stage1, tensors | prefix, wanted).params
    kernel = prefix["model.prefix_encoder.transform.2.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(params["backbone/llm/prefix_encoder/transform/1/kernel"], kernel)


def test_the_decay_of_the_old_rows_is_measured(stage1):
    old = {TABLES[llama.EMBED]: stage1[EMBED][:1000], TABLES[llama.HEAD]: stage1[HEAD][:1000].T}
    shrunk = stage1 | {
        key: np.concatenate([0.99 * stage1[key][:1000], stage1[key][1000:]]) for key in (EMBED, HEAD)
    }
    decay = compare_rows(shrunk, None, 1000, old.__getitem__)
    assert all(abs(factor - 0.99) < 1e-5 and rest < 1e-5 for factor, rest in decay.values())
    other = {path: np.random.default_rng(0).permutation(value) for path, value in old.items()}
    with pytest.raises(WeightTableError, match=r"not those of weights\.llm(.|\n)*v0, not on v1\.1"):
        compare_rows(shrunk, None, 1000, other.__getitem__)


def test_files_that_do_not_belong_together(stage1, stage2, shapes):
    both = shapes | lora_shapes()

    def refused(first, second, wanted, match, **kwargs):
        with pytest.raises(WeightTableError, match=match):
            read(first, second, wanted, **kwargs)

    refused(stage2, None, both, "stage-1 file is a stage-2 file.*--stage2.*fc and t2i_decoder_prompt")
    refused(stage2, stage1, both, "seem to be swapped")
    refused(stage1, stage1, shapes, "neither LoRA nor prefix")
    refused(stage1, stage2, shapes, "the configuration has none.*lora_rank=0.*stage2_vist")
    refused(stage1, None, both, "lora_rank.*files have none: give the stage-2 file")
    refused(
        stage1,
        stage2,
        shapes | lora_shapes(4),
        "LoRA of rank 2 in the file, rank 4 in the configuration.*lora_rank=2",
    )
    for key in ("llm_to_t2i_mapping.decoder.norm.bias", f"{PEFT}lm_head.modules_to_save.default.weight"):
        rest = {k: v for k, v in stage2.items() if k != key}
        plain = key if "norm" in key else HEAD
        refused(stage1, rest, both, rf"the stage-2 file lacks {plain} \(1 in all\)")
    twice = {**stage2, EMBED: stage1[EMBED]}
    refused(stage1, twice, both, f"stage 2 file holds both '{PEFT}.* and '{EMBED}'")
    part = {k: v for k, v in stage1.items() if not k.startswith("fc.")}
    refused(part, None, shapes, "'mapper/fc/fc1/kernel' is written by no.*(.|\n)*without the stage-1 file")
    refused(
        stage1,
        None,
        shapes,
        r"V = 1009 rows, so \[IMG0\] is id 1000; the language model has 1001",
        vocab_size=1001,
    )
    refused(stage1, None, shapes, r"tokenizer whose entry 32000 is \[PAD\]", vocab_size=999)
    wide = shapes | {f"backbone/llm/{name}/voken": (9, 64) for name in ("embed_tokens", "lm_head")}
    refused(stage1, None, wide, "width 48, this one has 64")


def test_bad_tensors_of_a_release_are_named(stage1, shapes):
    def refused(changes, match):
        with pytest.raises(WeightTableError, match=match):
            read({**stage1, **changes}, None, shapes)

    refused({"fc.3.weight": np.ones((2, 2))}, r"'fc\.3\.weight' is consumed by no rule")
    refused({"fc.0.weight": stage1["fc.0.weight"].T}, r"'fc\.0\.weight' gives shape \(32, 48\)")
    bad = stage1["fc.0.bias"].copy()
    bad[3] = np.inf
    refused({"fc.0.bias": bad}, r"'fc\.0\.bias' holds 1 values that are NaN or infinite")
    refused({HEAD: stage1[HEAD][:-1]}, "tables differ in their rows")
    with pytest.raises(WeightTableError, match=r"embed_tokens\.weight' is missing; is this a"):
        read({k: v for k, v in stage1.items() if k != EMBED}, None, shapes)
