"""Released checkpoints on pretrained weights: from Python, by the command, and on into stage 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file

import original
import tiny
from minigpt5_jax import export_torch, load_pretrained, load_run
from minigpt5_jax.config import ConfigError, use_stage2
from minigpt5_jax.diffusion.samplers import guided
from minigpt5_jax.inference.decode import decode
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.training import tuning
from minigpt5_jax.training.provenance import CheckpointError
from minigpt5_jax.weights.check import COVERAGE_FILE
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.foreign import minigpt5 as maps
from minigpt5_jax.weights.foreign.release import TABLES, first_of_both, tower_of_whole, trained_of_whole
from minigpt5_jax.weights.formats.load import open_weights
from minigpt5_jax.weights.table import WeightTableError
from minigpt5_jax.wiring import pretrained
from minigpt5_jax.wiring.model import build
from minigpt5_jax.wiring.pretrained import default_config, import_release, save_imported
from minigpt5_jax.wiring.restore import open_checkpoints, warm_start
from minigpt5_jax.wiring.weight_paths import uses_of

TABLE_DECAY = f"backbone/llm{tuning.TABLE_DECAY}"

ROOT = Path(__file__).parents[1]
RANK = 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> ConfigDict:
    """A stage-1 configuration on the oracle's weights."""
    return tiny.write_oracle_sources(tmp_path_factory.mktemp("sources"))


def stage1_config(sources: ConfigDict) -> ConfigDict:
    return sources.copy_and_resolve_references()


def stage2_config(sources: ConfigDict) -> ConfigDict:
    config = use_stage2(stage1_config(sources))
    config.model.backbone.lora_rank = RANK
    return config


def paths(config: ConfigDict) -> dict[str, str]:
    names = ("llm", "vit", "qformer", "llama_proj", "stable_diffusion")
    return {name: config.weights[name] for name in names}


def lightning(path: Path, state: dict, **more) -> Path:
    """A file as Lightning writes it."""
    torch.save(
        {
            "state_dict": state,
            "epoch": 1,
            "global_step": 7,
            "pytorch-lightning_version": "2.0.9",
            "hyper_parameters": {"learning_rate": 2e-5, "gpus": [0]},
            **more,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def tuned(oracle_dir, oracle_configs, tmp_path_factory):
    """(stage-2 file written from a real PEFT model, that model): LoRA with values, tables moved on."""
    import peft
    import transformers

    torch.manual_seed(0)
    state = torch.load(oracle_dir / "stage1.ckpt", weights_only=True)["state_dict"]
    config = transformers.LlamaConfig(**oracle_configs["llama"] | {"vocab_size": 1009})
    model = transformers.LlamaForCausalLM(config).eval()
    whole = load_file(oracle_dir / "weights.safetensors")
    prefix = maps.LLAMA_PREFIX
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix) and "inv_freq" not in k}
    )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(0.05 * torch.randn_like(value))
    kept = {
        f"{prefix}{k}": v
        for k, v in model.state_dict().items()
        if "lora_" in k or ".modules_to_save.default." in k
    }
    kept |= {k: v + 0.01 for k, v in state.items() if k.startswith("llm_to_t2i_mapping.")}
    return lightning(tmp_path_factory.mktemp("release") / "stage2.ckpt", kept, global_step=9), model


@pytest.fixture(scope="module")
def released(sources, oracle_dir):
    """The oracle's model as a user makes it: pretrained files, and the original's stage-1 checkpoint."""
    given = {**paths(sources), "config": stage1_config(sources)}
    return load_pretrained(**given, minigpt5=oracle_dir / "stage1.ckpt")


def test_whole_model_from_the_originals_files_is_the_originals(released, oracle_configs, oracle_weights):
    run = released
    vit = original.eva_config(oracle_configs["eva_vit"])
    table = original.whole_table(vit, run.spec.sizes["qformer"])
    want = table.to_params(
        original.split_rows(oracle_weights), {path: s.shape for path, s in run.spec.template.shapes.items()}
    )
    assert run.params.keys() == want.keys() == run.spec.template.shapes.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(run.params[path]), value, err_msg=path)
    assert (run.step, run.tokenizer.first_voken_id) == (0, 1000)


