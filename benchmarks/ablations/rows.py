"""Which rows there are, what each needs, and the settings that its numbers depend on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, get_config, validate
from minigpt5_jax.shapes import files

ROOT = Path(__file__).parents[2]
CONFIG_FILE = "configs/ablations.py"
SCALES = {"small": "shapes"}
"""Scale -> word of ``configs/ablations.py`` that chooses its backbones."""

STAGE1 = (
    "plain",
    "no_cap",
    "no_ldm",
    "no_cfg",
    "fixed_queries",
    "decoder_only",
    "vokens_1",
    "vokens_4",
    "vokens_2",
    "vokens_16",
)
"""Trained on pairs, plain first: it has 8 vokens, and everything else is compared with it."""
STAGE2 = ("lora", "prefix", "no_stage1")
"""Trained on stories; all but the last start from the plain run of their seed."""
ZERO_SHOT = "zero_shot"
"""The plain run judged on stories (Table 6, "zero-shot"), with stage 2's guidance."""
GUIDANCE = {f"guidance_{scale:g}": scale for scale in (1, 1.5, 2, 3, 5, 7.5, 10, 15)}
"""The plain run judged with another guidance scale (Figure 5)."""
VARIANTS = (*STAGE1[:6], *STAGE2, ZERO_SHOT, *STAGE1[6:], *GUIDANCE)
"""In the order in which they are run."""


ALWAYS = ("run.seed", "run.num_steps", "run.eval_batches", "optimizer.warmup_steps")
"""Keys that settings hold at their defaults too.  Other keys of ``run`` change no number of a row: they say
how often something is saved or shown."""


class RowError(RuntimeError):
    """A row cannot be run or read; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the tables: a variant, trained with a seed at a scale."""

    variant: str
    seed: int = 0
    scale: str = "small"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise RowError(f"unknown row {self.variant!r}; known: {', '.join(VARIANTS)}")
        if self.scale not in SCALES:
            raise RowError(f"unknown scale {self.scale!r}; known: {', '.join(SCALES)}")

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{'' if self.scale == 'small' else self.scale + '_'}{self.variant}_seed{self.seed}"

    @property
    def trains(self) -> bool:
        """Whether it has a training run of its own."""
        return self.variant in STAGE1 or self.variant in STAGE2

    @property
    def judged(self) -> str:
        """By what: ``pairs`` or ``stories``."""
        return "stories" if self.variant in (*STAGE2, ZERO_SHOT) else "pairs"

    @property
    def need(self) -> Row | None:
        """The row whose checkpoint it starts from, or judges."""
        if self.variant in STAGE1 or self.variant == "no_stage1":
            return None
        return dataclasses.replace(self, variant="plain")

    @property
    def config_variant(self) -> str:
        """What stands behind ``configs/ablations.py:``."""
        return SCALES[self.scale] + ("" if self.variant == "plain" else f",{self.variant}")


def check_packages(*names: str) -> None:
    """Whether what judging and plots need is there, before hours of training.

    Raises:
      RowError: naming what is not installed.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise RowError(f"{' and '.join(missing)} not installed: pip install 'minigpt5_jax[results]'")


def plan(variants: Iterable[str], seeds: Iterable[int], scale: str = "small") -> list[Row]:
    """Rows in the order they are run: seed by seed, as in ``VARIANTS``, what others need put in before them.

    Raises:
      RowError: a variant or the scale is unknown.
    """
    wanted = list(variants)
    rows: dict[Row, None] = {}
    for seed in dict.fromkeys(seeds):
        chosen = {Row(variant, seed, scale) for variant in wanted}
        chosen |= {row.need for row in chosen if row.need}
        rows |= dict.fromkeys(sorted(chosen, key=lambda row: VARIANTS.index(row.variant)))
    return list(rows)


def variant_config(row: Row, options: argparse.Namespace) -> ConfigDict:
    """Configuration of a training row with seed, steps and warm-up as its command line sets them.

    Raises:
      RowError: the variant's configuration is wrong, or names no number of steps.
    """
    spec = importlib.util.spec_from_file_location("ablations_config", ROOT / CONFIG_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(row.config_variant)
        planned = config.run.num_steps
        if not planned:
            raise ConfigError("run.num_steps is not set")
        steps = (options.steps if row.variant in STAGE1 else options.story_steps) or planned
        config.run.update(seed=row.seed, num_steps=steps)
        config.optimizer.warmup_steps = round(config.optimizer.warmup_steps * steps / planned)
        return validate(config)
    except ConfigError as error:
        raise RowError(f"row {row.name}, {CONFIG_FILE}:{row.config_variant}: {error}") from error


def row_settings(row: Row, options: argparse.Namespace, assets: str) -> dict[str, Any]:
    """Everything the row's numbers depend on, as plain JSON; a result of other settings is another result.

    Returns:
      ``assets``, ``judge``, for training rows ``config`` (:func:`changed_keys`), and ``from``: the
      configuration of the run it starts from or judges.
    """
    judge: dict[str, Any] = {"seed": row.seed}
    if row.judged == "stories":
        judge["stories"] = options.stories
    else:  # nothing of the native ceiling is trained: it is one number for all rows of a guidance scale
        judge |= {"pairs": options.pairs, "native": row.variant not in STAGE1[1:]}
    if row.variant in GUIDANCE:
        judge["guidance"] = GUIDANCE[row.variant]
    if row.variant == ZERO_SHOT:  # as the rows beside which it stands
        lora = variant_config(dataclasses.replace(row, variant="lora"), options)
        judge["guidance"] = lora.inference.guidance_scale
    settings: dict[str, Any] = {"assets": assets, "judge": judge}
    if row.trains:
        settings["config"] = changed_keys(variant_config(row, options))
    if row.need:
        settings["from"] = changed_keys(variant_config(row.need, options))
    return json.loads(json.dumps(settings))


def changed_keys(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value wherever ``config`` differs from the defaults, and ``ALWAYS``."""
    default, values = flat(get_config().to_dict()), flat(config.to_dict())
    changed = {key: value for key, value in values.items() if key not in default or default[key] != value}
    kept = {key: value for key, value in changed.items() if not key.startswith("run.")}
    return kept | {key: values[key] for key in ALWAYS}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def assets_hash(folder: Path = files.ASSETS) -> str:
    """SHA-256 over the hashes of all packaged backbones."""
    return hashlib.sha256(json.dumps(files.hashes(folder), sort_keys=True).encode()).hexdigest()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: saved there, now here`` for everything in which two settings differ."""
    there, here = flat(saved), flat(now)
    keys = sorted(there.keys() | here.keys())
    lost = "not there"
    return [
        f"{key}: {there.get(key, lost)!r} there, {here.get(key, lost)!r} now"
        for key in keys
        if there.get(key, lost) != here.get(key, lost)
    ]
