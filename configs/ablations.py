"""The papers' ablations: each is one variant of the full-size run, and of the small world's.

    python -m minigpt5_jax.train --config configs/ablations.py:no_cap --dry_run
    python -m minigpt5_jax.train --config configs/ablations.py:no_cap --workdir runs/no_cap ...
    python -m minigpt5_jax.train --config configs/ablations.py:prefix --workdir runs/prefix \
        --config.run.init_from=runs/stage1/checkpoints ...
    python -m minigpt5_jax.train --config configs/ablations.py:shapes,no_cap --workdir runs/shapes_no_cap
    python -m minigpt5_jax.train --config configs/ablations.py:shapes,prefix --workdir runs/shapes_prefix \
        --config.run.init_from=runs/shapes_full/checkpoints

At full size `...` stands for data and weights, given as for the run that the variant starts from.

Stage 1, everything else as configs/stage1.py (with `shapes`: as configs/shapes_stage1.py:full):

    no_cfg         no zeroed voken states in training; guidance away from the empty prompt
    no_cap         without the caption loss
    no_ldm         without the diffusion loss; the weights of the others stay
    fixed_queries  the mapper's queries stay as they were drawn from N(0, 1)
    decoder_only   eight self-attention layers over the vokens, zero vectors behind, in place of the mapper
    vokens_N       N of 1, 2, 4, 8, 16 vokens; vokens_8, like no variant at all, is the plain stage 1

Stage 2, everything else as configs/stage2_vist.py (with `shapes`: configs/shapes_stage2_story.py):

    lora           the plain stage 2
    prefix         prefix tuning in place of LoRA
    no_stage1      stage 2 at once, without run.init_from; the mapper's MLP and queries train too

Pieces of different kinds combine (`vokens_4,no_cap`).  Guidance scales and contexts are no variants: they are
chosen when images are drawn (`python -m minigpt5_jax.generate --inference guidance_scale=5`).
Hardware: that of the run a variant starts from.
Expected numbers: docs/results/shapes.md, in the small world; the papers' at full size stand beside them.
"""

import functools
import importlib.util
import itertools
from pathlib import Path

from ml_collections import ConfigDict

from minigpt5_jax.config import ConfigError, apply_variant, choose, use_prefix
from minigpt5_jax.parts.contracts import FROZEN


def no_cfg(config: ConfigDict) -> None:
    """T(0) means nothing then, so the negative is the generator's own (fidelity 9.1)."""
    config.loss.cfg_dropout = 0.0
    config.inference.cfg_negative = "empty_prompt"


def no_cap(config: ConfigDict) -> None:
    """0.01 L_text + L_LDM."""
    config.loss.caption = 0.0


def no_ldm(config: ConfigDict) -> None:
    """0.01 L_text + 0.1 L_CAP (small world: its own weight, 1); the lowest caption loss is the best."""
    config.loss.image = 0.0
    config.run.best_metric = "caption"


def fixed_queries(config: ConfigDict) -> None:
    """Frozen in stage 1; in stage 2 they are frozen anyway."""
    config.tuning.rules = ((r"mapper/queries", FROZEN),)


def decoder_only(config: ConfigDict) -> None:
    """As deep and as wide as the mapper it replaces."""
    former = config.model.mapper.to_dict()
    choose(config, "mapper", "decoder_only")
    config.model.mapper.update({name: former[name] for name in ("d_model", "nhead", "dim_feedforward")})
    config.model.mapper.num_layers = former["num_encoder_layers"] + former["num_decoder_layers"]


def vokens(config: ConfigDict, count: int) -> None:
    """``count`` vokens; rows are longer by those beyond eight, so no more text is cut than with eight."""
    config.model.backbone.num_vokens = count
    more = max(0, count - 8)
    config.data.max_length += more
    config.data.buckets = tuple(length + more for length in config.data.buckets)


def lora(config: ConfigDict) -> None:
    """Stage 2 as it is."""


def no_stage1(config: ConfigDict) -> None:
    """What stage 2 freezes was never trained, so it trains here (not stated in the papers)."""
    config.tuning.rules = ((r"mapper/.*", "mapper"),)


VARIANTS = {
    # piece: (stage, kind, change); of one kind a run has one piece at most
    "no_cfg": ("stage1", "guidance", no_cfg),
    "no_cap": ("stage1", "losses", no_cap),
    "no_ldm": ("stage1", "losses", no_ldm),
    "fixed_queries": ("stage1", "mapper", fixed_queries),
    "decoder_only": ("stage1", "mapper", decoder_only),
    **{f"vokens_{n}": ("stage1", "vokens", functools.partial(vokens, count=n)) for n in (1, 2, 4, 8, 16)},
    "lora": ("stage2", "tuning", lora),
    "prefix": ("stage2", "tuning", use_prefix),
    "no_stage1": ("stage2", "tuning", no_stage1),
}
ROWS: dict[str, str] = {name: stage for name, (stage, _, _) in VARIANTS.items()}
"""Every ablation that trains a model, and its stage."""
SHAPES = "shapes"
STARTS = {
    ("stage1", False): ("stage1", None),
    ("stage1", True): ("shapes_stage1", "full"),
    ("stage2", False): ("stage2_vist", None),
    ("stage2", True): ("shapes_stage2_story", None),
}
"""(stage, in the small world?) -> run file and variant that an ablation starts from."""


def check(pieces: list[str]) -> str:
    """The stage that all pieces belong to.

    Raises:
      ConfigError: a piece is given twice, or pieces exclude each other.
    """
    for piece in pieces:
        if pieces.count(piece) > 1:
            raise ConfigError(f"variant {piece!r} is given {pieces.count(piece)} times")
    known = [piece for piece in pieces if piece in VARIANTS]
    for one, other in itertools.combinations(known, 2):
        (stage, kind, _), (other_stage, other_kind, _) = VARIANTS[one], VARIANTS[other]
        if stage != other_stage:
            raise ConfigError(f"{one!r} varies {stage} and {other!r} {other_stage}; a run is one stage")
        if kind == other_kind:
            raise ConfigError(f"{one!r} and {other!r} exclude each other: both change the {kind}")
    return VARIANTS[known[0]][0] if known else "stage1"


def load(name: str):
    """A run file that lies beside this one."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(variant: str | None = None) -> ConfigDict:
    """The run an ablation is one of, with its change; ``run.name`` lists the pieces."""
    pieces = list(filter(None, (variant or "").split(",")))
    name, base = STARTS[check(pieces), SHAPES in pieces]
    config = load(name).get_config(base)
    config.run.name = "_".join(["ablations", *(piece for piece in pieces if piece in {SHAPES, *VARIANTS})])
    changes = {piece: change for piece, (_, _, change) in VARIANTS.items()}
    return apply_variant(config, variant, {SHAPES: lambda _: None, **changes})
