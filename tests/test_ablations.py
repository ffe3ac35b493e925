"""configs/ablations.py: each variant differs from its run in what the papers say, and in nothing else."""

from __future__ import annotations

import math

import pytest
from ml_collections import ConfigDict

import tiny
from minigpt5_jax.config import ConfigError, choose, get_config, validate
from minigpt5_jax.training.step import StepOptions
from minigpt5_jax.training.tuning import FROZEN
from minigpt5_jax.wiring.model import ModelSpec, build, step_options
from tiny import run_file

BASES = {
    ("stage1", ""): ("stage1", None),
    ("stage1", "shapes,"): ("shapes_stage1", "full"),
    ("stage2", ""): ("stage2_vist", None),
    ("stage2", "shapes,"): ("shapes_stage2_story", None),
}


ABLATIONS = run_file("ablations")
# What a row changes, by hand from the reference's table (9.1); the mapper's own keys are tested apart.
CHANGES = {
    "no_cfg": {"loss.cfg_dropout": 0.0, "inference.cfg_negative": "empty_prompt"},
    "no_cap": {"loss.caption": 0.0},
    "no_ldm": {"loss.image": 0.0, "run.best_metric": "caption"},
    "fixed_queries": {"tuning.rules": None},
    "vokens_1": {"model.backbone.num_vokens": 1},
    "vokens_2": {"model.backbone.num_vokens": 2},
    "vokens_4": {"model.backbone.num_vokens": 4},
    "vokens_8": {},
    "lora": {},
    "prefix": {"model.backbone.lora_rank": 0, "model.backbone.prefix_tokens": 5},
    "no_stage1": {"tuning.rules": None},
}


def flat(config: ConfigDict) -> dict[str, object]:
    found = {}

    def walk(tree, prefix):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    walk(config.to_dict(), "")
    return found


def changed(variant: str, world: str) -> dict[str, object]:
    """Keys that a variant has in place of its base's, without run.name."""
    name, piece = BASES[ABLATIONS.ROWS[variant], world]
    before, after = flat(run_file(name).get_config(piece)), flat(ABLATIONS.get_config(world + variant))
    keys = (before.keys() | after.keys()) - {"run.name"}
    return {key: after.get(key) for key in keys if before.get(key) != after.get(key)}


@pytest.mark.parametrize("world", ["", "shapes,"])
@pytest.mark.parametrize("variant", CHANGES)
def test_a_variant_changes_what_the_papers_change(variant, world):
    found = changed(variant, world)
    assert found.keys() == CHANGES[variant].keys()
    assert all(found[key] == value for key, value in CHANGES[variant].items() if value is not None)
    validate(ABLATIONS.get_config(world + variant))


def test_sixteen_vokens_have_room_behind_the_same_words():
    full, small = changed("vokens_16", ""), changed("vokens_16", "shapes,")
    assert full == {"model.backbone.num_vokens": 16, "data.max_length": 136, "data.buckets": (40, 136)}
    assert small == {"model.backbone.num_vokens": 16, "data.max_length": 80}


@pytest.mark.parametrize("world", ["", "shapes,"])
def test_the_decoder_only_mapper_is_as_wide_and_as_deep_as_the_other(world):
    config = validate(ABLATIONS.get_config(f"{world}decoder_only"))
    width, inner = (128, 512) if world else (1024, 4096)
    sizes = {"d_model": width, "dim_feedforward": inner, "nhead": 8, "num_layers": 8}
    assert config.model.mapper.to_dict() == {"name": "decoder_only", **sizes}
    assert {key.rpartition(".")[0] for key in changed("decoder_only", world)} == {"model.mapper"}


def test_rows_are_the_papers():
    vokens = {f"vokens_{n}" for n in (1, 2, 4, 8, 16)}
    stage1 = {"no_cfg", "no_cap", "no_ldm", "fixed_queries", "decoder_only"} | vokens
    assert ABLATIONS.ROWS == dict.fromkeys(stage1, "stage1") | dict.fromkeys(
        ("lora", "prefix", "no_stage1"), "stage2"
    )
    assert all(f"    {row} " in ABLATIONS.__doc__ for row in {*ABLATIONS.ROWS, "vokens_N"} - vokens)


