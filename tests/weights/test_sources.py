"""Published weights in every layout, as tiny random files in their real key names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import original
from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.models.clip_text.model import ClipTextConfig
from minigpt5_jax.models.eva_vit import weights as eva_vit
from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.models.llama.model import LlamaConfig
from minigpt5_jax.models.qformer.model import QFormerConfig
from minigpt5_jax.models.unet.model import UNetConfig
from minigpt5_jax.models.vae.model import VaeConfig
from minigpt5_jax.parts.contracts import ConvertOptions
from minigpt5_jax.weights import check as importer
from minigpt5_jax.weights.foreign import ldm, rewrite
from minigpt5_jax.weights.foreign.llama_tokenizer import BYTES, CONTROL, NORMALIZER, model_of_json
from minigpt5_jax.weights.foreign.rewrite import TOWERS
from minigpt5_jax.weights.formats.load import WeightFileError, load_tower, open_weights
from minigpt5_jax.weights.table import WeightTableError


def part(weights, prefixes):
    """Tensors of the oracle under other prefixes: old -> new."""
    return {
        new + name.removeprefix(old): value
        for old, new in prefixes.items()
        for name, value in weights.items()
        if name.startswith(old)
    }


@pytest.fixture(scope="module")
def sizes(oracle_configs):
    c = oracle_configs
    vit = original.eva_config(c["eva_vit"])
    return {
        "llm": LlamaConfig.from_hf(c["llama"]),
        "vit": vit,
        "qformer": QFormerConfig.from_hf(
            c["qformer_bert"],
            encoder_hidden_size=vit.hidden_size,
            num_query_tokens=c["num_query_token"],
            cross_attention_frequency=c["cross_attention_freq"],
        ),
        "unet": UNetConfig.from_hf(c["unet"]),
        "vae": VaeConfig.from_hf(c["vae"]),
        "text_encoder": ClipTextConfig.from_hf(c["sd_text_encoder"]),
    }


@pytest.fixture(scope="module")
def files(oracle_weights):
    """Tower -> tensors as published."""
    llm = part(oracle_weights, {"model.llama_model.": ""})
    return {
        "llm": {k: v[:-9] if k in (llama.EMBED, llama.HEAD) else v for k, v in llm.items()},
        "vit": part(oracle_weights, {"model.visual_encoder.": ""}),
        "qformer": part(
            oracle_weights,
            {
                "model.Qformer.": "Qformer.",
                "model.query_tokens": "query_tokens",
                "model.ln_vision": "ln_vision",
            },
        ),
        "unet": part(oracle_weights, {"unet.": ""}),
        "vae": part(oracle_weights, {"vae.": ""}),
        "text_encoder": part(oracle_weights, {"sd_text_encoder.": ""}),
    }


def examine(name, source, sizes):
    return importer.examine(name, TOWERS[name], source, sizes, others=TOWERS)


def params_of(name, source, sizes):
    view, coverage = examine(name, source, sizes)
    tower = TOWERS[name]
    adapted = tower.adapt(view, sizes)
    params = load_tower(tower.table(adapted, sizes), adapted, tower.shapes(sizes))
    assert coverage.written == tuple(sorted(params))
    return params, coverage


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


# -- vision ---------------------------------------------------------------------------------------


def test_the_40th_block_and_the_head_of_eva_are_left_out_with_their_reasons(files, sizes):
    depth = sizes["vit"].num_hidden_layers
    block = {
        k.replace("blocks.0.", f"blocks.{depth}."): v
        for k, v in files["vit"].items()
        if k.startswith("blocks.0.")
    }
    extra = {
        **block,
        "norm.weight": np.ones(56),
        "norm.bias": np.zeros(56),
        "head.weight": np.ones((2, 56)),
        "head.bias": np.ones(2),
    }
    params, coverage = params_of("vit", {**files["vit"], **extra}, sizes["vit"])
    assert_same(params, params_of("vit", files["vit"], sizes["vit"])[0])
    assert coverage.ignored.keys() == extra.keys()
    assert coverage.ignored[f"blocks.{depth}.norm1.weight"] == f"only the first {depth} blocks are built"
    assert "ignored head.weight and 1 more: EVA's classification head" in str(coverage)


@pytest.mark.parametrize("old, new", [(24, 16), (16, 16), (7, 16), (16, 5)])
def test_another_grid_is_resized_as_torch_does(old, new):
    positions = np.random.default_rng(0).standard_normal((1, 1 + old * old, 6)).astype(np.float32)
    square = torch.from_numpy(positions[:, 1:]).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    want = torch.cat([torch.from_numpy(positions[:, :1]), want.permute(0, 2, 3, 1).flatten(1, 2)], 1).numpy()
    np.testing.assert_allclose(eva_vit.resize_positions(positions, new), want, atol=2e-6)


def test_a_grid_that_is_not_square_is_refused(files, sizes):
    source = {**files["vit"], "pos_embed": np.zeros((1, 1 + 250, 56), np.float32)}
    view, _ = examine("vit", source, sizes["vit"])
    with pytest.raises(WeightTableError, match="250 patches: no square grid"):
        view["pos_embed"]


def blip2_in_hugging_face_names(files, sizes, oracle_weights):
    """The oracle's vision side under the names of ``Blip2Model``, with parts of its language model."""
    vit, qformer = TOWERS["vit"], TOWERS["qformer"]
    tensors = {
        f"vision_model.{k}": v
        for k, v in eva_vit.HF_TABLE.to_source(
            load_tower(eva_vit.table(sizes["vit"]), files["vit"], vit.shapes(sizes["vit"]))
        ).items()
    }
    params = params_of("qformer", files["qformer"], sizes["qformer"])[0]
    table = qformer.table(["qformer.layernorm.weight"], sizes["qformer"])
    tensors |= table.to_source(params)
    return {
        **tensors,
        "language_projection.weight": np.ones((4, 4)),
        "language_model.shared.weight": np.ones((3, 3)),
    }


