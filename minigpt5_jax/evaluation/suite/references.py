"""The held-out data of a run: prompts to answer, and the file of references that answers are scored by."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError
from minigpt5_jax.data.errors import DataError, SampleError
from minigpt5_jax.data.images import load_image
from minigpt5_jax.data.samples.dialogs import DialogRules
from minigpt5_jax.data.samples.example import Example
from minigpt5_jax.data.samples.stories import CONTEXTS, Story, StoryRules
from minigpt5_jax.data.sources import MMDialogSource, Source
from minigpt5_jax.data.sources.base import stories_of
from minigpt5_jax.data.text.prompts import STORY_PROMPTS
from minigpt5_jax.data.text.tokenizer import SPECIAL_PATTERN
from minigpt5_jax.inference.session import Prompt
from minigpt5_jax.inference.transcript import seed_of
from minigpt5_jax.wiring.inputs import OPENERS, SHAPES
from minigpt5_jax.wiring.restore import OpenedRun
from minigpt5_jax.wiring.session import override

FILE = "references.jsonl"
TASK_OF = {
    "cc3m": "pairs",
    "cc3m_tar": "pairs",
    "parquet": "pairs",
    "shapes": "pairs",
    "vist": "stories",
    "shapes_stories": "stories",
    "mmdialog": "dialogs",
    "shapes_dialogs": "dialogs",
    "jsonl": "dialogs",
}
"""``data.format`` -> the task that its samples are for."""
STORY_TASKS = {"stories": "gen", "last_step": "gen", "narration": "understanding"}
Content = list[dict[str, Any]]


class HasStories(Protocol):
    """A source that gives whole stories."""

    rows: int

    def story(self, row: int) -> Story: ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sample to predict.

    Attributes:
      group: its pair, story or dialogue.  before: turns of the record that come before the answer.
      answer: content of the turn that is wanted.  An image is ``{"type": "image", "source": ...}``.
      pair: its record is a pair.
    """

    group: str
    example: Example
    before: list[dict[str, Any]]
    answer: Content
    pair: bool = False


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a run is asked.

    Attributes:
      records: of the references, images as sources.  prompts: sample -> prompt, in order.
      skipped: (sample, why) that cannot be used.
    """

    records: list[dict[str, Any]]
    prompts: dict[str, Prompt]
    skipped: list[tuple[str, str]]


def with_data(run: OpenedRun, values: Mapping[str, str], folder: str | Path) -> OpenedRun:
    """``run`` with ``data`` keys replaced by values as Python spells them: other data than its own.

    Args:
      folder: where data of the small world are drawn, so that the run's own folder is left as it is.

    Raises:
      ConfigError: an unknown key, or a value that does not fit.
    """
    config = ConfigDict(run.config.to_dict())
    config.run.workdir = str(folder)
    return dataclasses.replace(run, config=override(config, values, "data"))


def task_of(config: ConfigDict, task: str | None) -> str:
    """The task, by default that of the run's data.

    Raises:
      ConfigError: the run's data are of another kind, or do not say.
    """
    form, own = config.data.format, TASK_OF.get(config.data.format)
    if own is None and task is None:
        raise ConfigError(f"data.format={form} may be of any task: give --task")
    fitting = STORY_TASKS if own == "stories" else (own,)
    if own is not None and task is not None and task not in fitting:
        raise ConfigError(
            f"--task={task} is not for data.format={form}, whose task is {own}; choose other data: --data"
        )
    return str(task or own)


def questions(run: OpenedRun, task: str, context: str, count: int | None, seed: int) -> Questions:
    """The first ``count`` samples (None for all) of a run's held-out data.

    Args:
      context: of the last step, one of the papers' contexts.
      seed: of the answers; each has one of its own by the name of its sample.

    Raises:
      ConfigError, DataError: the run has no held-out data, or they cannot be read.
    """
    if context not in CONTEXTS:
        raise ConfigError(f"--context={context} is none of {', '.join(CONTEXTS)}")
    config = run.config
    source = _open(config, run)
    found = _Collector(count, seed)
    for asked in _story_questions(config, source, task, context) if task in STORY_TASKS else _others(source):
        if isinstance(asked, SampleError):
            found.skipped.append((asked.where, asked.reason))
        elif not found.take(asked):
            break
    if count is not None and len(found.prompts) < count:
        usable = len(found.prompts)
        raise DataError(
            f"--count={count}, but the run's validation data have {usable} usable samples; lower it"
        )
    return Questions(list(found.records.values()), found.prompts, found.skipped)


def _open(config: ConfigDict, run: OpenedRun) -> Source:
    """The held-out data, as the papers test: dialogues without the filters of training."""
    data, path = config.data, config.data.validation
    if draw := SHAPES.get(data.format):
        more = {"max_objects": data.shapes_max_objects} if data.format == "shapes" else {}
        folder = Path(config.run.workdir) / "data"
        path = draw(folder, "held_out", data.shapes_validation, config.run.seed, **more)
    if not path:
        raise ConfigError(
            "this run has no validation data (data.validation); give --predictions and --references"
        )
    if data.format in ("mmdialog", "shapes_dialogs"):
        rules = DialogRules(
            data.dialog_loader,
            training=False,
            bad_media_ids=tuple(data.bad_media_ids),
            num_vokens=config.model.backbone.num_vokens,
        )
        return MMDialogSource(path, data.image_root, rules)
    return OPENERS[data.format](config, run.spec.sizes, path, False)


class _Collector:
    """Records and prompts of what is asked, as long as there is room."""

    def __init__(self, count: int | None, seed: int):
        self.records: dict[str, dict[str, Any]] = {}
        self.prompts: dict[str, Prompt] = {}
        self.skipped: list[tuple[str, str]] = []
        self._count, self._seed = count, seed

    def take(self, asked: Asked) -> bool:
        """False where there is no more room.

        Raises:
          DataError: another sample has its name.
        """
        if self._count is not None and len(self.prompts) >= self._count:
            return False
        try:
            for image in (*asked.example.images, asked.example.target_image):
                if image is not None:
                    load_image(image)
        except SampleError as error:
            self.skipped.append((asked.example.item_id, str(error)))
            return True
        if asked.pair:
            name, image = asked.group, asked.example.target_image
            self._unused(name, self.records)
            self.records[name] = {"id": name, "caption": asked.example.caption, "image": image}
        else:
            record = self.records.setdefault(asked.group, {"id": asked.group, "turns": []})
            self._unused(asked.group, () if "turns" in record else self.records)
            record["turns"] += [*asked.before, {"role": "assistant", "content": asked.answer}]
            name = f"{asked.group}_{len(record['turns']) - 1}"
        self._unused(name, self.prompts)
        example = asked.example
        self.prompts[name] = Prompt(example.source, example.images, seed_of(name, self._seed))
        return True

    @staticmethod
    def _unused(name: str, used: Collection[str]) -> None:
        if name in used:
            raise DataError(
                f"two samples of the data are called {name} (an answer of a dialogue has the id of "
                "its record, _ and the number of its turn); give one of the records another id"
            )


def _text(text: str) -> Content:
    return [{"type": "text", "text": text}] if text else []


def _image(image: Any) -> Content:
    return [] if image is None else [{"type": "image", "source": image}]


def _story_questions(
    config: ConfigDict, source: Source, task: str, context: str
) -> Iterator[Asked | SampleError]:
    """The samples of each story: every step, the last one, or the texts of all but the first."""
    if stories_of(source) is None:
        raise ConfigError(f"--task={task} is for stories, and {source.describe()} are none")
    stories: HasStories = source  # type: ignore[assignment]
    prompt_set, kind = config.data.prompt_set, STORY_TASKS[task]
    rules = StoryRules(prompt_set=prompt_set, num_vokens=config.model.backbone.num_vokens)
    wordings = len(STORY_PROMPTS[prompt_set][kind])
    for row in range(stories.rows):
        try:
            story = stories.story(row)
        except SampleError as error:
            yield error
            continue
        steps = range(len(story.steps))
        asked = {"stories": steps, "last_step": steps[-1:], "narration": steps[1:]}[task]
        for number in asked:
            now = story.steps[number]
            whole = context if task == "last_step" else "image+text"
            example = rules.worded(story, number, kind, wording=row % wordings, context=whole)
            text, image = _text(now.text), _image(now.image)
            given, wanted = (image, text) if task == "narration" else (text, image)
            yield Asked(story.id, example, [{"role": "user", "content": given}], wanted)


def _others(source: Source) -> Iterator[Asked | SampleError]:
    """The samples of pairs, dialogues and users' records."""
    seen: set[str] = set()
    for index in range(len(source)):
        try:
            example = source[index]
        except SampleError as error:
            yield error
            continue
        if example.task == "cc3m" or example.task == "pair":
            yield Asked(example.item_id, example, [], [], pair=True)
        elif example.task != "cc3m-instruction":
            group = re.sub(r"_\d+(-mm)?$", "", example.item_id)
            opening = [{"role": "user", "content": SPECIAL_PATTERN.sub("", example.source)}]
            text = SPECIAL_PATTERN.sub("", example.target).replace("###", "").strip()
            answer = _text(text) + _image(example.target_image)
            yield Asked(group, example, [] if group in seen else opening, answer)
            seen.add(group)


def write_references(records: list[dict[str, Any]], folder: Path) -> Path:
    """``references.jsonl`` in a folder, with a copy of every image as it is stored."""
    images = folder / "references"
    images.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(10**9))

    def stored(source: Any) -> str:
        data = source if isinstance(source, bytes) else None
        end = ".img" if data else Path(source).suffix
        path = images / f"{next(numbers):06d}{end}"
        partial = path.with_suffix(".partial")
        if data is not None:
            partial.write_bytes(data)
        else:
            shutil.copyfile(source, partial)
        os.replace(partial, path)
        return str(path.relative_to(folder))

    def written(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "path": stored(part["source"])} if part["type"] == "image" else part

    lines = []
    for record in records:
        if "turns" in record:
            turns = [
                turn
                if isinstance(turn["content"], str)
                else {**turn, "content": [written(part) for part in turn["content"]] or ""}
                for turn in record["turns"]
            ]
            lines.append({**record, "turns": turns})
        else:
            lines.append({**record, "image": stored(record["image"])})
    path = folder / FILE
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
    return path
