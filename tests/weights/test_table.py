"""Weight tables: patterns, layouts, strictness in both directions, and the inverse."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5_jax.weights.table import (
    CONV,
    COPY,
    LINEAR,
    SQUEEZED_LINEAR,
    Rule,
    Table,
    WeightTableError,
    linear_rules,
    norm_rules,
    split,
)

TABLE = Table(
    (
        Rule("embed.weight", "embed/embedding"),
        Rule("conv.weight", "conv/kernel", CONV),
        Rule("point.weight", "point/kernel", SQUEEZED_LINEAR),
        Rule("h.{2i}.w.weight", "pairs/even/kernel", LINEAR),
        Rule("h.{2i+1}.w.weight", "pairs/odd/kernel", LINEAR),
        Rule("down.{i}.norm.{j}.weight", "down_{i}/norms/scale"),
        Rule(
            "layers.{i}.qkv.weight",
            ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"),
            split(3, LINEAR),
        ),
    ),
    ignored={r".*\.inv_freq": "a buffer"},
)


def make_source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (5, 3), "conv.weight": (4, 3, 2, 1), "point.weight": (4, 3, 1, 1)}
    shapes |= {f"h.{i}.w.weight": (2, 3) for i in range(4)}
    shapes |= {f"down.{i}.norm.{j}.weight": (2,) for i in range(2) for j in range(3)}
    shapes |= {f"layers.{i}.qkv.weight": (6, 3) for i in range(2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


SHAPES = {
    "embed/embedding": (5, 3),
    "conv/kernel": (2, 1, 3, 4),
    "point/kernel": (3, 4),
    "pairs/even/kernel": (2, 3, 2),
    "pairs/odd/kernel": (2, 3, 2),
    "down_0/norms/scale": (3, 2),
    "down_1/norms/scale": (3, 2),
    "layers/q/kernel": (2, 3, 2),
    "layers/k/kernel": (2, 3, 2),
    "layers/v/kernel": (2, 3, 2),
}


def test_import_puts_every_value_where_the_rule_says():
    source = make_source()
    params = TABLE.to_params(source, SHAPES)
    assert {path: value.shape for path, value in params.items()} == SHAPES
    assert params["conv/kernel"][1, 0, 2, 3] == source["conv.weight"][3, 2, 1, 0]
    assert params["point/kernel"][2, 3] == source["point.weight"][3, 2, 0, 0]
    np.testing.assert_array_equal(params["pairs/even/kernel"][1], source["h.2.w.weight"].T)
    np.testing.assert_array_equal(params["pairs/odd/kernel"][1], source["h.3.w.weight"].T)
    np.testing.assert_array_equal(params["down_1/norms/scale"][2], source["down.1.norm.2.weight"])
    np.testing.assert_array_equal(params["layers/k/kernel"][1], source["layers.1.qkv.weight"][2:4].T)


def test_export_is_the_exact_inverse():
    source = make_source()
    again = TABLE.to_source(TABLE.to_params(source, SHAPES))
    assert again.keys() == source.keys()
    for name, value in source.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].flags.c_contiguous


@pytest.mark.parametrize("op", [COPY, LINEAR, split(2), split(2, LINEAR)], ids=lambda op: op.name)
def test_operations_invert_bit_for_bit(op):
    value = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float16)
    np.testing.assert_array_equal(op.backward(op.forward(value)), value)


def test_prefix_and_sum():
    source = {"vit." + name: value for name, value in make_source().items()}
    source |= {"vit.rotary.inv_freq": np.ones(2), "ln.weight": np.ones(3), "ln.bias": np.zeros(3)}
    table = TABLE.prefixed("vit.", "vision/") + Table(norm_rules("ln", "ln_vision"))
    shapes = {"vision/" + path: shape for path, shape in SHAPES.items()}
    shapes |= {"ln_vision/scale": (3,), "ln_vision/bias": (3,)}
    params = table.to_params(source, shapes)
    assert params.keys() == shapes.keys()
    assert table.to_source(params).keys() == source.keys() - {"vit.rotary.inv_freq"}
    with pytest.raises(WeightTableError, match=r"rotary\.inv_freq"):  # ignored below vit. only
        table.to_params({**source, "rotary.inv_freq": np.ones(2)}, shapes)


def test_rule_helpers_name_weight_and_bias():
    table = Table(linear_rules("a.fc", "fc") + norm_rules("a.norm", "norm"))
    source = {
        "a.fc.weight": np.ones((2, 3)),
        "a.fc.bias": np.ones(2),
        "a.norm.weight": np.ones(2),
        "a.norm.bias": np.zeros(2),
    }
    shapes = {"fc/kernel": (3, 2), "fc/bias": (2,), "norm/scale": (2,), "norm/bias": (2,)}
    assert table.to_params(source, shapes).keys() == shapes.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strange.weight": np.ones(1)}, r"source key 'strange\.weight' is consumed by no rule"),
        ({"embed.weight": None}, r"target 'embed/embedding' is written by no source key"),
        ({"h.1.w.weight": None}, r"target 'pairs/odd/kernel' lacks layers \[0\]"),
        ({"h.5.w.weight": np.ones((2, 3))}, r"'h\.5\.w\.weight' is layer 2 of .*, which has 2"),
        ({"down.7.norm.0.weight": np.ones(2)}, r"maps to 'down_7/norms/scale', which the model"),
        ({"embed.weight": np.ones((5, 4), np.float32)}, r"'embed\.weight' gives shape \(5, 4\).*\(5, 3\)"),
        ({"h.0.w.weight": np.ones((3, 2), np.float32)}, r"'h\.0\.w\.weight' gives shape \(2, 3\).*\(3, 2\)"),
        ({"layers.0.qkv.weight": np.ones((7, 3))}, r"\(7, 3\) does not split into 3 parts"),
        ({"h.2.w.weight": np.ones((2, 3), np.float16)}, r"'h\.2\.w\.weight' is float16.*float32"),
    ],
)
def test_import_is_strict(change, message):
    source = {k: v for k, v in {**make_source(), **change}.items() if v is not None}
    with pytest.raises(WeightTableError, match=message):
        TABLE.to_params(source, SHAPES)


def test_every_problem_is_named_at_once():
    source = make_source()
    del source["embed.weight"], source["conv.weight"]
    source["strange"] = np.ones(1)
    with pytest.raises(WeightTableError) as error:
        TABLE.to_params(source, SHAPES)
    assert all(name in str(error.value) for name in ("embed/embedding", "conv/kernel", "strange"))


def test_two_keys_for_one_target_are_refused():
    table = Table((Rule("a", "x"), Rule("b", "x")))
    with pytest.raises(WeightTableError, match="'x' is written twice"):
        table.to_params({"a": np.ones(1), "b": np.ones(1)}, {"x": (1,)})


def test_export_refuses_a_parameter_without_a_rule():
    params = TABLE.to_params(make_source(), SHAPES)
    with pytest.raises(WeightTableError, match="lora/kernel"):
        TABLE.to_source({**params, "lora/kernel": np.ones(1)})


def test_ignored_keys_come_before_rules():
    table = Table((Rule("b.{i}.w", "w"),), ignored={r"b\.2\..*": "one block more than is built"})
    source = {f"b.{i}.w": np.full(1, i) for i in range(3)}
    np.testing.assert_array_equal(table.to_params(source, {"w": (2, 1)})["w"], [[0], [1]])


def test_names_are_matched_literally_and_whole():
    table = Table((Rule("a.weight", "a"),))
    for name in ("aXweight", "a.weight_v", "x.a.weight"):
        with pytest.raises(WeightTableError, match="consumed by no rule"):
            table.to_params({"a.weight": np.ones(1), name: np.ones(1)}, {"a": (1,)})
