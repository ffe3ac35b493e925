"""Import of checkpoints that the original wrote: stage 1, stage 2 by LoRA or by a prefix (fidelity 7.2-7.4).

A stage-2 file holds no ``fc`` and no decoder prompt, so it is laid on top of its stage-1 file.  The tables of
words are whole in them (V rows, the last nine of them new); by default only the new rows are read, since the
others are Vicuna's, shrunk by weight decay (Q3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minigpt5_jax.models.llama import weights as llama
from minigpt5_jax.weights.check import Coverage, check_tensors
from minigpt5_jax.weights.foreign.minigpt5 import (
    LLAMA_PREFIX,
    LLM,
    TRAINED_TABLE,
    base_name,
    is_second,
    unwrap,
)
from minigpt5_jax.weights.table import LINEAR, Rule, Table, WeightTableError
from minigpt5_jax.weights.view import Tensors, View, made, replaced

TABLES = {llama.EMBED: f"{LLM}embed_tokens/embedding", llama.HEAD: f"{LLM}lm_head/kernel"}
"""The two tables in a file, and where their old rows go."""
ROWS = ("vokens", "all")
RELEASE_FILES = {
    "title": "MiniGPT-5 as released: stage 1 (CC3M), stage 2 (VIST or MMDialog)",
    "files": ("stage1_cc3m.ckpt", "stage2_vist.ckpt", "stage2_mmdialog.ckpt"),
    "gigabytes": 4.6,
    "licence": "Apache-2.0 (code); the weights stand on all of the above",
    "repos": ("KZ-ucsc/MiniGPT5",),
    "command": "minigpt5",
}
"""Where the original's own checkpoints are published (fields of ``parts.contracts.Origin``)."""

_OLD_ROWS = Table(
    (
        Rule(llama.EMBED + ".old", "embed_tokens/embedding"),
        Rule(llama.HEAD + ".old", "lm_head/kernel", LINEAR),
    )
)
RELEASE_TABLE = TRAINED_TABLE + _OLD_ROWS.prefixed(LLAMA_PREFIX, LLM)
"""Every name of a stage-1 or stage-2 file, tables unwrapped and cut into ``.old`` and ``.new`` rows."""


WHOLE: Mapping[str, Mapping[str, str]] = {
    "llm": {LLAMA_PREFIX: ""},
    "vit": {"model.visual_encoder.": ""},
    "qformer": {
        "model.Qformer.": "Qformer.",
        "model.query_tokens": "query_tokens",
        "model.ln_vision": "ln_vision",
    },
    "llama_proj": {"model.llama_proj.": "llama_proj."},
    "unet": {"unet.": ""},
    "vae": {"vae.": ""},
    "text_encoder": {"sd_text_encoder.": ""},
}
"""Name under ``config.weights`` -> its prefixes in a whole state dict of the original -> published ones."""


def is_whole(source: Tensors) -> bool:
    """Whether this is a whole state dict of the original's model, of either stage, frozen towers among it."""
    return any(key.startswith("unet.") for key in source) and any(
        key.startswith("model.llama_model.") for key in source
    )


def tower_of_whole(name: str, source: Tensors, num_new: int = 9) -> Tensors:
    """A tower's tensors, by their published names; ``source`` itself where it is no whole state dict.

    Args:
      name: of the tower under ``config.weights``.
      source: tensors.  num_new: new rows, the last ones of both tables of words.
    """
    if not is_whole(source):
        return source
    keys = {
        new + key.removeprefix(old): key
        for old, new in WHOLE.get(name, {}).items()
        for key in source
        if key.startswith(old)
    }
    if name == "llm":  # in a second stage as PEFT has wrapped it, with what it trains beside
        keys = {base_name(key): key for key in keys.values() if not is_second(key)}
    part = View(source, {short: lambda key=key: source[key] for short, key in keys.items()})
    if name != "llm":
        return part
    return replaced(part, dict.fromkeys(TABLES, lambda table: table[:-num_new]))


