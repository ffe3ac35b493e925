# %% [markdown]
# # 3. From the released weights to a story
#
# **Shows** how the published files become a model of this package: what is to be fetched, how MiniGPT-5's
# released checkpoints are imported, and how the model continues a story with texts and images.
#
# **Takes** about two minutes on two CPU cores as it stands.
#
# **Needs** a checkout of this repository with `pip install -e ".[notebooks]"`.
#
# **Texts and images below are nonsense, and have to be.** The published files are 26 GB and not part of
# this repository, so this notebook is executed on tiny files of random numbers. These have the formats, the
# folders and the names of tensors of the real ones, and every command is the one that you will type. The
# last section says what to replace.

# %%
import json
import shutil
import sys

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from helpers import ROOT, RUNS, sh, show
from minigpt5_jax import MiniGPT5

WORK = RUNS / "released"
shutil.rmtree(WORK, ignore_errors=True)

# %% [markdown]
# ## What is needed
#
# `convert plan` says, for each source, what it is, how large, under which licence, from where, and whether
# what is on disk fits. It ends with what to give to the next commands.

# %%
sh("python -m minigpt5_jax.convert plan --config configs/stage2_vist.py", lines=14)

# %% [markdown]
# ## Tiny files in the real formats
#
# The tests of this package make them, and so do we: a LLaMA with its tokenizer, EVA ViT, Q-Former and
# projection, and Stable Diffusion as a folder of diffusers.

# %%
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

tiny.write_oracle_sources(WORK / "weights")
for path in sorted((WORK / "weights").rglob("*.safetensors")):
    print(f"{path.stat().st_size / 1e6:5.1f} MB  {path.relative_to(WORK)}")

# %% [markdown]
# The checkpoint of stage 1 was written by PyTorch Lightning from the original's code. That of stage 2 has
# the same tables and mapper, and LoRA under the names that PEFT gives; ours is made here.

# %%
LLAMA, PEFT, RANK = "model.llama_model.", "model.llama_model.base_model.model.", 2
whole = load_file(ROOT / "tests/oracle/weights.safetensors")
values = np.random.default_rng(0)

second = {name: value for name, value in whole.items() if name.startswith("llm_to_t2i_mapping.")}
for table in ("model.embed_tokens", "lm_head"):
    second[f"{PEFT}{table}.modules_to_save.default.weight"] = whole[f"{LLAMA}{table}.weight"]
for name, value in whole.items():
    if name.startswith(LLAMA) and name.endswith(("q_proj.weight", "v_proj.weight")):
        at = PEFT + name.removeprefix(LLAMA).removesuffix("weight")
        width = value.shape[0]
        second[f"{at}lora_A.default.weight"] = values.normal(0, 0.05, (RANK, width)).astype(np.float32)
        second[f"{at}lora_B.default.weight"] = values.normal(0, 0.05, (width, RANK)).astype(np.float32)

shutil.copy(ROOT / "tests/oracle/stage1.ckpt", WORK / "stage1_cc3m.ckpt")
save_file(second, WORK / "stage2_vist.safetensors")
print(len(second), "tensors in stage 2, such as", next(name for name in second if "lora_A" in name))

# %% [markdown]
# ## Import
#
# `TINY` says that towers have the sizes of their files and not those of the paper, and shortens what is
# read and written; with the real files it goes away. The command prints what the files say about
# themselves, and for how many tensors a place was found.