def test_blip2_in_hugging_face_form_gives_the_same_vision_tower_and_qformer(files, sizes, oracle_weights):
    whole = blip2_in_hugging_face_names(files, sizes, oracle_weights)
    for name in ("vit", "qformer"):
        ours, coverage = params_of(name, whole, sizes[name])
        assert_same(ours, params_of(name, files[name], sizes[name])[0])
        assert "language_model.shared.weight" in coverage.ignored
    norm = "vision_model.post_layernorm.weight"
    assert coverage.consumed[norm] == ("ln_vision/scale",)


def test_blip2_in_lavis_names_may_hold_the_vision_tower_too(files, sizes):
    whole = {
        **files["qformer"],
        **{f"visual_encoder.{k}": v for k, v in files["vit"].items()},
        "t5_proj.weight": np.ones((2, 2)),
        "Qformer.cls.predictions.bias": np.ones(3),
        "Qformer.bert.embeddings.word_embeddings.weight": np.ones((3, 3)),
    }
    for name in ("vit", "qformer"):
        ours, coverage = params_of(name, whole, sizes[name])
        assert_same(ours, params_of(name, files[name], sizes[name])[0])
    assert coverage.ignored["t5_proj.weight"].startswith("projection to FLAN-T5")


def test_sizes_come_from_blip2s_own_config(tmp_path, oracle_configs, sizes):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "vision_config": vars(sizes["vit"]),
                "num_query_tokens": oracle_configs["num_query_token"],
                "qformer_config": {**oracle_configs["qformer_bert"], "cross_attention_frequency": 2},
            }
        )
    )
    assert TOWERS["vit"].read_sizes(path) == sizes["vit"]
    assert TOWERS["qformer"].read_sizes(path) == sizes["qformer"]
    path.write_text('{"vision_config": {"qkv_bias": false}}')
    with pytest.raises(WeightFileError, match="qkv_bias=False is not implemented"):
        TOWERS["vit"].read_sizes(path)


# -- the language model ---------------------------------------------------------------------------


@pytest.fixture
def llama_folder(tmp_path, oracle_dir, oracle_configs):
    folder = tmp_path / "vicuna"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((oracle_dir / "tokenizer_llama/tokenizer.model").read_bytes())
    (folder / "config.json").write_text(json.dumps(oracle_configs["llama"]))
    return folder


