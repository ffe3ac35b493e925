"""How well the small world's language model describes images, and what it keeps of stories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minigpt5_jax.data.text.templates import END
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.common import Params
from minigpt5_jax.shapes.backbones import train_llama, train_vision
from minigpt5_jax.shapes.backbones.fields import labels
from minigpt5_jax.shapes.backbones.heads import Heads, read
from minigpt5_jax.shapes.backbones.llama_data import Histories, Rows, Sample, make_rows, plain
from minigpt5_jax.shapes.backbones.texts import DESCRIBE, description
from minigpt5_jax.shapes.backbones.train_llama import QFORMER, scene_states, with_states
from minigpt5_jax.shapes.wording import Description, understand
from minigpt5_jax.shapes.world import ATTRIBUTES, Scene, draw_scene

LONGEST = 56  # tokens of a description
ROWS = 50
STORIES = 60


def write_on(template: Template, params: Params, rows: Rows, steps: int) -> np.ndarray:
    """Ids i32[n steps] that the language model writes behind each row, the most probable ones."""

    @jax.jit
    def run(params, rows):
        model = template.bind(params)
        llm, (count, length) = model.llm, rows["ids"].shape
        embeds = model.embed(rows, jnp.zeros((count, length, llm.config.hidden_size)))
        valid = rows["valid"] > 0
        positions = jnp.broadcast_to(jnp.arange(length), (count, length))
        hidden, cache = llm.decode(
            embeds, positions=positions, valid=valid, cache=llm.init_cache(count, length + steps)
        )
        sizes = valid.sum(1)
        last = jnp.take_along_axis(hidden, sizes[:, None, None] - 1, axis=1)

        def step(carry, at):
            last, cache = carry
            ids = llm.logit_blocks(last)[0].argmax(-1)  # [n 1]
            hidden, cache = llm.decode(
                llm.embed(ids), positions=(sizes + at)[:, None], valid=jnp.ones_like(ids, bool), cache=cache
            )
            return (hidden, cache), ids[:, 0]

        return jax.lax.scan(step, (last, cache), jnp.arange(steps))[1].T

    return np.asarray(run(params, rows))


def descriptions(assets: Path, scenes: Sequence[Scene]) -> list[str]:
    """What the language model says of images of the scenes, asked in the first of the ways."""
    tokenizer = LlamaTokenizer(assets / "llama/tokenizer.model")
    look = train_vision.make_look(train_vision.read_eyes(assets), ROWS)
    template, params = train_llama.read(assets)
    ask, _ = description(scenes[0], np.random.default_rng(0))
    ask = ask.replace(next(form for form in DESCRIBE if form in ask), DESCRIBE[0])
    texts = []
    for start in range(0, len(scenes), ROWS):
        part = list(scenes[start : start + ROWS])
        part += part[:1] * (ROWS - len(part))
        samples = [Sample(ask, "", (scene,)) for scene in part]
        made = make_rows(tokenizer, samples, 32, ROWS, QFORMER.num_query_tokens)
        ids = write_on(template, params, with_states(*made, look), LONGEST)
        texts += [tokenizer.decode(row.tolist()).split(END)[0].strip() for row in ids]
    return texts[: len(scenes)]


def attributes_right(said: Description, scene: Scene) -> tuple[int, int]:
    """(right, all): the background, and the attributes of every object, found by its place.

    An object that the scene has not counts as one more wrong attribute.
    """
    right = int(said.background == scene.background)
    by_place = {found["place"]: found for found in said.objects if "place" in found}
    for item in scene.objects:
        found = by_place.get(item.place, {})
        right += sum(found.get(name) == getattr(item, name) for name in ATTRIBUTES)
    invented = max(0, len(said.objects) - len(scene.objects))
    return right, 1 + len(ATTRIBUTES) * len(scene.objects) + invented


def described(assets: Path, count: int = 100, seed: int = 2) -> dict[str, float]:
    """Share of attributes that descriptions of held-out images tell rightly, by number of objects."""
    random, result, total = np.random.default_rng(seed), {}, np.zeros(2)
    for objects in (1, 2, 3):
        scenes = [draw_scene(random, held_out=True, count=objects) for _ in range(count)]
        texts = descriptions(assets, scenes)
        counted = np.array([attributes_right(understand(t), s) for t, s in zip(texts, scenes, strict=True)])
        result[f"attributes right, {objects} objects"] = float(counted[:, 0].sum() / counted[:, 1].sum())
        total += counted.sum(0)
    return {"attributes right": float(total[0] / total[1]), **result}


def kept(assets: Path, heads: Heads, folder: Path, seed: int = 1) -> dict[str, float]:
    """Share of held-out scenes that the throw-away head wholly reads from the state on the first voken.

    Of captions, of story steps after the first (by whether texts describe the subject), of dialogues.
    """
    tokenizer, random = LlamaTokenizer(assets / "llama/tokenizer.model"), np.random.default_rng(seed)
    look = train_vision.make_look(train_vision.read_eyes(assets))
    states = scene_states(assets, tokenizer, look)
    histories = Histories(folder, "held_out", tokenizer, STORIES, STORIES, seed)

    def share(samples: list[Sample]) -> float:
        right = []
        for start in range(0, len(samples), 10):
            part = samples[start : start + 10]
            hidden = states(part + part[:1] * (10 - len(part)))[: len(part), 1]
            found, want = np.asarray(read(heads, jnp.asarray(hidden))), labels([s.drawn for s in part])
            right += [((f == w) | (w < 0)).all() for f, w in zip(found, want, strict=True)]
        return float(np.mean(right))

    result = {}
    for objects in (1, 2, 3):
        scenes = [draw_scene(random, held_out=True, count=objects) for _ in range(100)]
        result[f"scene read at the vokens, {objects} objects"] = share(
            [plain(scene, random) for scene in scenes]
        )
    return result | histories_kept(histories, share)


def histories_kept(histories: Histories, share) -> dict[str, float]:
    """The part of :func:`kept` that is about stories and dialogues."""
    truth = histories.truth
    groups: dict[str, list[Sample]] = {}
    for index in range(len(histories.stories)):
        example = histories.stories.example(index, 0)
        name, _, rest = example.item_id.partition("_")
        step, task = rest.split("-")
        if task != "gen" or step == "0":
            continue
        silent = truth[name]["image_only"]
        kind = "subject known from images only" if silent else "subject described"
        sample = histories.of_example(example)
        groups.setdefault(f"story's scene read at the vokens, {kind}", []).append(sample)
    for index in range(len(histories.dialogs)):
        example = histories.dialogs.example(index, 0)
        turn = int(example.item_id.split("_")[1].split("-")[0])
        if turn % 2 and example.target_image is not None:
            sample = histories.of_example(example)
            groups.setdefault("dialogue's scene read at the vokens", []).append(sample)
    return {name: share(samples) for name, samples in groups.items()}
