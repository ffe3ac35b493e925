"""The exported language model in ``transformers`` and ``peft``: same logits, same ids."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers

import original
from minigpt5_jax.config import get_config
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.export import export_torch
from minigpt5_jax.models.llama import weights as maps
from minigpt5_jax.shapes.files import ASSETS, read_config
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.export import tokenizer as files
from minigpt5_jax.weights.export.model import ExportError, Tokens
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.wiring.weight_paths import check_sources

WORDS = read_config(ASSETS, "llama").vocab_size
IDS = [1, 261, 424, 443, *range(WORDS, WORDS + 8), 269]
VOKENS = tuple(f"[IMG{i}]" for i in range(8))


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """``exported(kind, to, **options)``: the folder of an export."""
    root, made = tmp_path_factory.mktemp("llm"), {}

    def get(kind: str, to: str = "transformers", **options):
        key = "-".join([kind, to, *(f"{name}_{value}" for name, value in options.items())])
        if key not in made:
            export_torch(run_folder(kind), root / key, to=to, **options)
            made[key] = root / key
        return made[key]

    return get


@torch.no_grad()
def outputs(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Final states and logits of the row."""
    out = model.eval()(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    return out.hidden_states[-1][0].numpy(), out.logits[0].numpy()


def assert_same(theirs, ours):
    for found, want in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_an_export_is_no_language_model_to_start_from(exported):
    """It has the vokens: a second set would be added, and the trained rows could not be reached any more."""
    config = get_config()
    config.weights.update(llm=str(exported("stage1")), tokenizer=str(exported("stage1")))
    config.model.backbone.llm = "source"
    for name in ("llm", "tokenizer"):
        with pytest.raises(WeightFileError, match=r"holds the vokens already.*run\.init_from=WORKDIR"):
            check_sources(config, only=[name])
    for name in ("llm", "tokenizer"):  # those that it was trained on
        config.weights.update({name: str(ASSETS / "llama")})
        check_sources(config, only=[name])


@pytest.mark.parametrize("kind", ["stage1", "lora"])
def test_logits_are_ours(exported, run_of, hidden_of, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(kind))
    assert model.config.vocab_size == WORDS + 9 and model.dtype == torch.float32
    assert_same(outputs(model), hidden_of(run_of(kind), IDS))


def test_the_adapter_on_a_base_with_resized_tables(exported, run_of, hidden_of):
    """On LLaMA as it was published, tables resized; the adapter brings the rows."""
    base = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "llama", dtype=torch.float32)
    base.resize_token_embeddings(WORDS + 9)
    model = peft.PeftModel.from_pretrained(base, exported("lora", "peft"))
    assert_same(outputs(model), hidden_of(run_of("lora"), IDS))
    merged = model.merge_and_unload()
    ours = transformers.AutoModelForCausalLM.from_pretrained(exported("lora")).state_dict()
    for name, value in merged.state_dict().items():
        np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)


def test_the_adapter_on_the_export_without_it(exported, run_of, hidden_of):
    folder = exported("lora", merge=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = hidden_of(run_of("lora"), IDS)
    assert np.abs(outputs(base)[1] - ours[1]).max() > 0.1, "LoRA is not in it"
    assert_same(outputs(peft.PeftModel.from_pretrained(base, exported("lora", "peft"))), ours)


def test_the_adapter_holds_what_peft_saves(exported, tmp_path):
    """Names and shapes as ``peft`` itself writes them."""
    base = transformers.AutoModelForCausalLM.from_pretrained(exported("lora", merge=False))
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        modules_to_save=["lm_head", "embed_tokens"],
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    theirs = open_weights(tmp_path / "adapter_model.safetensors")
    ours = open_weights(exported("lora", "peft") / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in json.loads((exported("lora", "peft") / "adapter_config.json").read_text()).items():
        if name not in ("base_model_name_or_path", "inference_mode"):
            unordered = isinstance(value, list)
            assert (sorted(value) if unordered else value) == (
                sorted(written[name]) if unordered else written[name]
            ), name


def test_the_way_there_and_back_changes_no_bit(exported, run_of):
    run = run_of("lora")
    params = {k.removeprefix("backbone/llm/"): v for k, v in run.params.items() if "/llm/" in k}
    plain = {path: value.shape for path, value in params.items() if "/lora_" not in path}
    source = dict(open_weights(exported("lora", merge=False)))
    again = (maps.TABLE + maps.VOKEN_TABLE).to_params(original.split_tables(source, 9), plain)
    assert all(np.array_equal(again[path], params[path]) for path in plain)

    adapter = open_weights(exported("lora", "peft") / "adapter_model.safetensors")
    named = {
        k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): v
        for k, v in adapter.items()
        if ".lora_" in k
    }
    factors = maps.lora_table().to_params(named, {p: v.shape for p, v in params.items() if "/lora_" in p})
    assert len(factors) == 4 and all(np.array_equal(factors[path], params[path]) for path in factors)


def test_one_dtype_throughout(exported):
    folder = exported("lora", dtype="bfloat16")
    values = open_weights(folder)
    assert {value.dtype for value in values.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_generation_begins_and_ends_with_the_runs_ids(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported("stage1"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported("stage1"))
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (1, 2)
    assert set(model.generation_config.eos_token_id) == {2, *tokenizer.convert_tokens_to_ids(["▁###", "###"])}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("rows", [1000, 1002])
def test_ids_are_ours(oracle_dir, oracle_cases, tmp_path, rows):
    """The original's strings, and with rows the tokenizer has no piece for (Vicuna's ``[PAD]``)."""
    model_file = oracle_dir / "tokenizer_llama" / "tokenizer.model"
    ours = LlamaTokenizer(model_file, vocab_size=rows)
    files.write(Tokens(model_file, (*VOKENS, "<ImageHere>"), rows, 1, (2,)), 2048, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(ours)
    strings = (v for name, v in oracle_cases.items() if "/tok/" in name and v.dtype.kind == "U")
    recorded = {str(text) for value in strings for text in value.ravel()}
    assert len(recorded) > 10
    made = ["", " ", "a\n[IMG0] [IMG1]\n\nb", "naïve ☃ \U0001f9ca\t x", "<ImageHere>###", "  two  "]
    for text in [*recorded, *made]:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text
    assert theirs("a dog").input_ids == [1, *ours.encode("a dog")]


def test_release_weights_begin_with_their_own_id(oracle_dir, tmp_path):
    """Checkpoints of October 2023 put id 2 in front of a sample (Q21)."""
    model_file = oracle_dir / "tokenizer_llama" / "tokenizer.model"
    files.write(Tokens(model_file, (*VOKENS, "<ImageHere>"), 1000, 2, (2,)), 2048, tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a").input_ids[0] == 2


@pytest.mark.parametrize(
    "kind, to, message",
    [
        ("stage1", "peft", "no LoRA.*as 'transformers'"),
        ("prefix", "peft", "a prefix as 'minigpt5'"),
        ("prefix", "transformers", "--nomerge"),
    ],
)
def test_a_model_without_a_place_in_the_format(run_folder, tmp_path, kind, to, message):
    with pytest.raises(ExportError, match=message):
        export_torch(run_folder(kind), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())
