# %% [markdown]
# # 2. Your own data, from JSONL to a page
#
# **Shows** the way of your own captions and images: a JSONL file, a check that finds what is wrong with it,
# a short training on it, and a page of what the model draws.
#
# **Takes** about two minutes on two CPU cores.
#
# **Needs** a checkout of this repository with `pip install -e ".[notebooks]"`. Everything is written below
# `runs/notebooks`. The towers are the tiny ones that ship with the package, which know coloured shapes
# only, so our "photos" are coloured shapes, drawn here; real photos need the published weights (notebook
# 3).

# %%
import json
import random
import shutil

from PIL import Image, ImageDraw

from helpers import RUNS, sh, show

OWN = RUNS / "own"
shutil.rmtree(OWN, ignore_errors=True)
(OWN / "photos").mkdir(parents=True)

# %% [markdown]
# ## Images and captions
#
# A record is one line: a caption and the path of its image, relative to the file. (Stories and dialogues
# have turns instead, with any number of texts and images:
# [docs/data.md](../docs/data.md#your-own-data-as-jsonl).)


# %%
def draw(colour: str, shape: str, draws: random.Random) -> Image.Image:
    """A photo of ours: a large shape somewhere near the middle of white paper."""
    image = Image.new("RGB", (96, 96), "white")
    left, top = draws.randint(8, 32), draws.randint(8, 32)
    pencil = ImageDraw.Draw(image)
    (pencil.ellipse if shape == "circle" else pencil.rectangle)((left, top, left + 52, top + 52), fill=colour)
    return image


draws, records = random.Random(0), []
for number in range(64):
    colour, shape = draws.choice(["red", "green", "blue", "yellow"]), draws.choice(["circle", "square"])
    draw(colour, shape, draws).save(OWN / f"photos/{number}.png")
    records.append(
        {"caption": f"a large {colour} {shape} on a white background", "image": f"photos/{number}.png"}
    )

show([Image.open(OWN / record["image"]) for record in records[:8]], [record["caption"] for record in records])

# %% [markdown]
# ## Check
#
# Two of our lines have mistakes. The check reads everything, decodes every image, and names each of them by
# file and line; its status is 1 then.


# %%
def write(name: str, some: list[dict]) -> None:
    """A JSONL file of records."""
    (OWN / name).write_text("".join(json.dumps(record) + "\n" for record in some))


broken = [dict(record) for record in records]
broken[10]["image"] = "photos/lost.png"
broken[20]["captoin"] = broken[20].pop("caption")
write("train.jsonl", broken)
sh("python -m minigpt5_jax.prepare check $RUNS/own/train.jsonl", lines=12, status=1)

# %%
write("train.jsonl", records[:56])
write("validation.jsonl", records[56:])
sh("python -m minigpt5_jax.prepare check $RUNS/own/train.jsonl", lines=12)

# %% [markdown]
# ## Train
#
# `configs/cc3m_small.py` is the run file for own captions on the tiny towers; `--config.data.train` says
# where they lie. For results worth looking at this short run learns faster than the run file's own setting.

# %%
sh(
    "python -m minigpt5_jax.train --config configs/cc3m_small.py --workdir $RUNS/own/run"
    " --config.data.format=jsonl --config.data.train=$RUNS/own/train.jsonl"
    " --config.data.validation=$RUNS/own/validation.jsonl --config.data.worker_count=0"
    " --config.data.max_length=56 --config.loss.caption=1.0"
    " --config.optimizer.lr_llm=1e-2 --config.optimizer.lr_mapper=2e-3"
    " --config.run.num_steps=120 --config.run.save_every=120"
    " --config.run.eval_every=0 --config.run.grid_every=0"
)

# %%
lines = [json.loads(line) for line in (OWN / "run/metrics.jsonl").read_text().splitlines()]
losses = [line for line in lines if "loss" in line]
for line in (losses[0], losses[-1]):
    print({name: round(line[name], 3) for name in ("step", "text", "image", "caption")})

# %% [markdown]
# ## Generate a page
#
# `force_image=first` makes the model begin with an image, trained long enough for that or not.

# %%
asked = ["red circle", "blue square", "green circle", "yellow square"]
prompts = " ".join(f"--prompt 'a large {what} on a white background'" for what in asked)
sh(
    "python -m minigpt5_jax.generate --checkpoint $RUNS/own/run --output $RUNS/own/page"
    f" --inference force_image=first {prompts}"
)

# %% [markdown]
# The page, `index.html`, opens in any browser; the same as Markdown stands beside it, and its pictures in a
# folder:

# %%
show([Image.open(path) for path in sorted((OWN / "page").rglob("*.png"))], asked)

# %% [markdown]
# Most of these pictures are empty: the tiny diffusion model is frozen and knows one object in one of four
# corners, never in the middle of the paper. What was to be shown is that data and machine work. With the
# published weights (notebook 3) the commands are the same, with `configs/stage1.py` in the place of
# `configs/cc3m_small.py`.
