# %% [markdown]
# # 5. Evaluate a run
#
# **Shows** how a run is scored: answers to held-out captions, metrics with their intervals, a report to
# look at, and whether one checkpoint is better than another.
#
# **Takes** about two minutes on two CPU cores, and two more to train where notebook 1 has not been run.
#
# **Needs** a checkout of this repository with `pip install -e ".[notebooks]"`. The networks of FID, CLIP
# scores and so on are not part of it: what they would score is skipped, with the reason. In the small world
# an oracle reads shapes, colours, sizes, textures and places back from the pixels, and counts.

# %%
import json

import matplotlib.pyplot as plt
from PIL import Image

from helpers import RUNS, sh, show

if not (RUNS / "demo/checkpoints").exists():  # the run of notebook 1
    sh("python -m minigpt5_jax.train --config configs/shapes_stage1.py --workdir $RUNS/demo")

# %% [markdown]
# ## Half of the training
#
# `--step` chooses a checkpoint. The answers are kept in the output folder, so a command that was stopped
# goes on where it was, and scores can be made again without generating again.

# %%
sh(
    "python -m minigpt5_jax.evaluate --checkpoint $RUNS/demo --step 160 --count 32"
    " --inference num_inference_steps=20 --output $RUNS/eval_half > /dev/null"
)

# %% [markdown]
# ## All of it, against the half
#
# `--against` compares on the same captions: the interval of a difference is drawn in pairs, and is narrower
# than what the two intervals by themselves would suggest.

# %%
sh(
    "python -m minigpt5_jax.evaluate --checkpoint $RUNS/demo --count 32"
    " --inference num_inference_steps=20 --output $RUNS/eval --against $RUNS/eval_half > /dev/null"
)

# %%
results = json.loads((RUNS / "eval/results.json").read_text())
for metric in results["metrics"]:
    if metric["status"] == "ok":
        interval = metric["ci"]
        print(f"{metric['name']:18} {metric['value']:.3f}  [{interval['low']:.3f}, {interval['high']:.3f}]")
print()
for metric in results["metrics"]:
    if metric["status"] != "ok":
        print(f"{metric['name']:22} skipped: {metric['why'][:80]}")

# %% [markdown]
# The share of captions with every attribute right, `oracle_all`, is the hardest. The bars are 95 %
# intervals, bootstrapped over captions.

# %%
half = json.loads((RUNS / "eval_half/results.json").read_text())
for place, (result, label) in enumerate([(half, "step 160"), (results, "step 320")]):
    scores = {m["name"]: m for m in result["metrics"] if m["name"].startswith("oracle_")}
    values = [m["value"] for m in scores.values()]
    errors = [
        [max(0, m["value"] - m["ci"]["low"]) for m in scores.values()],
        [max(0, m["ci"]["high"] - m["value"]) for m in scores.values()],
    ]
    positions = [number + 0.4 * place for number in range(len(values))]
    plt.bar(positions, values, width=0.4, yerr=errors, capsize=3, label=label)
plt.xticks([number + 0.2 for number in range(len(scores))], [name.removeprefix("oracle_") for name in scores])
plt.xlabel("attribute that the oracle reads")
plt.ylabel("share of captions drawn right")
plt.legend(loc="lower right")
plt.gcf().set_size_inches(7, 3)
plt.show()

# %% [markdown]
# And is the difference more than chance?

# %%
for row in results["comparisons"]:
    if row["ci"] and row["p"] is not None:
        low, high = row["ci"]["low"], row["ci"]["high"]
        print(f"{row['metric']:18} {row['difference']:+.3f}  [{low:+.3f}, {high:+.3f}]  p = {row['p']:.3f}")

# %% [markdown]
# ## One by one
#
# `per_sample.jsonl` has the scores of each caption, and `predictions/` what the model answered, in the
# schema of all data. `report.html` shows the best and the worst of them. Here are the
# worst:

# %%
scores = [json.loads(line) for line in (RUNS / "eval/per_sample.jsonl").read_text().splitlines()]
records = [
    json.loads(line) for line in (RUNS / "eval/predictions/conversations.jsonl").read_text().splitlines()
]
answers = {record["id"]: record["turns"] for record in records}
images, titles = [], []
for score in sorted(scores, key=lambda score: score["oracle_all"] or 0)[:6]:
    asked, answered = answers[score["id"]]
    paths = [part["path"] for part in answered["content"] if part["type"] == "image"]
    images.append(Image.open(RUNS / "eval/predictions" / paths[0]) if paths else None)
    wrong = [name.removeprefix("oracle_") for name in score if name.startswith("oracle_") and not score[name]]
    titles.append(
        f"{asked['content']}\nwrong: {', '.join(name for name in wrong if name != 'all') or 'nothing'}"
    )
show(images, titles, side=2.2, columns=3)

# %% [markdown]
# ## With the networks of the papers
#
# FID, CLIP scores and so on need published networks: `--weights inception=FILE --weights clip_l14=FOLDER`,
# and `--protocol paper` scores as MiniGPT-5's code did. Predictions of other programs are scored on the
# same samples with `--predictions` and `--references`. All of it is in
# [docs/evaluation.md](../docs/evaluation.md).