def test_it_answers_and_draws_as_the_original_did(released, oracle_cases):
    """Recorded case ``s1/i1_forced``: ids, the forced answer, T(h), T(0), five PNDM steps, the image."""
    case = {k.removeprefix("s1/i1_forced/"): v for k, v in oracle_cases.items() if "s1/i1_forced/" in k}
    tokenizer, template = released.tokenizer, released.spec.template
    ids = [tokenizer.bos_id, *tokenizer.encode(str(case["in/text"]))]
    dummy = int(case["out/sequences"][0, 0])
    sampling = SamplingConfig(
        max_new_tokens=int(case["in/max_new_tokens"]),
        do_sample=False,
        force_image="first",
        eos_ids=(1,),
        dummy_token_id=dummy,
        ban_inner_vokens=False,
    )
    sampler = released.spec.generator.make_sampler("pndm", 5)

    @jax.jit
    def run(params, ids, noise, keys):
        model = template.bind(params)
        embeds = model.backbone.llm.embed(ids)
        lengths = jnp.full(1, ids.shape[1], jnp.int32)
        llm = model.backbone.llm
        answer = decode(llm, embeds, lengths, keys, sampling, first_voken_id=1000, num_vokens=8)
        condition, nothing = model.condition(answer.voken_states[:, 0]), model.unconditional()
        both = jnp.concatenate([nothing, condition])

        def denoise(noisy, timestep):
            return model.generator.predict_noise(noisy, jnp.full(2, timestep, jnp.int32), both)

        latents = sampler.sample(guided(denoise, float(case["image/guidance_scale"])), noise)
        return embeds, answer.tokens, condition, nothing, latents, model.generator.decode(latents)

    noise = case["image/latents_init"].transpose(0, 2, 3, 1)
    keys = jax.random.split(jax.random.key(0), 1)
    embeds, tokens, condition, nothing, latents, image = run(released.params, np.int32([ids]), noise, keys)
    np.testing.assert_array_equal(tokens, case["out/sequences"])
    for ours, theirs, tolerance in (
        (embeds, case["mid/prompt_embeds_llm"], 0),
        (condition, case["image/prompt_embeds"], 5e-6),
        (nothing, case["image/negative_prompt_embeds"], 5e-6),
        (latents, case["image/latents"][-1:].transpose(0, 2, 3, 1), 1e-5),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
    apart = np.abs(np.asarray(image[0], int) - case["image/uint8"])
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # a value may round the other way


def test_stage_2_on_stage_1_gives_what_peft_gives(sources, oracle_dir, tuned):
    file, model = tuned
    config = stage2_config(sources)
    config.model.backbone.update(vit="none", qformer="none")
    # The tables were moved as a whole, so only taking them as a whole gives PEFT's numbers.
    with pytest.raises(WeightTableError, match=r"not those of weights\.llm"):
        import_release(config, oracle_dir / "stage1.ckpt", file)
    state = torch.load(file, weights_only=True)["state_dict"]
    plain = dict(state)
    for key, name in ((llama.EMBED, "model.embed_tokens"), (llama.HEAD, "lm_head")):
        wrapped = f"{maps.LLAMA_PREFIX}base_model.model.{name}.modules_to_save.default.weight"
        old = torch.load(oracle_dir / "stage1.ckpt", weights_only=True)["state_dict"][maps.LLAMA_PREFIX + key]
        plain[wrapped] = torch.cat([0.98 * old[:1000], state[wrapped][1000:]])
        module = model.base_model.model.get_submodule(name)
        module.modules_to_save["default"].weight.data.copy_(plain[wrapped])
    file = lightning(file.with_name("decayed.ckpt"), plain, global_step=9)
    imported = import_release(config, oracle_dir / "stage1.ckpt", file, rows="all")
    run = imported.run
    assert run.step == 9 and imported.about[str(file)]["hyper_parameters"]["learning_rate"] == 2e-5
    for factor, rest in imported.release.decay.values():
        assert abs(factor - 0.98) < 1e-5 and rest < 1e-5
    ids = np.array([[1, 5, 17, 900, 1000, 1001, 1007, 835]], np.int32)
    with torch.no_grad():
        want = model(torch.from_numpy(ids).long(), output_hidden_states=True)

    @jax.jit
    def forward(params, ids):
        llm = run.spec.template.bind(params).backbone.llm
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden = llm(llm.embed(ids), positions=positions, segment_ids=jnp.ones_like(ids))
        return hidden[0], llm.logits(hidden[0])

    hidden, logits = forward(run.params, ids)
    np.testing.assert_allclose(hidden, want.hidden_states[-1][0].numpy(), atol=3e-5)
    np.testing.assert_allclose(logits, want.logits[0].numpy(), atol=3e-5)


@pytest.mark.slow
def test_a_released_checkpoint_becomes_one_of_ours(sources, oracle_dir, tmp_path):
    config = stage1_config(sources)
    config.model.backbone.update(vit="none", qformer="none")
    imported = import_release(config, oracle_dir / "stage1.ckpt", rows="all")
    save_imported(imported, tmp_path)
    again = load_run(tmp_path)
    assert again.params.keys() == imported.run.params.keys()
    for path, value in imported.run.params.items():
        np.testing.assert_array_equal(np.asarray(again.params[path]), np.asarray(value), err_msg=path)
    [coverage] = json.loads((tmp_path / COVERAGE_FILE).read_text())
    assert len(coverage["consumed"]) == 131 and set(TABLES.values()) < set(coverage["written"])
    checkpoints = open_checkpoints(tmp_path)
    meta = checkpoints.meta(0)
    checkpoints.close()
    assert meta["bundle"] == {
        "stage": 1,
        "bos_id": 1,
        "prompt_set": "head",
        "voken_ids": list(range(1000, 1008)),
        "image_id": 1008,
    }
    [about] = meta["imported"]["files"].values()
    assert about["hyper_parameters"]["real_batch_size"] == 48 and about["epoch"] == 0
    export_torch(tmp_path, tmp_path / "back.ckpt", to="minigpt5")
    files = oracle_dir / "stage1.ckpt", tmp_path / "back.ckpt"
    there, back = (torch.load(file, weights_only=True) for file in files)
    for name in ("hyper_parameters", "epoch", "global_step"):
        assert back[name] == there[name], name
    with pytest.raises(CheckpointError, match="holds checkpoints; choose another --workdir"):
        save_imported(imported, tmp_path)

    # The next stage takes the tables with it, and notices other weights below them.
    second = stage2_config(sources)
    second.model.backbone.update(vit="none", qformer="none")
    run = load_pretrained(
        llm=second.weights.llm, stable_diffusion=second.weights.stable_diffusion, config=second
    )
    fresh = {p: v for p, v in run.params.items() if p.startswith("mapper/") or "/voken" in p or "/lora_" in p}
    frozen = {p: v for p, v in run.params.items() if p not in fresh}
    shardings = {p: v.sharding for p, v in run.params.items()}
    second.run.init_from = str(tmp_path)
    moved = warm_start(second, run.spec, fresh, frozen, shardings)
    assert moved.keys() == fresh.keys() | set(TABLES.values())
    other = {**frozen, "generator/vae/quant_conv/bias": frozen["generator/vae/quant_conv/bias"] + 1}
    with pytest.raises(CheckpointError, match="trained with different frozen weights"):
        warm_start(second, run.spec, fresh, other, shardings)
    with pytest.raises(CheckpointError, match=r"tokenizer\.backbone\.bos_id"):
        second.data.bos_id = 2
        warm_start(second, run.spec, fresh, frozen, shardings)


def test_a_checkpoint_folder_and_bad_arguments(sources, oracle_dir, tmp_path, tuned):
    assert default_config(None, "release_2023_10").data.bos_id == 2
    second = default_config(tuned[0], "head")
    assert second.model.backbone.lora_rank == RANK and second.loss.caption == 0
    with pytest.raises(ConfigError, match="unknown profile 'x'; known: release_2023_10, head"):
        default_config(None, "x")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_pretrained(minigpt5=tmp_path)
    (tmp_path / "checkpoints/00000007.orbax-checkpoint-tmp").mkdir(parents=True)  # half written
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_pretrained(minigpt5=tmp_path)
    with pytest.raises(ConfigError, match="brings its own configuration"):
        load_pretrained(minigpt5=tmp_path, config=stage1_config(sources))
    with pytest.raises(FileNotFoundError, match=r"no file or folder.*absent\.ckpt"):
        load_pretrained(**paths(sources), minigpt5=tmp_path / "absent.ckpt", config=stage1_config(sources))
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((oracle_dir / "stage1.ckpt").read_bytes()[:20_000])
    with pytest.raises(WeightFileError, match="truncated"):
        load_pretrained(**paths(sources), minigpt5=broken, config=stage1_config(sources))


def test_every_form_of_a_released_file_is_taken(oracle_dir, tmp_path):
    """The remedy that a refused file's message names, wherever the original's checkpoints are read."""
    file = oracle_dir / "stage1.ckpt"
    content = torch.load(file, weights_only=True)
    torch.save({**content, "hyper_parameters": {"save_dir": Path("/x")}}, tmp_path / "posix.ckpt")
    torch.save(content["state_dict"], tmp_path / "bare.ckpt")
    tensors = {name: value.contiguous().clone() for name, value in content["state_dict"].items()}
    save_file(tensors, tmp_path / "alone.safetensors")
    want = dict(open_weights(file, "state_dict"))
    for name in ("posix.ckpt", "bare.ckpt", "alone.safetensors"):
        ours = trained_of_whole(open_weights(tmp_path / name, "state_dict"))
        assert ours.keys() == want.keys()
        assert all(np.array_equal(ours[key], want[key]) for key in want), name
        about = pretrained._about(tmp_path / name)
        assert about.get("hyper_parameters") == ({"save_dir": "/x"} if name == "posix.ckpt" else None)


def test_the_width_of_a_prefix_is_that_of_its_file(tmp_path):
    tensors = {
        maps.PREFIX_EMBEDDING: torch.zeros(3, 48),
        maps.PREFIX_INNER: torch.zeros(20, 48),
        "model.prefix_encoder.transform.2.weight": torch.zeros(288, 20),
    }
    save_file(tensors, tmp_path / "stage2.safetensors")
    backbone = default_config(tmp_path / "stage2.safetensors", "head").model.backbone
    assert (backbone.prefix_tokens, backbone.prefix_hidden_size, backbone.lora_rank) == (3, 20, 0)


@pytest.fixture
def whole_config(sources, monkeypatch):
    """Settings of the oracle's model that take no size from a source, as a whole state dict states none."""
    config = stage1_config(sources)
    towers = {"llm": "llm", "vit": "vit", "qformer": "qformer", "unet": "sd/unet", "vae": "sd/vae"}
    towers["text_encoder"] = "sd/text_encoder"
    root = Path(sources.weights.llm).parent
    for _, use in uses_of(config).values():
        name = next((name for name in towers if uses_of(config)[name][1] is use), None)
        if name is not None:
            sizes = use.tower.read_sizes(root / towers[name] / "config.json")
            monkeypatch.setitem(use.tower.presets, name, sizes)
    config.weights.update(dict.fromkeys(config.weights, ""))
    for kind in ("backbone", "generator"):
        config.model[kind].update({name: name for name in towers if name in config.model[kind]})
    monkeypatch.setattr("minigpt5_jax.wiring.pretrained.validate", lambda config: config)
    return config


def test_a_whole_state_dict_of_the_original(sources, released, oracle_dir, whole_config):
    """The file is the source of every tower; tokenizers, schedule and sizes lie elsewhere."""
    whole = oracle_dir / "weights.safetensors"
    with pytest.raises(
        ConfigError, match="holds no tokenizers: give tokenizer=PATH .* and clip_tokenizer=PATH"
    ):
        load_pretrained(minigpt5=whole, config=whole_config)
    run = load_pretrained(
        minigpt5=whole,
        config=whole_config,
        tokenizer=oracle_dir / "tokenizer_llama/tokenizer.model",
        stable_diffusion=sources.weights.stable_diffusion,
    )
    for name in ("llm", "vit", "qformer", "unet", "vae", "text_encoder"):
        assert run.config.weights[name] == str(whole)
    assert run.params.keys() == released.params.keys()
    for path, value in released.params.items():
        np.testing.assert_array_equal(run.params[path], value, err_msg=path)


@pytest.fixture
def whole_of_both(tuned, oracle_dir, tmp_path):
    """(all of a model that PEFT has wrapped, in one file; what its second stage alone would have written)."""
    file, model = tuned
    prefix = maps.LLAMA_PREFIX
    whole = {
        key: value
        for key, value in load_file(oracle_dir / "weights.safetensors").items()
        if not key.startswith(prefix)
    }
    whole |= {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    second_file = torch.load(file, weights_only=True)["state_dict"]
    for name in ("model.embed_tokens", "lm_head"):  # a table whose old rows are those of the model, shrunk
        frozen, trained = (
            f"{prefix}base_model.model.{name}.{kind}.weight"
            for kind in ("original_module", "modules_to_save.default")
        )
        second_file[trained] = torch.cat([0.98 * whole[frozen][:1000], second_file[trained][1000:]])
    file = lightning(tmp_path / "stage2.ckpt", second_file)
    whole |= second_file
    save_file(
        {key: value.contiguous().clone() for key, value in whole.items()}, tmp_path / "whole.safetensors"
    )
    return tmp_path / "whole.safetensors", file


def test_a_whole_state_dict_of_stage_2_has_the_tensors_of_both_files(whole_of_both, oracle_dir):
    path, file = whole_of_both
    whole, second = open_weights(path, "state_dict"), open_weights(file, "state_dict")
    first, oracle = open_weights(oracle_dir / "stage1.ckpt"), open_weights(oracle_dir / "weights.safetensors")
    trained = trained_of_whole(whole)
    assert trained.keys() == second.keys() | {k for k in first if k.startswith(("fc.", "t2i_decoder_prompt"))}
    assert first_of_both(trained).keys() == first.keys()
    ours, theirs = tower_of_whole("llm", whole), tower_of_whole("llm", oracle)
    assert ours.keys() == {key for key in theirs if "inv_freq" not in key}
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert default_config(path, "head").model.backbone.lora_rank == RANK


@pytest.mark.slow
def test_a_whole_state_dict_of_stage_2_is_both_stages(sources, whole_of_both, oracle_dir, whole_config):
    path, file = whole_of_both
    second = stage2_config(sources)
    whole_config.model.backbone.lora_rank = RANK
    whole_config.tuning.update(second.tuning)
    run = load_pretrained(
        minigpt5=path,
        config=whole_config,
        tokenizer=oracle_dir / "tokenizer_llama/tokenizer.model",
        stable_diffusion=sources.weights.stable_diffusion,
    )
    want = load_pretrained(**paths(sources), minigpt5=(oracle_dir / "stage1.ckpt", file), config=second)
    assert run.params.keys() == want.params.keys() and any("lora_a" in path for path in run.params)
    for path, value in want.params.items():
        np.testing.assert_array_equal(run.params[path], value, err_msg=path)


@pytest.fixture(scope="module")
def run_file(sources, tmp_path_factory) -> Path:
    """The configuration as a user's run file."""
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(
        "from minigpt5_jax.config import apply_variant, get_config as base\n"
        "def get_config(variant=None):\n"
        "    config = base()\n"
        "    config.model.backbone.update(llm='source', vit='none', qformer='none')\n"
        "    config.model.generator.update(unet='source', vae='source', text_encoder='source',\n"
        "                                  scheduler='source', image_size=64)\n"
        "    config.model.mapper.update(d_model=32, nhead=8, dim_feedforward=128)\n"
        "    config.model.update(dtype='float32', param_dtype='float32')\n"
        f"    config.weights.update({dict(sources.weights.items())!r})\n"
        "    return apply_variant(config, variant)\n"
    )
    return file


def convert(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minigpt5_jax.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


@pytest.mark.slow
def test_the_command_imports_a_release_and_says_what_it_did(run_file, oracle_dir, tmp_path):
    config, workdir = f"{run_file}:release_2023_10", tmp_path / "run"
    stage1 = oracle_dir / "stage1.ckpt"
    done = convert("minigpt5", "--stage1", stage1, "--config", config, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    for text in (
        '"num_train_epochs": 2',
        "131 tensors used, 0 ignored",
        "V = 1009, [IMG0] is id 1000; BOS 2, prompts 'release'",
        "1.00000 times those of weights.llm, 0.00% left over",
        f"written: {tmp_path}/run/checkpoints",
    ):
        assert text in done.stdout
    assert load_run(tmp_path / "run").config.data.bos_id == 2


def test_decay_of_the_files_goes_on_where_the_run_decays_its_tables(sources, oracle_dir, tmp_path):
    """With ``optimizer.decay_frozen_rows`` the tables' share of decay is measured and trained on (Q3)."""
    state = dict(torch.load(oracle_dir / "stage1.ckpt", weights_only=True)["state_dict"])
    for key in (maps.LLAMA_PREFIX + llama.EMBED, maps.LLAMA_PREFIX + llama.HEAD):
        state[key] = torch.cat([0.99 * state[key][:1000], state[key][1000:]])
    file = lightning(tmp_path / "stage1.ckpt", state)
    config = stage1_config(sources)
    config.model.backbone.update(vit="none", qformer="none")
    config.optimizer.decay_frozen_rows = True
    run = import_release(config, file).run
    assert abs(float(run.params[TABLE_DECAY]) - 0.01) < 1e-6 and run.spec.labels[TABLE_DECAY] == "llm"

    @jax.jit
    def read(params, ids):
        model_llm = run.spec.template.bind(params).backbone.llm
        return model_llm.embed(ids), model_llm.logits(jnp.ones(48))

    embeds, logits = read(run.params, np.int32([[5, 1003]]))
    embedding, head = (state[maps.LLAMA_PREFIX + key].numpy() for key in (llama.EMBED, llama.HEAD))
    np.testing.assert_allclose(embeds[0], embedding[[5, 1003]], rtol=1e-6)
    np.testing.assert_allclose(logits, head.sum(1), rtol=1e-5, atol=1e-5)
    # Frozen, the share would stay and the tables with it: that is refused.
    config.tuning.rules = ((r"mapper/.*", "mapper"), (".*", "frozen"))
    with pytest.raises(ConfigError, match="decay_frozen_rows=True, but tuning.rules freeze"):
        build(config)