def with_pad_row(tensors):
    """Vicuna v0 as its delta gives it: one row more."""
    return {
        k: np.concatenate([v, v[:1]]) if k in (llama.EMBED, llama.HEAD) else v for k, v in tensors.items()
    }


def test_the_pad_row_of_vicuna_v0_is_taken_off_and_said(files, llama_folder, tmp_path, oracle_configs):
    config = {**oracle_configs["llama"], "vocab_size": 1001, "_name_or_path": "vicuna-7b-v0"}
    (llama_folder / "config.json").write_text(json.dumps(config))
    coverage = rewrite.write_llm(with_pad_row(files["llm"]), llama_folder, tmp_path / "out")
    assert coverage.notes == ("rows 1000 to 1000 are left out: the tokenizer has 1000 entries",)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**config, "vocab_size": 1000}
    written = open_weights(tmp_path / "out")
    assert_same(dict(written), {k: v for k, v in files["llm"].items() if "inv_freq" not in k})
    assert (tmp_path / "out/tokenizer.model").is_file()
    stored = json.loads((tmp_path / "out" / importer.COVERAGE_FILE).read_text())
    assert stored["consumed"][llama.EMBED] == ["embed_tokens/embedding"] and len(stored["written"]) == 12


def test_a_pad_row_that_the_tokenizer_names_stays(files, llama_folder, tmp_path):
    (llama_folder / "added_tokens.json").write_text('{"[PAD]": 1000}')
    coverage = rewrite.write_llm(with_pad_row(files["llm"]), llama_folder, tmp_path / "out")
    assert coverage.notes == () and open_weights(tmp_path / "out")[llama.EMBED].shape[0] == 1001


ODD = [
    "", " ", "   ", "\n\n", "a", " a", "a ", "  two  spaces  ", "\ttab\t", "▁", "▁▁a", " ▁ ", "don't",
    "Ünïcödé", "e\u0301 é", "ﬁ ﬂ ² ½", "日本語のテスト", "🙂👩‍👩‍👧", "\x00\x01",
    "\u200b\ufeff", "\r\n line\r",
    "<s> </s> <unk> <0x41>", "<s>a</s>", "###Human: <Img>[IMG0][IMG1]</Img> ###", "<ImageHere> a", "(x)LL",
    "[IMG0][IMG1][IMG2][IMG3][IMG4][IMG5][IMG6][IMG7] ###", "123456 1,000.5", "a" * 300, " " * 40 + "b",
    "the the the thethe", "mixed 漢字 and words\u00a0end",
]  # fmt: skip