# %%
TINY = (
    "--config.model.backbone.llm=source --config.model.backbone.vit=source"
    " --config.model.backbone.qformer=source"
    " --config.model.generator.unet=source --config.model.generator.vae=source"
    " --config.model.generator.text_encoder=source --config.model.generator.scheduler=source"
    " --config.model.generator.image_size=64 --config.model.backbone.lora_rank=2"
    " --config.model.mapper.d_model=32 --config.model.mapper.nhead=8"
    " --config.model.mapper.dim_feedforward=128"
    " --config.model.dtype=float32 --config.model.param_dtype=float32"
    " --config.data.max_length=384 --config.inference.max_new_tokens=24"
    " --config.inference.num_inference_steps=4"
)
sh(
    "python -m minigpt5_jax.convert minigpt5 --stage1 $RUNS/released/stage1_cc3m.ckpt"
    " --stage2 $RUNS/released/stage2_vist.safetensors"
    " --config configs/stage2_vist.py:release_2023_10 --workdir $RUNS/released/run"
    " --config.weights.llm=$RUNS/released/weights/llm --config.weights.vit=$RUNS/released/weights/vit"
    " --config.weights.qformer=$RUNS/released/weights/qformer"
    " --config.weights.llama_proj=$RUNS/released/weights/llama_proj"
    f" --config.weights.stable_diffusion=$RUNS/released/weights/sd {TINY}",
    lines=16,
)

# %% [markdown]
# ## A story
#
# How it begins: two sentences, each with its image, in the schema of all data here
# ([docs/data.md](../docs/data.md#your-own-data-as-jsonl)).

# %%
for name, sky, ground in (("1", "lightskyblue", "olivedrab"), ("2", "midnightblue", "sienna")):
    photo = Image.new("RGB", (160, 120), sky)
    ImageDraw.Draw(photo).rectangle((0, 80, 160, 120), fill=ground)
    photo.save(WORK / f"{name}.jpg")
content = [
    {"type": "text", "text": "My sister arrived early to help me with the family barbecue."},
    {"type": "image", "path": "1.jpg"},
    {"type": "text", "text": "Every one else arrived soon after."},
    {"type": "image", "path": "2.jpg"},
]
story = {"id": "barbecue", "turns": [{"role": "user", "content": content}]}
(WORK / "story.jsonl").write_text(json.dumps(story) + "\n")

# %% [markdown]
# `generate story` continues it scene by scene; what the model wrote and drew is read again for the next
# scene. `force_image` is for our random numbers, which might write no image by themselves.

# %%
sh(
    "python -m minigpt5_jax.generate story --checkpoint $RUNS/released/run --jsonl $RUNS/released/story.jsonl"
    " --scenes 2 --inference force_image=after_text --output $RUNS/released/page"
)

# %% [markdown]
# `index.html` in that folder is for a browser; `conversations.jsonl` is the same in the schema that it was
# read in:

# %%
told = json.loads((WORK / "page/conversations.jsonl").read_text().splitlines()[0])
parts = []
for turn in told["turns"]:
    content = turn["content"]  # a list of parts, or one text
    parts += content if isinstance(content, list) else [{"type": "text", "text": content}]
for part in parts:
    print(part["type"], "", part.get("text") or part["path"])
show([Image.open(WORK / "page" / part["path"]) for part in parts if part["type"] == "image"])

# %% [markdown]
# In Python the same model answers what you give it, texts and images in any order:

# %%
model = MiniGPT5.from_pretrained(WORK / "run", force_image="after_text")
opening = ["My sister arrived early.", Image.open(WORK / "1.jpg"), "What happened next?"]
for part in model.generate(opening, seed=1).parts:
    print(part if isinstance(part, str) else part.size)

# %% [markdown]
# ## With the real files
#
# 1. Fetch and convert what `convert plan` lists: [docs/weights.md](../docs/weights.md) has each command.
#    This gives the folders `weights/llm`, `weights/vit`, `weights/qformer`, `weights/llama_proj` and
#    `weights/stable_diffusion`.
# 2. Leave out the section "Tiny files in the real formats".
# 3. In "Import", give `stage1_cc3m.ckpt` and `stage2_vist.ckpt` of `KZ-ucsc/MiniGPT5`, the folders of step
#    1, and leave out `TINY`. Then let `python -m minigpt5_jax.convert verify --checkpoint RUN` test the
#    result.
# 4. In "A story", give your own photos and leave out `force_image`.
#
# The original needs about 23 GB of GPU memory for this. No machine of this project has held the published
# files yet; the readers are tested on files such as these ones.