def trained_of_whole(source: Tensors) -> Tensors:
    """What a stage trained, of a whole state dict; ``source`` itself where it is none.

    Raises:
      WeightTableError: naming a tensor that is neither trained nor of a tower.
    """
    if not is_whole(source):
        return source
    tables = {LLAMA_PREFIX + key for key in TABLES}
    trained = [key for key in source if unwrap(key) in tables or TRAINED_TABLE.resolve(key) is not None]
    frozen = tuple(old for prefixes in WHOLE.values() for old in prefixes)
    if other := sorted(key for key in set(source) - set(trained) if not key.startswith(frozen)):
        raise WeightTableError(f"{getattr(source, 'path', 'the file')}: {other[0]!r} belongs to no part")
    return made(source, trained, source.__getitem__)


def holds_both(source: Tensors) -> bool:
    """Whether this is a whole state dict of a second stage, which holds what the first trained as well."""
    return is_whole(source) and any(map(is_second, source))


def first_of_both(source: Tensors) -> Tensors:
    """What a file of the first stage would hold, of what a second stage's whole state dict trained."""
    keys = {unwrap(key): key for key in source if unwrap(key) != key or not is_second(key)}
    return View(source, {plain: lambda key=key: source[key] for plain, key in keys.items()})


@dataclasses.dataclass(frozen=True)
class Release:
    """What a model takes from the original's files.

    Attributes:
      params: path -> array, fp32, for every path that was asked for.
      vocab_size: rows of the language model without new ones, V - 9: the id of ``[IMG0]``.
      coverage: of each file.
      decay: what :func:`compare_rows` found; empty before it was asked.
    """

    params: Mapping[str, Any]
    vocab_size: int
    coverage: tuple[Coverage, ...]
    decay: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def factor(self) -> float:
        """What weight decay multiplied the old rows of the token table by."""
        return self.decay[TABLES[llama.EMBED]][0]


def read_release(
    stage1: Tensors,
    stage2: Tensors | None,
    shapes: Mapping[str, Sequence[int]],
    *,
    vocab_size: int,
    num_new: int = 9,
    rows: str = "vokens",
) -> Release:
    """Parameters from the original's files.  No pretrained weights are needed to say whether they fit.

    Args:
      stage1, stage2: their ``state_dict``; stage 2 on top of stage 1.
      shapes: path -> shape of everything the model takes from training: new rows, mapper, LoRA or prefix.
      vocab_size: rows of the language model the files shall stand on, without new ones.
      num_new: new rows, the vokens and ``<ImageHere>``.
      rows: ``vokens`` for the new rows only, ``all`` for the whole tables as well, shrunk as they are.

    Raises:
      WeightTableError: naming the keys and the likely cause: stages mixed up, another vocabulary, size or
        LoRA rank, keys that are missing or unknown.
    """
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is none of {', '.join(ROWS)}")
    _check_stages(stage1, stage2)
    files, owner, named = _merge(stage1, stage2)
    old = _check_vocabulary(named, vocab_size, num_new)
    _check_tuning(named, shapes)
    wanted = {path: tuple(shape) for path, shape in shapes.items()}
    if rows == "all":
        embedding, head = (named[LLAMA_PREFIX + key].shape for key in TABLES)
        wanted |= {TABLES[llama.EMBED]: (old, embedding[1]), TABLES[llama.HEAD]: (head[1], old)}
    cut = _cut_rows(named, old, rows)
    try:
        plan = RELEASE_TABLE.plan(list(cut), wanted)
        checked = check_tensors(plan, cut, wanted)
        in_fp32 = made(checked, checked, lambda key: np.asarray(checked[key], np.float32))
        params = RELEASE_TABLE.to_params(in_fp32, wanted)
    except WeightTableError as error:
        raise WeightTableError(_explain(str(error), named, wanted)) from None
    consumed = {item.key: item.targets for item in plan}
    return Release(params, old, _coverage(files, owner, consumed, rows))