def test_a_tokenizer_model_is_made_of_tokenizer_json(files, llama_folder, tmp_path):
    """The file is all that newer versions of transformers write; the ids are those of sentencepiece."""
    import transformers
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto.FromString((llama_folder / "tokenizer.model").read_bytes())
    for number, piece in enumerate(model.pieces):  # the oracle's has two pieces exchanged, LLaMA's has not
        piece.score = min(0.0, 259.0 - number)
    (llama_folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(config))
    transformers.LlamaTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "new")
    theirs = (llama_folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    shutil.copy(tmp_path / "new/tokenizer.json", llama_folder)
    with pytest.raises(DataError, match="convert llm .*vicuna --output NEW` make it of tokenizer.json"):
        LlamaTokenizer(llama_folder / "tokenizer.model")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "new/tokenizer.json", alone)
    copied = "copy tokenizer.json to .* FOLDER, .* llm FOLDER .*, and copy NEW/tokenizer.model to .*alone$"
    with pytest.raises(DataError, match=copied):
        LlamaTokenizer(alone / "tokenizer.model")
    coverage = rewrite.write_llm(with_pad_row(files["llm"]), llama_folder, tmp_path / "out")
    assert coverage.notes == ("rows 1000 to 1000 are left out: the tokenizer has 1000 entries",)
    shutil.copy(tmp_path / "out/tokenizer.model", alone)
    ours, theirs = LlamaTokenizer(alone / "tokenizer.model"), LlamaTokenizer(theirs)
    for text in [*ODD, *Path(rewrite.__file__).read_text().splitlines(), Path(__file__).read_text()]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, len(theirs), 12)
        assert ours.decode(ids) == theirs.decode(ids)
        text = "".join(map(chr, random.choice([*range(32, 127), 0x2581, 0xE9, 0x4E2D], 20)))
        assert ours.encode(text) == theirs.encode(text), text
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_id, theirs.vocab_size)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda values: values.update(normalizer={"type": "NFKC"}), "changes its text"),
        (lambda values: values["model"]["merges"].reverse(), "merges in another order"),
        (lambda values: values["model"].update(byte_fallback=False), "is no BPE with bytes"),
        (lambda values: values["model"]["vocab"].update(more=9999), "has gaps in its ids"),
        (lambda values: values["model"]["vocab"].update({"<s>": 2, "</s>": 1}), "has other pieces first"),
        (lambda values: values.pop("model"), "is no tokenizer.json of LLaMA"),
    ],
)
def test_the_tokenizer_json_of_another_model(tmp_path, change, message):
    vocab = {piece: number for number, piece in enumerate([*CONTROL, *BYTES, "▁a", "▁ab", "a", "b", "▁"])}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["▁ a", "▁a b"]}
    values = {"normalizer": NORMALIZER, "model": model}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    assert model_of_json(path)
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(WeightFileError, match=message):
        model_of_json(path)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_that_holds_the_vokens_already_is_refused(files, llama_folder, tmp_path, file):
    (llama_folder / file).write_text(json.dumps({"added_tokens": [{"id": 1000, "content": "[IMG0]"}]}))
    with pytest.raises(WeightFileError, match=rf"{file} lists \[IMG0\].*run\.init_from"):
        rewrite.write_llm(files["llm"], llama_folder, tmp_path / "out")
    for path in (llama_folder, llama_folder / "tokenizer.model"):
        with pytest.raises(WeightFileError, match="holds the vokens already"):
            rewrite.refuse_vokens(path)
    (llama_folder / file).unlink()
    rewrite.refuse_vokens(llama_folder)


def test_a_tokenizer_that_cannot_be_read_is_not_passed_on(oracle_dir, tmp_path):
    from minigpt5_jax.parts.generators.stable_diffusion import SD21_BASE_ORIGIN

    for name in ("tokenizer", "scheduler"):
        (tmp_path / "sd" / name).mkdir(parents=True)
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text(json.dumps(rewrite.SCHEDULER))
    with pytest.raises(DataError, match=r"CLIP vocabulary not found: .*vocab\.json"):
        SD21_BASE_ORIGIN.convert(tmp_path / "sd", tmp_path / "out", ConvertOptions())
    torch.save({"model.diffusion_model.x": torch.zeros(2)}, tmp_path / "sd.ckpt")
    options = ConvertOptions(tokenizer=str(oracle_dir / "tokenizer_clip"))
    with pytest.raises(WeightTableError, match="no OpenCLIP text encoder"):  # its tensors were found
        SD21_BASE_ORIGIN.convert(tmp_path / "sd.ckpt", tmp_path / "out", options)


def test_other_vicunas_and_sizes_are_refused(files, llama_folder, tmp_path, oracle_configs):
    for change, match in (
        ({"_name_or_path": "lmsys/vicuna-7b-v1.1"}, r"Vicuna v1\.1.*stand on v0"),
        ({"max_position_embeddings": 4096}, r"LLaMA-2"),
    ):
        (llama_folder / "config.json").write_text(json.dumps(oracle_configs["llama"] | change))
        with pytest.raises(WeightFileError, match=match):
            rewrite.write_llm(files["llm"], llama_folder, tmp_path / "out")
    with pytest.raises(WeightTableError, match="hidden_size is 5120, not 4096(.|\n)*LLaMA-13B in place"):
        rewrite.require_preset("llm", TOWERS["llm"], LlamaConfig(hidden_size=5120, num_attention_heads=40))
    rewrite.require_preset("llm", TOWERS["llm"], LlamaConfig(vocab_size=32001))
    (llama_folder / "tokenizer.model").unlink()
    with pytest.raises(WeightFileError, match=r"no tokenizer\.model"):
        rewrite.write_llm(files["llm"], llama_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "{", r"config\.json: "),
        ("config.json", "[1]", r"config\.json: "),
        ("tokenizer.model", "<html>", r"vicuna: its tokenizer cannot be read"),
        ("added_tokens.json", "[1]", r"vicuna: its tokenizer cannot be read"),
    ],
)
def test_files_beside_the_weights_that_are_none(files, llama_folder, tmp_path, file, content, message):
    (llama_folder / file).write_text(content)
    with pytest.raises(WeightFileError, match=message):
        rewrite.write_llm(files["llm"], llama_folder, tmp_path / "out")


