# %% [markdown]
# # 1. The idea in pictures
#
# **Shows** how MiniGPT-5 draws: a language model writes eight new words, the *vokens*; a small transformer,
# the *mapper*, turns the model's states on them into the condition of a frozen diffusion model; and that
# draws. We train this in the small world of coloured shapes, then look at each stage from inside.
#
# **Takes** about four minutes on two CPU cores, most of it for training (once: the run is kept in
# `runs/notebooks/demo`, and notebook 5 evaluates it).
#
# **Needs** a checkout of this repository with `pip install -e ".[notebooks]"`. No downloads, no
# accelerator.

# %%
import csv
import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from helpers import RUNS, sh, show
from minigpt5_jax import Batch, MiniGPT5, Prompt, load_run

# %% [markdown]
# ## Train
#
# Stage 1 on 4,096 captioned scenes. The language model, the vision towers and the diffusion model are tiny
# and already trained; they come with the package and stay frozen. Only the rows of the vokens and the
# mapper learn.

# %%
if not (RUNS / "demo/checkpoints").exists():
    sh("python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir $RUNS/demo")

# %%
lines = [json.loads(line) for line in (RUNS / "demo/metrics.jsonl").read_text().splitlines()]
lines = [line for line in lines if "loss" in line]
steps = [line["step"] for line in lines]
for name, meaning in [
    ("text", "text: write the vokens"),
    ("image", "image: denoise"),
    ("caption", "caption"),
]:
    plt.plot(steps, [line[name] for line in lines], label=meaning)
plt.xlabel("training step")
plt.ylabel("loss")
plt.yscale("log")
plt.legend()
plt.gcf().set_size_inches(5, 3)
plt.show()

# %% [markdown]
# The caption loss pulls the mapper's output towards what the diffusion model's own text encoder makes of
# the caption; the image loss says whether the frozen diffusion model can denoise the right picture with it.
#
# ## Ask
#
# Captions of held-out scenes: no part of the model was trained on these combinations of shape, colour and
# texture.

# %%
run = load_run(RUNS / "demo")
model = MiniGPT5(run)
with open(RUNS / "demo/data/shapes_held_out.tsv") as file:
    captions = [row["caption"] for row in csv.DictReader(file, delimiter="\t")]
session = run.session(batch_size=8)
answers = session.generate([Prompt(text, seed=number) for number, text in enumerate(captions[:8])])
show([answer.images[0] if answer.images else None for answer in answers], captions)

# %% [markdown]
# What the language model wrote is only this: the token `[IMG0]`, which stands for a run of vokens.

# %%
print([run.tokenizer.decode(list(answer.token_ids)) for answer in answers[:3]])

# %% [markdown]
# ## Voken states
#
# A `Batch` is the one contract between data and model. Here are captions, each followed by its vokens, and
# what the language model's last layer holds where it writes them: eight vectors for each caption.

# %%
VOKENS = list(range(run.tokenizer.first_voken_id, run.tokenizer.first_voken_id + run.tokenizer.num_vokens))


def batch_of(texts: list[str]) -> Batch:
    """The captions as the model reads them, each with its vokens behind it."""
    prompts = [[run.tokenizer.bos_id, *run.tokenizer.encode(text)] for text in texts]
    count, length = len(texts), max(map(len, prompts)) + len(VOKENS)
    tokens = np.full((count, length), run.tokenizer.pad_id, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids) + len(VOKENS)] = ids + VOKENS
    starts = np.int32([len(ids) for ids in prompts])
    number, columns = np.arange(count, dtype=np.int32), np.arange(length, dtype=np.int32)
    none, no_image = np.zeros(0, np.int32), np.zeros((0, 1, 1, 3), np.uint8)
    return Batch(
        tokens=tokens,
        positions=np.tile(columns, (count, 1)),
        segment_ids=(columns < starts[:, None] + len(VOKENS)).astype(np.int32),
        voken_row=number,
        voken_start=starts,
        # The rest is of training: targets of the losses, and images to read.
        labels=np.full_like(tokens, -100),
        label_positions=np.zeros((count, 1), np.int32),
        row_id=number,
        item_id=number,
        item_mask=np.ones(count, bool),
        images=no_image,
        image_row=none,
        image_start=none,
        image_mask=none.astype(bool),
        target=no_image,
        caption_ids=np.zeros((count, 1), np.int32),
        caption_mask=np.zeros((count, 1), np.int32),
        has_caption=np.zeros(count, bool),
    )


@jax.jit
def look_inside(params, batch):
    """(voken states [m n d], condition [m q c], T(0) [1 q c]): what the mapper reads and writes."""
    composite = run.spec.template.bind(params)
    hidden = composite.backbone.hidden(composite.backbone.embed(batch), batch, None)
    vokens = composite.voken_states(hidden, batch.voken_row, batch.voken_start)
    return vokens, composite.condition(vokens), composite.unconditional()


vokens, condition, nothing = map(np.asarray, look_inside(run.params, batch_of(captions)))
print("voken states", vokens.shape, " condition", condition.shape)

# %% [markdown]
# Two directions of these states hold most of their spread (principal components). The colour of a point is
# the colour that its caption names, and its form is the shape: the states carry what must be drawn.

# %%
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
MARKERS = {
    "circle": "o",
    "disc": "o",
    "square": "s",
    "box": "s",
    "triangle": "^",
    "star": "*",
    "cross": "P",
    "plus": "P",
}