def compare_rows(
    stage1: Tensors,
    stage2: Tensors | None,
    old: int,
    pretrained: Callable[[str], np.ndarray],
    limit: float = 0.02,
) -> dict[str, tuple[float, float]]:
    """How the old rows of both tables relate to the pretrained ones.

    Weight decay multiplies them by one factor (about 0.99 after stage 1, 7.5); rounding to bf16 leaves
    0.002 of their norm.  Every 16th row is compared.

    Args:
      stage1, stage2: as for :func:`read_release`.  old: rows that are not new.
      pretrained: path of one of ``TABLES`` -> the pretrained table.

    Returns:
      path -> (s, r): its rows are s times the pretrained ones, r of their norm is left over.

    Raises:
      WeightTableError: more than ``limit`` of the norm is left over: other weights.
    """
    *_, named = _merge(stage1, stage2)
    found = {}
    for key, path in TABLES.items():
        ours = np.asarray(pretrained(path))
        ours = (ours.T if key == llama.HEAD else ours)[:old:16].astype(np.float32)
        theirs = named[LLAMA_PREFIX + key][:old:16].astype(np.float32)
        factor = float(np.vdot(ours, theirs) / max(np.vdot(ours, ours), 1e-30))
        rest = float(np.linalg.norm(theirs - factor * ours) / max(np.linalg.norm(theirs), 1e-30))
        if rest > limit or not 0.5 < factor < 1.05:
            raise WeightTableError(
                f"{key}: its first {old} rows are not those of weights.llm (factor {factor:.3f}, {rest:.1%} "
                "left over)\nlikely cause: another language model than the file was trained on; MiniGPT-5 "
                "stands on Vicuna-7B v0, not on v1.1 or LLaMA itself"
            )
        found[path] = (factor, rest)
    return found


def _check_stages(stage1: Tensors, stage2: Tensors | None) -> None:
    """The files are what they are given as."""
    if any(map(is_second, stage1)):
        given = "" if stage2 is None else "; the two files seem to be swapped"
        raise WeightTableError(
            "the stage-1 file is a stage-2 file (it has LoRA or prefix tensors): give it as --stage2, and "
            f"with it the stage-1 file it started from, which holds fc and t2i_decoder_prompt{given}"
        )
    if stage2 is not None and not any(map(is_second, stage2)):
        raise WeightTableError(
            "the stage-2 file has neither LoRA nor prefix tensors: it is a stage-1 file, or another model's"
        )
    lost = [] if stage2 is None else sorted(set(map(unwrap, stage1)) - set(map(unwrap, stage2)))
    lost = [key for key in lost if not key.startswith(("fc.", "t2i_decoder_prompt"))]
    if lost:  # those of stage 1 must not stand in for them
        raise WeightTableError(f"the stage-2 file lacks {', '.join(lost[:8])} ({len(lost)} in all)")


def _merge(
    stage1: Tensors, stage2: Tensors | None
) -> tuple[dict[str, Tensors], dict[str, tuple[str, str]], View]:
    """(files, plain name -> (file, key there), tensors by plain name); the later file wins.

    Raises:
      WeightTableError: a file has two tensors for the same place.
    """
    files = {"stage 1": stage1} | ({} if stage2 is None else {"stage 2": stage2})
    owner: dict[str, tuple[str, str]] = {}
    for name, source in files.items():
        for key in source:
            file, other = owner.get(unwrap(key), ("", ""))
            if file == name:
                raise WeightTableError(f"the {name} file holds both {other!r} and {key!r}: one tensor")
            owner[unwrap(key)] = (name, key)
    readers = {plain: lambda f=file, k=key: files[f][k] for plain, (file, key) in owner.items()}
    return files, owner, View(stage1, readers)