def test_without_its_table_of_words(files, llama_folder, tmp_path):
    part = {f"base_model.model.{key}": value for key, value in files["llm"].items()}
    with pytest.raises(WeightTableError, match="'model.embed_tokens.weight' is missing\n.*these are LoRA"):
        rewrite.write_llm(part, llama_folder, tmp_path / "out")


# -- Stable Diffusion -----------------------------------------------------------------------------


def single_file(files, sizes):
    """The oracle's diffusion model under the names of the original single-file checkpoints, put together
    by the rules of the diffusers project's conversion, written out here by hand for these sizes."""
    tensors = {}
    for name, table in (
        ("unet", ldm.unet(sizes["unet"])),
        ("vae", ldm.vae(sizes["vae"])),
        ("text_encoder", ldm.text_encoder(sizes["text_encoder"])),
    ):
        source = {
            "text_model." + k if name == "text_encoder" and not k.startswith("text_model.") else k: v
            for k, v in files[name].items()
            if not k.endswith("position_ids")
        }
        tensors |= table.to_source(source)
    last = sizes["text_encoder"].num_hidden_layers
    width = sizes["text_encoder"].hidden_size
    return tensors | {
        f"{ldm.TEXT}transformer.resblocks.{last}.ln_1.weight": np.ones(width, np.float32),
        f"{ldm.TEXT}text_projection": np.ones((width, width), np.float32),
        f"{ldm.TEXT}logit_scale": np.ones((), np.float32),
        "betas": np.ones(1000),
        "alphas_cumprod": np.ones(1000),
        "sqrt_recipm1_alphas_cumprod": np.ones(1000),
        "model_ema.decay": np.ones(()),
        "posterior_log_variance_clipped": np.ones(1000),
    }


@pytest.mark.slow  # importing diffusers takes most of it
def test_single_file_names_are_those_that_diffusers_reads(files, sizes, oracle_configs):
    """The independent word on our tables of names: diffusers' own conversion of the same file."""
    from diffusers.loaders import single_file_utils as theirs

    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in single_file(files, sizes).items()}
    unet = theirs.convert_ldm_unet_checkpoint(dict(tensors), config=dict(oracle_configs["unet"]))
    vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), config=dict(oracle_configs["vae"]))
    for name, converted in (("unet", unet), ("vae", vae)):
        assert_same({k: v.numpy() for k, v in converted.items()}, files[name])
    last = sizes["text_encoder"].num_hidden_layers  # diffusers leaves out layer 23, by its number
    text = theirs.convert_open_clip_checkpoint(None, dict(tensors), prefix=ldm.TEXT)
    text = {k: v.numpy() for k, v in text.items() if f"layers.{last}." not in k and "projection" not in k}
    ours = params_of("text_encoder", files["text_encoder"], sizes["text_encoder"])[0]
    assert_same(params_of("text_encoder", text, sizes["text_encoder"])[0], ours)


