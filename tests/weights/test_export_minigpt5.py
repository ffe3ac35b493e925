"""Export as the original's Lightning files: its names, shapes and rules of reading (fidelity 7.1 to 7.5)."""

from __future__ import annotations

import builtins
import dataclasses

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from minigpt5_jax.export import export_torch
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.mapper.model import FeatureMapper, MapperConfig
from minigpt5_jax.shapes.files import ASSETS, read_config
from minigpt5_jax.weights.export import minigpt5
from minigpt5_jax.weights.export.model import ExportError
from minigpt5_jax.weights.foreign import minigpt5 as maps
from minigpt5_jax.weights.foreign.release import read_release

LLAMA = read_config(ASSETS, "llama")
WORDS, LAYERS = LLAMA.vocab_size, LLAMA.num_hidden_layers
IDS = [1, 261, 424, 443, *range(WORDS, WORDS + 8), 269]
TABLES = ("model.embed_tokens", "lm_head")
PEFT = "model.llama_model.base_model.model."


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """``exported(kind, stage)``: the ``.ckpt`` of a run."""
    folder, made = tmp_path_factory.mktemp("ckpt"), {}

    def get(kind: str, stage: int | None = None):
        if (kind, stage) not in made:
            path = folder / f"{kind}{stage or ''}.ckpt"
            export_torch(run_folder(kind), path, to="minigpt5", stage=stage)
            made[kind, stage] = path
        return made[kind, stage]

    return get