def named(words, text):
    """The first word of a caption that is one of these."""
    return next(word for word in text.split() if word in words)


def plane(vectors):
    """The two principal components of vectors [m ...]."""
    flat = vectors.reshape(len(vectors), -1)
    flat = flat - flat.mean(0)
    return flat @ np.linalg.svd(flat, full_matrices=False)[2][:2].T


def scatter(axis, points, title):
    """Points in the colours and shapes that their captions name."""
    for point, text in zip(points, captions):
        axis.scatter(*point, c=named(COLOURS, text), marker=MARKERS[named(MARKERS, text)], s=25)
    axis.set(title=title, xlabel="first principal component", ylabel="second principal component")


figure, axes = plt.subplots(1, 2, figsize=(9, 4))
scatter(axes[0], plane(vokens), "voken states (the mapper reads)")
scatter(axes[1], plane(condition), "condition (the mapper writes)")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## The mapper's output
#
# The condition has the form that the diffusion model's text encoder gives: a row of vectors, one for each
# of its positions. How far is it from T(0), the mapper's output for no vokens at all? Where this is near
# zero the condition says nothing about the caption; elsewhere is what steers the picture.

# %%
distance = np.linalg.norm(condition - nothing, axis=-1)  # [m q]
plt.imshow(distance[:24], aspect="auto", cmap="magma")
plt.xlabel("position of the condition")
plt.ylabel("caption")
plt.colorbar(label="distance from T(0)")
plt.gcf().set_size_inches(6, 3)
plt.show()

# %% [markdown]
# Nothing but the voken states reaches the picture. Between the states of two captions lie pictures between
# the two, drawn from one and the same noise; at the right end is what T(0) gives.

# %%
pair = [
    "a large solid red circle in the top left on a white background",
    "a large solid blue square in the bottom right on a black background",
]
first, second = np.asarray(look_inside(run.params, batch_of(pair))[0])
shares = [0, 0.25, 0.5, 0.75, 1]
between = [(1 - share) * first + share * second for share in shares]
images = session.draw([*between, np.zeros_like(first)], [3] * 6, [0] * 6)
show(images, [*[f"{share:.0%} of the way" for share in shares], "no vokens"])

# %% [markdown]
# ## Guidance and denoising, by hand
#
# The sampler starts from noise and asks the UNet, step by step, which noise it sees. *Guidance* asks twice,
# with the condition and with T(0), and goes further in the direction in which the two differ. This loop is
# DDIM; all scales are drawn side by side from the same noise.

# %%
generator = run.spec.generator
abar = generator.schedule.alphas_cumprod  # share of the picture that is left at each timestep


@jax.jit
def predict(params, latents, timestep, condition):
    """The noise that the UNet sees."""
    return run.spec.template.bind(params).generator.denoiser(condition)(latents, timestep)


@jax.jit
def decode(params, latents):
    """Pixels of latents."""
    return run.spec.template.bind(params).generator.decode(latents)


def denoise(condition, scales, steps=20, seed=3):
    """For each step, what the model takes for the clean picture so far: latents of each scale."""
    scales = jnp.asarray(scales, jnp.float32)[:, None, None, None]
    noise = jax.random.normal(jax.random.key(seed), (1, *generator.latent_shape))
    latents = jnp.repeat(noise, len(scales), 0)
    conditions = jnp.concatenate([jnp.repeat(x, len(scales), 0) for x in (nothing, condition)])
    timesteps = np.linspace(981, 1, steps).astype(np.int32)
    seen = []
    for now, after in zip(timesteps, [*timesteps[1:], 0]):
        without, given = jnp.split(predict(run.params, jnp.tile(latents, (2, 1, 1, 1)), now, conditions), 2)
        epsilon = without + scales * (given - without)
        clean = (latents - np.sqrt(1 - abar[now]) * epsilon) / np.sqrt(abar[now])
        latents = np.sqrt(abar[after]) * clean + np.sqrt(1 - abar[after]) * epsilon
        seen.append(clean)
    return timesteps, seen


# %%
caption, scales = captions[0], [0, 1, 2, 4, 7.5, 15]
timesteps, seen = denoise(condition[:1], scales)
print(caption)
show(decode(run.params, seen[-1]), [f"guidance {scale}" for scale in scales])

# %% [markdown]
# Scale 0 ignores the caption, 1 is the bare model; large scales exaggerate. The run's own setting is
# `inference.guidance_scale`. And the same picture while it appears, at that setting: what the model takes
# for the clean picture, from almost pure noise to the end.

# %%
print("inference.guidance_scale", run.config.inference.guidance_scale)
chosen = [0, 2, 4, 7, 10, 13, 16, 19]
timesteps, seen = denoise(condition[:1], [run.config.inference.guidance_scale])
pictures = decode(run.params, jnp.concatenate([seen[step] for step in chosen]))
show(pictures, [f"timestep {timesteps[step]}" for step in chosen])

# %% [markdown]
# The same with two lines, for everyday use:

# %%
answer = model.generate("a large striped red circle in the top left on a white background", seed=3)
answer.images[0].resize((128, 128))

# %% [markdown]
# **Next:** your own data in notebook 2, numbers in notebook 5; how it is all put together is in
# [ARCHITECTURE.md](../ARCHITECTURE.md).