@pytest.mark.slow
def test_single_file_becomes_a_diffusers_folder(files, sizes, oracle_dir, oracle_configs, tmp_path):
    folder = tmp_path / "sizes"
    for name in ("unet", "vae", "text_encoder"):
        (folder / name).mkdir(parents=True)
        key = "sd_text_encoder" if name == "text_encoder" else name
        (folder / name / "config.json").write_text(json.dumps(oracle_configs[key]))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(oracle_configs["scheduler"]))
    tensors = single_file(files, sizes)
    found = rewrite.write_single_file(tensors, oracle_dir / "tokenizer_clip", tmp_path / "sd", folder)
    used = {key for one in found for key in one.ignored} | {"position_ids"}
    assert {"betas", "model_ema.decay", f"{ldm.TEXT}logit_scale"} <= used
    last = f"{ldm.TEXT}transformer.resblocks.{sizes['text_encoder'].num_hidden_layers}.ln_1.weight"
    assert found[2].ignored[last].startswith("layer 3 of OpenCLIP")
    for name in ("unet", "vae", "text_encoder"):
        written = dict(open_weights(tmp_path / "sd" / name))
        assert_same(params_of(name, written, sizes[name])[0], params_of(name, files[name], sizes[name])[0])
        assert TOWERS[name].read_sizes(tmp_path / "sd" / name / "config.json") == sizes[name]
    assert (tmp_path / "sd/tokenizer/vocab.json").is_file()
    with pytest.raises(WeightTableError, match="'extra' belongs to no part"):
        rewrite.write_single_file({**tensors, "extra": np.ones(1)}, oracle_dir / "tokenizer_clip", tmp_path)
    with pytest.raises(WeightTableError, match=r"Stable Diffusion 1\.x"):
        source = {"cond_stage_model.transformer.text_model.final_layer_norm.bias": np.ones(1)}
        rewrite.write_single_file(source, oracle_dir / "tokenizer_clip", tmp_path)


def test_old_attention_names_of_the_vae_are_read(files, sizes):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    source = {}
    for key, value in files["vae"].items():
        for new, name in old.items():
            if f".{new}." in key:
                key = key.replace(new, name)
                value = value[:, :, None, None] if value.ndim == 2 else value
        source[key] = value
    assert source.keys() != files["vae"].keys()
    view, _ = examine("vae", source, sizes["vae"])
    assert_same(dict(view), files["vae"])


# -- what is wrong with a file ---------------------------------------------------------------------


def test_bad_tensors_are_named(files, sizes):
    source, key = files["unet"], "conv_in.weight"

    def read(changes, drop=()):
        changed = {k: v for k, v in {**source, **changes}.items() if k not in drop}
        view, _ = examine("unet", changed, sizes["unet"])
        return dict(view)

    with pytest.raises(WeightTableError, match=r"'conv_in\.scale' is consumed by no rule"):
        read({"conv_in.scale": np.ones(3)})
    with pytest.raises(WeightTableError, match="'conv_in/kernel' is written by no source key"):
        read({}, drop=(key,))
    with pytest.raises(WeightTableError, match=r"'conv_in\.weight' gives shape"):
        read({key: source[key].swapaxes(0, 1)})
    bad = source[key].copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(WeightTableError, match=r"'conv_in\.weight' holds 3 values that are NaN or infinite"):
        read({key: bad})
    with pytest.raises(WeightTableError, match=r"'conv_in\.weight' is int8: quantised files are not read"):
        read({key: np.ones(source[key].shape, np.int8)})
    with pytest.raises(WeightTableError, match="nine input channels: an inpainting model"):
        read({key: np.zeros((16, 9, 3, 3), np.float32), "stray": np.ones(1)})


def test_the_likely_cause_is_named(files, sizes):
    for name, source, cause in (
        ("llm", {llama.EMBED: np.zeros((32000, 5120), np.float16)}, "LLaMA-13B"),
        ("llm", {llama.EMBED: np.zeros((32001, 4096), np.float16)}, r"\[PAD\] row"),
        ("llama_proj", {"llama_proj.weight": np.zeros((5120, 768))}, "Vicuna-13B"),
        ("llm", files["unet"], r"a file for weights\.unet, not for weights\.llm"),
        ("vit", files["qformer"], r"a file for weights\.qformer"),
    ):
        with pytest.raises(WeightTableError, match=f"likely cause:.*{cause}"):
            examine(name, source, TOWERS[name].preset)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), rewrite.new_folder(target) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()  # a process that was killed could not clean up
    (tmp_path / "out.partial/model.safetensors").write_bytes(b"half")
    with rewrite.new_folder(target) as folder:
        assert list(folder.iterdir()) == []
    assert target.is_dir() and not (tmp_path / "out.partial").exists()
    with (
        pytest.raises(FileExistsError, match="delete it or choose another --output"),
        rewrite.new_folder(target),
    ):
        pass
