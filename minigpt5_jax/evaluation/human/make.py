"""A study: the page for raters, the key that only its author has, and exports."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.json_files import read_text, write_json
from minigpt5_jax.evaluation.human import exports
from minigpt5_jax.evaluation.human.design import Draw, Shown, arrange, deal, extra
from minigpt5_jax.evaluation.human.items import IDENTICAL, TRUTH, Item, Option, read_items
from minigpt5_jax.evaluation.human.page import write_page
from minigpt5_jax.evaluation.human.questions import QUESTIONS
from minigpt5_jax.evaluation.suite.samples import Scene

PAGE, KEY, RATERS, EXPORTS = "page", "key.json", "raters.csv", "exports"
RULES = {"least_controls_right": 0.5, "least_median_seconds": 3.0}
"""Raters below these are left out: fixed here, before anybody judged."""
INTRODUCTION = """You will see the beginning of a story or a conversation, and two ways in which it goes on. \
Please compare them and answer the questions below them. There is no right or wrong; choose "Tie" where \
neither is better.

Taking part is voluntary, and you may stop at any time. Nothing is stored about you but your answers and the \
time they took; they stay on this device until you save them to a file and hand it over."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to make.

    Attributes:
      references: JSONL.  systems: name -> folder of predictions, two of them.  output: a new folder.
      count: items; None for all samples.  judgements: raters of each item.  per_rater: items of one at most.
      questions: names.
      seed: of all draws; whoever knows it is not blind.  None draws a secret one, which the key records.
      introduction: file with the text before the first item; None for one that fits most studies.
      inline: images inside the page.
      base_url: https address where the folder of the page will be, for exports.
      completion_code: shown at the end.
    """

    references: str
    systems: Mapping[str, str]
    output: str
    count: int | None = None
    judgements: int = 3
    per_rater: int = 50
    questions: Sequence[str] = tuple(QUESTIONS)
    seed: int | None = None
    introduction: str | None = None
    inline: bool = True
    base_url: str | None = None
    completion_code: str = ""
    allow_outside_images: bool = False


def make(plan: Plan) -> dict[str, Any]:
    """Writes the study and returns where its page is, and how many items, raters and judgements it has.

    Raises:
      ConfigError, DataError, OSError: as their messages say.
    """
    output = Path(plan.output)
    if (output / KEY).exists():
        raise ConfigError(
            f"{output} holds a study, whose answers would no longer fit; choose another --output"
        )
    if plan.base_url and not plan.base_url.startswith("https://"):
        raise ConfigError(f"--base_url={plan.base_url} must begin with https://, as pages of platforms do")
    seed = secrets.randbits(64) if plan.seed is None else plan.seed
    draw = Draw(seed)
    items, controls = read_items(
        plan.references, plan.systems, plan.questions, plan.count, draw, plan.allow_outside_images
    )
    named = {f"{number:05d}": item for number, item in enumerate(_mixed([*items, *controls], draw))}
    raters = _raters(named, plan, draw)
    folder = output / PAGE
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = _Images(folder, plan.inline)
    used = {screen.item for screens in raters.values() for screen in screens}
    study = _study(plan, {name: item for name, item in named.items() if name in used}, raters, images)
    page = write_page(folder, study)
    key = _key(plan, seed, study["sha256"], named, raters)
    write_json(output / KEY, key)
    with_rater = f"{(plan.base_url or '').rstrip('/')}/index.html".lstrip("/")
    lines = ["rater,page", *(f"{token},{with_rater}?rater={token}" for token in raters)]
    (output / RATERS).write_text("\n".join(lines) + "\n", "utf-8")
    exports.write(output / EXPORTS, study, images.addresses, plan.base_url, plan.completion_code)
    judged = sum(not screen.repeat for screens in raters.values() for screen in screens)
    size = page.stat().st_size
    return {
        "items": len(items),
        "raters": len(raters),
        "judgements": judged,
        "page": str(page),
        "page_bytes": size,
    }


def _mixed(items: Sequence[Item], draw: Draw) -> list[Item]:
    """In an order that does not tell controls from others."""
    keys = {f"{item.kind} {item.sample}": item for item in items}
    return [keys[name] for name in draw.order(list(keys), "names")]


def _raters(named: Mapping[str, Item], plan: Plan, draw: Draw) -> dict[str, list[Shown]]:
    """Token -> screens, controls and repeats among them."""
    kinds = {kind: [name for name, item in named.items() if item.kind == kind] for kind in (TRUTH, IDENTICAL)}
    items = [name for name, item in named.items() if name not in {*kinds[TRUTH], *kinds[IDENTICAL]}]
    raters = {}
    for number, hand in enumerate(deal(items, plan.judgements, plan.per_rater, draw)):
        token = draw.digest("token", number)[:8]
        controls = [
            name for kind in kinds for name in draw.order(kinds[kind], kind, token)[: extra(len(hand))]
        ]
        raters[token] = arrange(hand, controls, token, draw)
    return raters


class _Images:
    """Images as the page has them: pixels only, by the hash of their content.

    Attributes:
      addresses: source in the page -> path in its folder, for exports.
    """

    def __init__(self, folder: Path, inline: bool):
        self._folder, self._inline = folder, inline
        self._sources: dict[Path, str] = {}
        self.addresses: dict[str, str] = {}

    def source(self, path: Path) -> str:
        """What the page shows; SampleError for an image that cannot be read."""
        if path not in self._sources:
            buffer = io.BytesIO()
            load_image(path).save(buffer, "PNG")
            data = buffer.getvalue()
            name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.png"
            (self._folder / name).write_bytes(data)
            inside = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            self._sources[path] = inside if self._inline else name
            self.addresses[self._sources[path]] = name
        return self._sources[path]


def _study(
    plan: Plan, named: Mapping[str, Item], raters: Mapping[str, Sequence[Shown]], images: _Images
) -> dict[str, Any]:
    """What the page knows: nothing of systems and of kinds."""

    def parts(scene: Scene) -> list[dict[str, str]]:
        return [{"text": p} if isinstance(p, str) else {"image": images.source(p)} for p in scene if p]

    def answer(option: Option) -> list[dict[str, str]]:
        return parts(tuple(part for part in (option.text, option.image) if part))

    introduction = INTRODUCTION if plan.introduction is None else read_text(plan.introduction)
    study = {
        "introduction": introduction,
        "completion_code": plan.completion_code,
        "questions": {name: QUESTIONS[name] for name in plan.questions},
        "items": {
            name: {"scenes": [parts(s) for s in item.scenes], "options": [answer(o) for o in item.options]}
            for name, item in named.items()
        },
        # With each item whether its options are exchanged.
        "raters": {
            token: [[screen.item, exchanged(named[screen.item], screen, plan.systems)] for screen in screens]
            for token, screens in raters.items()
        },
    }
    digest = hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **study}


def exchanged(item: Item, screen: Shown, systems: Mapping[str, str]) -> bool:
    """Whether an item's second option is on the left on a screen."""
    first = item.options[0].system in (next(iter(systems)), TRUTH)
    return first != screen.first_left


def _key(
    plan: Plan, seed: int, digest: str, named: Mapping[str, Item], raters: Mapping[str, Sequence[Shown]]
) -> dict[str, Any]:
    """What resolves answers; whoever has it is not blind."""
    return {
        "study_sha256": digest,
        "systems": list(plan.systems),
        "questions": list(plan.questions),
        "seed": seed,
        "salt": secrets.token_hex(16),
        "rules": RULES,
        "items": {
            name: {
                "kind": item.kind,
                "sample": item.sample,
                "options": [option.system for option in item.options],
                "expected": dict(item.expected),
            }
            for name, item in named.items()
        },
        "raters": {
            token: [
                {"item": s.item, "exchanged": exchanged(named[s.item], s, plan.systems), "repeat": s.repeat}
                for s in screens
            ]
            for token, screens in raters.items()
        },
    }