def test_the_name_tells_the_variant_and_the_world():
    names = {
        None: "ablations",
        "": "ablations",
        "shapes": "ablations_shapes",
        "no_cap": "ablations_no_cap",
        "vokens_4,no_cap": "ablations_vokens_4_no_cap",
        "shapes,prefix": "ablations_shapes_prefix",
        "no_ldm,compat=original": "ablations_no_ldm",
    }
    assert {variant: ABLATIONS.get_config(variant).run.name for variant in names} == names
    config = ABLATIONS.get_config("no_ldm,compat=original")
    assert config.loss.image == 0.0 and config.optimizer.decay_frozen_rows, "profiles apply besides"


@pytest.mark.parametrize(
    "variant, message",
    [
        ("no_cups", "unknown variant 'no_cups'; known: .*no_cap.*vokens_16.*no_stage1"),
        ("vokens_3", "unknown variant 'vokens_3'"),
        ("prefix,no_cap", "'prefix' varies stage2 and 'no_cap' stage1; a run is one stage"),
        ("shapes,vokens_4,lora", "'vokens_4' varies stage1 and 'lora' stage2"),
        ("vokens_4,vokens_8", "'vokens_4' and 'vokens_8' exclude each other: both change the vokens"),
        ("no_cap,no_ldm", "exclude each other: both change the losses"),
        ("fixed_queries,decoder_only", "exclude each other: both change the mapper"),
        ("prefix,no_stage1", "exclude each other: both change the tuning"),
        ("no_cap,no_cap", "'no_cap' is given 2 times"),
    ],
)
def test_wrong_pieces_are_one_clear_error(variant, message):
    with pytest.raises(ConfigError, match=message):
        ABLATIONS.get_config(variant)


def trainable(spec: ModelSpec) -> int:
    return sum(math.prod(spec.template.shapes[path].shape) for path in tiny.trainable_paths(spec.labels))


ROWS_OF = 2 * 4096  # of each voken and of <ImageHere>, in both tables
FC, QUERIES = 5_244_928, 78_848  # fidelity 1.12


@pytest.mark.parametrize(
    "variant, total",
    [
        ("fixed_queries", 122_973_184 - QUERIES),
        ("decoder_only", 9 * ROWS_OF + FC + 2 * 50_386_944 - 2_048),  # twice the encoder, one closing norm
        ("vokens_1", 122_973_184 - 7 * ROWS_OF),
        ("vokens_16", 122_973_184 + 8 * ROWS_OF),
        ("prefix", 390_562_816),
        ("no_stage1", 121_843_712 + FC + QUERIES),
    ],
)
def test_full_size_totals_are_derived_from_the_references(variant, total):
    spec = build(validate(ABLATIONS.get_config(variant)))
    assert trainable(spec) == total
    queries = spec.labels.get("mapper/queries")
    assert (queries == FROZEN) == (variant in ("fixed_queries", "prefix"))


def test_losses_that_are_left_out_are_not_computed():
    def options(name: str) -> StepOptions:
        return step_options(ABLATIONS.get_config(name), {}, lora_dropout=False)

    weights = {name: options(name).loss.weights for name in ("no_cap", "no_ldm")}
    assert weights == {"no_cap": {"text": 0.01, "image": 1.0}, "no_ldm": {"text": 0.01, "caption": 0.1}}
    assert options("no_cfg").cfg_dropout == 0.0


def test_more_vokens_than_the_condition_has_vectors_are_refused_before_any_step():
    config = choose(get_config(), "mapper", "decoder_only")
    config.model.backbone.num_vokens = 78
    with pytest.raises(ConfigError, match="78 vokens exceed the 77 vectors .*mapper=encoder_decoder"):
        build(validate(config))
    config.model.mapper.nhead = 7
    with pytest.raises(ConfigError, match="d_model=1024 does not divide into model.mapper.nhead=7"):
        validate(config)