def _check_vocabulary(named: Tensors, vocab_size: int, num_new: int) -> int:
    """Old rows of both tables: V - ``num_new``, which must be the language model's."""
    rows = {}
    for key in TABLES:
        if LLAMA_PREFIX + key not in named:
            raise WeightTableError(f"{LLAMA_PREFIX + key!r} is missing; is this a file of MiniGPT-5?")
        rows[key] = named[LLAMA_PREFIX + key].shape[0]
    if len(set(rows.values())) > 1:
        raise WeightTableError(f"the tables differ in their rows: {rows}")
    total = rows[llama.EMBED]
    if total - num_new != vocab_size:
        cause = ""
        if total - num_new == vocab_size + 1:
            cause = "\nlikely cause: trained with a tokenizer whose entry 32000 is [PAD]; keep that row of "
            cause += "weights.llm (`convert llm --keep_rows`) and read its sizes (model.backbone.llm=source)"
        raise WeightTableError(
            f"the file has V = {total} rows, so [IMG0] is id {total - num_new}; the language model has "
            f"{vocab_size} rows without new ones{cause}"
        )
    return total - num_new


def _check_tuning(named: Tensors, shapes: Mapping[str, Sequence[int]]) -> None:
    """LoRA or prefix of the files are those of the configuration."""
    for mark, ours, what, keys in (
        (".lora_", "/lora_", "LoRA", "model.backbone.lora_rank"),
        ("model.prefix_encoder.", "/prefix_encoder/", "a prefix", "model.backbone.prefix_tokens"),
    ):
        there, here = any(mark in key for key in named), any(ours in path for path in shapes)
        if here and not there:
            raise WeightTableError(
                f"the configuration has {what} ({keys}), the files have none: give the stage-2 file "
                "(--stage2), or a stage-1 configuration (configs/stage1.py)"
            )
        if there and not here:
            raise WeightTableError(
                f"the stage-2 file has {what}, the configuration has none ({keys}=0): take a stage-2 "
                "configuration (configs/stage2_vist.py; :prefix for a prefix)"
            )
    rank = next((named[key].shape[0] for key in named if ".lora_A." in key), None)
    for path, shape in shapes.items():
        if rank is not None and path.endswith("/lora_a") and shape[-1] != rank:
            raise WeightTableError(
                f"LoRA of rank {rank} in the file, rank {shape[-1]} in the configuration; set "
                f"--config.model.backbone.lora_rank={rank} and the lora_alpha it was trained with"
            )


def _cut_rows(named: View, old: int, rows: str) -> View:
    """Tables as ``.new`` rows, and ``.old`` ones where they are wanted."""
    readers = {key: lambda key=key: named[key] for key in named}
    for key in (LLAMA_PREFIX + name for name in TABLES):
        del readers[key]
        readers[key + ".new"] = lambda key=key: named[key][old:]
        if rows == "all":
            readers[key + ".old"] = lambda key=key: named[key][:old]
    return View(named, readers)


def _explain(message: str, named: Tensors, shapes: Mapping[str, Sequence[int]]) -> str:
    """``message`` with what probably is the matter."""
    width = named[LLAMA_PREFIX + llama.EMBED].shape[1]
    ours = next((shape[1] for path, shape in shapes.items() if path.endswith("embed_tokens/voken")), width)
    if width != ours:
        return (
            f"{message}\nlikely cause: trained on a language model of width {width}, this one has {ours} "
            "(LLaMA-7B 4096, 13B 5120)"
        )
    if not any(key.startswith("fc.") for key in named):
        return f"{message}\nlikely cause: a stage-2 file without the stage-1 file it started from"
    return message


def _coverage(
    files: Mapping[str, Tensors],
    owner: Mapping[str, tuple[str, str]],
    consumed: Mapping[str, tuple[str, ...]],
    rows: str,
) -> tuple[Coverage, ...]:
    """What was taken from which file, under the names it has there."""
    taken: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in files}
    for key, paths in consumed.items():
        file, there = owner[key.removesuffix(".new").removesuffix(".old")]
        taken[file][there] = (*taken[file].get(there, ()), *paths)
    note = "of the tables the new rows only; the old ones come from weights.llm (--rows=all takes them)"
    notes = () if rows == "all" else (note,)
    return tuple(
        Coverage(
            str(getattr(source, "path", None) or name),
            taken[name],
            {key: "replaced by the stage-2 file" for key in source if key not in taken[name]},
            notes,
        )
        for name, source in files.items()
    )