def read(path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def attention_names(half: str, layers: int, names: tuple[str, ...]) -> set[str]:
    return {
        f"llm_to_t2i_mapping.{half}.layers.{i}.{name}.{leaf}"
        for i in range(layers)
        for name in names
        for leaf in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }


def transformer_names(layers: int) -> set[str]:
    """Names under ``llm_to_t2i_mapping`` as fidelity 7.2 lists them."""
    names = attention_names("encoder", layers, ("self_attn",))
    names |= attention_names("decoder", layers, ("self_attn", "multihead_attn"))
    for half, norms in (("encoder", 2), ("decoder", 3)):
        plain = ["linear1", "linear2", *(f"norm{k + 1}" for k in range(norms))]
        modules = [f"layers.{i}.{name}" for i in range(layers) for name in plain] + ["norm"]
        names |= {f"llm_to_t2i_mapping.{half}.{m}.{leaf}" for m in modules for leaf in ("weight", "bias")}
    return names


FC = {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias", "t2i_decoder_prompt"}
LORA = {
    f"{PEFT}model.layers.{{i}}.self_attn.{name}.lora_{factor}.default.weight"
    for name in ("q_proj", "v_proj")
    for factor in "AB"
}
PREFIX = {"model.prefix_encoder.embedding.weight"} | {
    f"model.prefix_encoder.transform.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
}
PLAIN = {f"model.llama_model.{name}.weight" for name in TABLES}
WRAPPED = {f"{PEFT}{name}.modules_to_save.default.weight" for name in TABLES}


def layers_of(names: set[str], count: int) -> set[str]:
    return {name.format(i=i) for name in names for i in range(count)}


@pytest.mark.parametrize(
    "kind, stage, names",
    [
        ("stage1", None, FC | transformer_names(2) | PLAIN),
        ("lora", None, transformer_names(2) | layers_of(LORA, LAYERS) | WRAPPED),
        ("lora", 2, transformer_names(2) | layers_of(LORA, LAYERS) | WRAPPED),
        ("lora", 1, FC | transformer_names(2) | PLAIN),
        ("prefix", None, transformer_names(2) | PREFIX | PLAIN),
    ],
)
def test_the_names_are_the_originals(exported, kind, stage, names):
    state = read(exported(kind, stage))
    assert state.keys() == names
    assert {value.dtype for value in state.values()} == {torch.float32}
    shapes = {
        "t2i_decoder_prompt": (1, 77, 128),
        "fc.0.weight": (128, 128),
        "llm_to_t2i_mapping.encoder.layers.1.self_attn.in_proj_weight": (384, 128),
        "llm_to_t2i_mapping.decoder.layers.0.linear1.weight": (512, 128),
        f"{PEFT}model.layers.3.self_attn.q_proj.lora_A.default.weight": (8, 128),
        f"{PEFT}model.layers.3.self_attn.v_proj.lora_B.default.weight": (128, 8),
        "model.prefix_encoder.embedding.weight": (5, 128),
        "model.prefix_encoder.transform.0.weight": (16, 128),
        "model.prefix_encoder.transform.2.weight": (2 * LAYERS * 128, 16),
        **dict.fromkeys(PLAIN | WRAPPED, (WORDS + 9, 128)),
    }
    assert all(tuple(state[name].shape) == shape for name, shape in shapes.items() if name in state)


def test_full_size_files_have_131_and_254_tensors():
    """32 language-model layers, 4 + 4 of the mapper; narrow, so that it takes no memory."""
    config = MapperConfig(llm_hidden_size=4, d_model=8, dim_feedforward=4, num_queries=3)
    shapes = Template.of(lambda rngs: FeatureMapper(config, rngs=rngs)).shapes
    mapper = {f"mapper/{path}": np.ones(shape.shape, np.float32) for path, shape in shapes.items()}
    rows = {path: np.ones((9, 4), np.float32) for path in minigpt5.ROWS}
    stage1 = maps.trained_to_source({**mapper, **rows}, np.ones((5, 4)), np.ones((4, 5)))
    assert stage1.keys() == FC | transformer_names(4) | PLAIN and len(stage1) == 131
    lora = {
        f"backbone/llm/layers/self_attn/{name}/lora_{x}": np.ones(shape, np.float32)
        for name in ("q_proj", "v_proj")
        for x, shape in (("a", (32, 4, 8)), ("b", (32, 8, 4)))
    }
    tuned = {k: v for k, v in mapper.items() if not k.startswith(("mapper/fc/", "mapper/queries"))}
    stage2 = maps.trained_to_source({**tuned, **rows, **lora}, np.ones((5, 4)), np.ones((4, 5)))
    assert stage2.keys() == transformer_names(4) | layers_of(LORA, 32) | WRAPPED and len(stage2) == 254


def test_the_container_is_one_that_lightning_reads(exported):
    container = torch.load(exported("stage1"), map_location="cpu", weights_only=True)
    assert set(container) == {
        "epoch",
        "global_step",
        "pytorch-lightning_version",
        "state_dict",
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "hparams_name",
        "hyper_parameters",
    }
    assert (container["epoch"], container["global_step"], container["hparams_name"]) == (0, 7, "kwargs")
    assert container["callbacks"] == {} and container["optimizer_states"] == []
    hyper = container["hyper_parameters"]
    assert (hyper["learning_rate"], hyper["warmup_steps"], hyper["real_batch_size"]) == (1e-2, 40, 16)


class Original(nn.Module):
    """The original's modules under its names, and its rules for reading a checkpoint (fidelity 7.4)."""

    def __init__(self, sizes: MapperConfig, *, lora: bool = False):
        super().__init__()
        config = transformers.LlamaConfig.from_pretrained(ASSETS / "llama", vocab_size=WORDS + 9)
        llama = transformers.LlamaForCausalLM(config)
        pretrained = transformers.LlamaForCausalLM.from_pretrained(ASSETS / "llama", dtype=torch.float32)
        body = {k: v for k, v in pretrained.state_dict().items() if v.shape == llama.state_dict()[k].shape}
        assert len(llama.load_state_dict(body, strict=False).missing_keys) == 2, "the two tables"
        if lora:
            llama = peft.get_peft_model(
                llama,
                peft.LoraConfig(
                    r=8,
                    lora_alpha=16,
                    lora_dropout=0.05,
                    target_modules=["q_proj", "v_proj"],
                    task_type="CAUSAL_LM",
                    modules_to_save=["lm_head", "embed_tokens"],
                ),
            )
        self.model = nn.Module()
        self.model.llama_model = llama
        width = sizes.d_model
        self.fc = nn.Sequential(nn.Linear(sizes.llm_hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.llm_to_t2i_mapping = nn.Transformer(
            width,
            sizes.nhead,
            sizes.num_encoder_layers,
            sizes.num_decoder_layers,
            sizes.dim_feedforward,
            dropout=0.0,
            norm_first=True,
            batch_first=True,
        )
        self.t2i_decoder_prompt = nn.Parameter(torch.zeros(1, sizes.num_queries, width))
        self.lora = lora
        self.eval()

    def load(self, path, *, strict: bool) -> None:
        """``on_load_checkpoint`` and then a load."""
        incoming, state = read(path), self.state_dict()
        if self.lora:
            for word in ("lm_head", "embed_tokens"):
                for name in [name for name in incoming if word in name]:
                    state.update(dict.fromkeys([key for key in state if word in key], incoming[name]))
        self.load_state_dict(state | incoming, strict=strict)

    @torch.no_grad()
    def forward(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(final states, logits, condition) of a row whose vokens begin at place 4."""
        out = self.model.llama_model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        states = out.hidden_states[-1]
        prompt = self.t2i_decoder_prompt
        return states[0], out.logits[0], self.llm_to_t2i_mapping(self.fc(states[:, 3:11]), prompt)


@pytest.mark.parametrize("kind", ["stage1", "lora"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_original_computes_what_we_do(exported, run_of, hidden_of, condition_of, kind):
    run = run_of(kind)
    sizes = MapperConfig(
        llm_hidden_size=128, d_model=128, dim_feedforward=512, num_encoder_layers=2, num_decoder_layers=2
    )
    original = Original(sizes, lora=kind == "lora")
    original.load(exported(kind, 1), strict=kind == "stage1")  # PEFT's names are others
    if kind == "lora":  # stage 2 stands on stage 1 and is no use without
        before = original(IDS)[1]
        original.load(exported(kind), strict=True)
        assert not torch.equal(original(IDS)[1], before), "the factors act"
    states, logits, condition = original(IDS)
    ours, our_logits = hidden_of(run, IDS)
    our_condition = condition_of(run, ours[None, 3:11])
    for theirs, value in ((states, ours), (logits, our_logits), (condition, our_condition)):
        np.testing.assert_allclose(theirs, value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("kind", ["stage1", "lora", "prefix"])
def test_the_way_there_and_back_changes_no_bit(exported, run_of, kind):
    run = run_of(kind)
    shapes = {
        path: shape.shape
        for path, shape in run.spec.template.shapes.items()
        if path.startswith("mapper/") or any(p in path for p in ("/voken", "/lora_", "/prefix_encoder/"))
    }
    files = (exported(kind, 1), exported(kind))
    stage1, stage2 = ({name: value.numpy() for name, value in read(path).items()} for path in files)
    again = read_release(stage1, None if kind == "stage1" else stage2, shapes, vocab_size=WORDS)
    assert again.params.keys() == shapes.keys()
    assert all(np.array_equal(again.params[path], run.params[path]) for path in shapes)


def test_stage_2_of_a_run_that_has_none(run_folder, tmp_path):
    with pytest.raises(ExportError, match="neither LoRA nor a prefix"):
        export_torch(run_folder("stage1"), tmp_path / "a.ckpt", to="minigpt5", stage=2)
    assert not list(tmp_path.iterdir())


def test_what_the_original_never_saves_is_refused(run_folder, monkeypatch, tmp_path):
    """A run that trained the UNet as well: silently leaving it out would be another model."""
    from minigpt5_jax.wiring import export_view as trained

    read_exportable = trained.read_exportable

    def with_unet(*args):
        model = read_exportable(*args)
        extra = {"generator/unet/conv_in/bias": np.zeros(48, np.float32)}
        return dataclasses.replace(
            model, params={**model.params, **extra}, trainable=model.trainable | frozenset(extra)
        )

    monkeypatch.setattr("minigpt5_jax.export.read_exportable", with_unet)
    with pytest.raises(ExportError, match="generator/unet/conv_in/bias"):
        export_torch(run_folder("stage1"), tmp_path / "a.ckpt", to="minigpt5")


def test_without_torch_one_clear_error(run_folder, monkeypatch, tmp_path):
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(ExportError, match=r"minigpt5_jax\[torch\]"):
        export_torch(run_folder("stage1"), tmp_path / "a.ckpt", to="minigpt5")
    assert not list(tmp_path.iterdir())
