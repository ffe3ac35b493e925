"""Rows of the papers' tables: MiniGPT-5's own, which can be measured here, and those of other systems.

Numbers of tables are those of the second version of the paper ("new"); fidelity names the differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from minigpt5_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table, or one cell of a row whose columns are contexts.

    Attributes:
      table: its number.  model: as the table names it.
      values: metric -> value as printed.
      task, context: what measures it, '' for rows of systems that are not built here.
      key: ``--paper_row``; several tables share one, where they print the same model.
    """

    table: int
    model: str
    values: Mapping[str, float]
    task: str = ""
    context: str = ""
    key: str = ""


def _cells(model: str, key: str, none: float, text: float, image: float, both: float) -> list[Row]:
    """Table 6's row of a model, a cell for each context."""
    cells = {"none": none, "text": text, "image": image, "image+text": both}
    return [Row(6, model, {"clip_i": value}, "last_step", context, key) for context, value in cells.items()]


def _cc3m(table: int, model: str, key: str, *values: float) -> Row:
    return Row(
        table,
        model,
        dict(zip(("clip_i", "clip_t", "inception_score", "fid"), values, strict=True)),
        "pairs",
        "",
        key,
    )


OURS: tuple[Row, ...] = (
    Row(1, "MiniGPT-5 prefix tuning", {"clip_i": 0.65, "fid_per_story": 381.55}, "stories", "", "prefix"),
    Row(1, "MiniGPT-5 LoRA", {"clip_i": 0.66, "fid_per_story": 366.62}, "stories", "", "minigpt5"),
    Row(2, "MiniGPT-5", {"s_bert": 0.6315, "rouge_l": 0.3373, "meteor": 0.3263}, "narration", "", "minigpt5"),
    Row(
        4,
        "MiniGPT-5",
        {
            "inception_score": 20.23,
            "bleu_1": 0.3369,
            "bleu_2": 0.2323,
            "rouge_l": 0.1176,
            "mm_relevance": 0.67,
        },
        "dialogs",
        "",
        "minigpt5",
    ),
    _cc3m(5, "MiniGPT-5", "minigpt5", 0.61, 0.22, 28.09, 31.47),
    _cc3m(5, "w/o CFG", "no_cfg", 0.60, 0.22, 23.41, 33.73),
    _cc3m(5, "w/o L_CAP", "no_cap", 0.54, 0.16, 21.27, 40.24),
    _cc3m(5, "w/o L_LDM", "no_ldm", 0.58, 0.20, 24.79, 34.65),
    *_cells("MiniGPT-5 zero-shot", "zero_shot", 0.54, 0.57, 0.57, 0.57),
    *_cells("MiniGPT-5 prefix", "prefix", 0.60, 0.63, 0.68, 0.70),
    *_cells("MiniGPT-5 LoRA", "minigpt5", 0.61, 0.64, 0.69, 0.70),
    _cc3m(7, "MiniGPT-5", "minigpt5", 0.61, 0.22, 28.09, 31.47),
    _cc3m(7, "fixed queries", "fixed_queries", 0.60, 0.21, 28.55, 30.56),
    _cc3m(7, "decoder-only", "decoder_only", 0.58, 0.20, 24.74, 34.88),
    Row(9, "MiniGPT-5 (MiniGPT-4 + SD 2.1)", {"fid": 59.48}, "last_step", "image+text", "minigpt5"),
)
"""MiniGPT-5's own rows of Tables 1, 2, 4, 5, 6, 7 and 9."""

OTHERS: tuple[Row, ...] = (
    Row(1, "SD 2.1", {"clip_i": 0.59, "fid_per_story": 393.49}),
    Row(1, "Fine-tuned SD 2.1", {"clip_i": 0.61, "fid_per_story": 390.25}),
    Row(1, "Two-stage baseline", {"clip_i": 0.57, "fid_per_story": 403.06}),
    Row(1, "GILL", {"clip_i": 0.60, "fid_per_story": 381.88}),
    Row(2, "GILL", {"s_bert": 0.3864, "rouge_l": 0.1784, "meteor": 0.1951}),
    Row(2, "MiniGPT-4", {"s_bert": 0.6273, "rouge_l": 0.3401, "meteor": 0.3296}),
    Row(
        4,
        "Divter",
        {
            "inception_score": 20.53,
            "bleu_1": 0.0944,
            "bleu_2": 0.0745,
            "rouge_l": 0.1119,
            "mm_relevance": 0.62,
        },
    ),
    Row(
        4,
        "GILL",
        {
            "inception_score": 23.78,
            "bleu_1": 0.2912,
            "bleu_2": 0.1945,
            "rouge_l": 0.1207,
            "mm_relevance": 0.64,
        },
    ),
    Row(6, "SD 2 zero-shot", {"clip_i none": 0.57, "clip_i text": 0.59}),
    Row(
        6,
        "GILL zero-shot",
        {"clip_i none": 0.54, "clip_i text": 0.54, "clip_i image": 0.55, "clip_i image+text": 0.54},
    ),
    Row(6, "Fine-tuned SD 2", {"clip_i none": 0.59, "clip_i text": 0.61}),
    Row(
        6,
        "Two-stage baseline",
        {"clip_i none": 0.54, "clip_i text": 0.56, "clip_i image": 0.57, "clip_i image+text": 0.58},
    ),
    Row(8, "SD 2.1", {"clip_i": 0.64, "fid": 26.39, "VIST clip_i": 0.59, "VIST fid_per_story": 393.49}),
    Row(8, "SD 3", {"clip_i": 0.68, "fid": 29.19, "VIST clip_i": 0.63, "VIST fid_per_story": 380.35}),
    Row(
        8,
        "MiniGPT-4 + SD 2.1",
        {"clip_i": 0.61, "fid": 31.47, "VIST clip_i": 0.66, "VIST fid_per_story": 366.62},
    ),
    Row(
        8,
        "LLaVA-1.5 + SD 2.1",
        {"clip_i": 0.62, "fid": 28.96, "VIST clip_i": 0.65, "VIST fid_per_story": 376.58},
    ),
    Row(
        8,
        "Qwen2.5-VL + SD 3",
        {"clip_i": 0.64, "fid": 29.31, "VIST clip_i": 0.70, "VIST fid_per_story": 340.20},
    ),
    Row(9, "GILL", {"fid": 61.85}),
    Row(9, "MiniGPT-5 (Qwen2.5-VL + SD 3)", {"fid": 56.32}),
)
"""Rows of systems that are not built here, and Table 8, whose backbones are not."""

KEYS = tuple(dict.fromkeys(row.key for row in OURS))


def beside(key: str, task: str, context: str) -> list[Row]:
    """The rows of a model that a task measures.

    Raises:
      ConfigError: an unknown model.
    """
    if key not in KEYS:
        raise ConfigError(f"--paper_row={key} is none of {', '.join(KEYS)}")
    return [
        row
        for row in OURS
        if (row.key, row.task) == (key, task) and row.context in ("", context or "image+text")
    ]
