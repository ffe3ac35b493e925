"""The order of samples, its independence of processes and restarts, workers, and the error budget."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from multiprocessing import active_children

import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.config import get_config, validate
from minigpt5_jax.data.batches import pipeline
from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.lengths import LengthIndex
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.errors import DataError, Problem, SampleError, allowed_errors
from minigpt5_jax.data.samples.pairs import PairRules
from minigpt5_jax.data.sources import Cc3mSource
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer

ROWS = 10  # and one instruction sample: 11 in training


def spec(rows, **changes):
    sizes = {"length": 48, "items": rows, "images": rows, "targets": 3, "image_size": 8, "target_size": 16}
    return BatchSpec(rows=rows, **{**sizes, **changes})


@pytest.fixture(scope="module")
def config(oracle_dir):
    llama = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")
    return EncodeConfig(llama, ClipTokenizer(oracle_dir / "tokenizer_clip"), flip_mode="independent")


@pytest.fixture
def table(tmp_path):
    """Ten captioned images, each of its own colours."""
    (tmp_path / "val").mkdir()
    lines = ["caption\timage_path"]
    for i in range(ROWS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / f"{i}.png")
        lines.append(f"the dog number {i}\tval/{i}.png")
    path = tmp_path / "cc3m.tsv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def source(table):
    return Cc3mSource(table)


def fields(batch):
    """Arrays of a batch by name, without those that it does not have."""
    return {name: value for name, value in vars(batch).items() if value is not None}


def assert_equal(a, b):
    for name, value in fields(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def take(loader, n):
    batches = [next(loader) for _ in range(n)]
    loader.close()
    return batches


def run(source, config, *, steps, rows=4, start=0, shape=None, **kwargs):
    kwargs.setdefault("prefetch", 0)
    shape = shape or spec(rows)
    global_batch = shape.samples * kwargs.get("accumulation", 1)
    loader = make_loader(source, config, shape, global_batch=global_batch, seed=3, **kwargs)
    loader.restore(start)
    return take(loader, steps)


def join(parts):
    """Parts of one batch, put together over processes along the axis of rows."""
    axis = 1 if parts[0].tokens.ndim == 3 else 0
    joined = {n: np.concatenate([getattr(p, n) for p in parts], axis) for n in fields(parts[0])}
    return type(parts[0])(**joined)


def test_order_visits_every_sample_once_an_epoch(source, config):
    batches = run(source, config, steps=11)  # 44 samples: 4 epochs of 11
    numbers = np.concatenate([b.row_id for b in batches])
    assert numbers.tolist() == list(range(44))
    rows = np.concatenate([b.tokens for b in batches]).reshape(4, 11, -1)
    epochs = [[tuple(row) for row in epoch] for epoch in rows]
    plain = {row for row in epochs[0]} & {row for row in epochs[1]}
    assert len(plain) >= 10  # the eleventh is an instruction sample, worded again each epoch
    assert all(len(set(epoch)) == 11 and plain <= set(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert_equal(batches[5], run(source, config, steps=6)[5])


def test_order_and_mirrors_depend_on_the_seed(source, config):
    def targets(seed):
        loader = make_loader(source, config, spec(11), global_batch=11, seed=seed, prefetch=0)
        return next(loader).target

    assert (targets(0) == targets(0)).all() and (targets(0) != targets(1)).any()


def test_without_shuffle_the_order_is_the_files(table, config):
    source = Cc3mSource(table, rules=PairRules(training=False))
    config = dataclasses.replace(config, flip_mode="off")
    loader = make_loader(source, config, spec(5), global_batch=5, shuffle=False, prefetch=0)
    batches = take(loader, 3)
    for row in range(5):
        want = np.asarray(Image.open(table.parent / "val" / f"{row}.png"))
        np.testing.assert_array_equal(batches[0].target[row], want)
    np.testing.assert_array_equal(batches[0].target, batches[2].target)  # 10 rows, 5 a step


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_read_contiguous_rows_of_the_same_batches(source, config, accumulation):
    whole = run(source, config, steps=3, accumulation=accumulation)
    for count in (2, 4):
        parts = [
            run(source, config, steps=3, accumulation=accumulation, process_index=p, process_count=count)
            for p in range(count)
        ]
        for step in range(3):
            assert parts[0][step].tokens.shape[-2] == 4 // count
            assert_equal(join([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("process", [0, 1])
def test_samples_of_a_step_are_those_of_all_processes(source, config, process):
    options = {"shuffle": False, "num_epochs": 1, "process_index": process, "process_count": 2}
    loader = make_loader(source, config, spec(4), global_batch=4, **options)
    assert loader.samples(0) == [0, 1, 2, 3]
    assert loader.samples(2) == list(range(8, len(source))), "empty rows have none"


def test_accumulation_splits_the_same_samples(source, config):
    large = run(source, config, steps=2, rows=4)
    small = run(source, config, steps=2, rows=2, accumulation=2)
    for a, b in zip(large, small):
        assert b.tokens.shape == (2, 2, 48) and b.target.shape == (2, 2, 16, 16, 3)
        for name in ("tokens", "labels", "row_id", "target", "item_id", "voken_start", "caption_ids"):
            value = getattr(b, name)
            np.testing.assert_array_equal(value.reshape(-1, *value.shape[2:]), getattr(a, name))
        assert b.voken_row.tolist() == [[0, 1], [0, 1]]  # within the micro-batch


@pytest.mark.parametrize("start", [0, 1, 4])
def test_resume_at_any_step_on_another_process_count(source, config, start):
    straight = run(source, config, steps=6)
    loader = make_loader(source, config, spec(4), global_batch=4, seed=3)
    take(loader, start)
    assert loader.state == start
    parts = [
        run(source, config, steps=6 - start, start=loader.state, process_index=p, process_count=2)
        for p in range(2)
    ]
    for step in range(6 - start):
        assert_equal(join([part[step] for part in parts]), straight[start + step])


def test_worker_processes_change_nothing(source, config):
    straight = run(source, config, steps=5)
    loader = make_loader(source, config, spec(4), global_batch=4, seed=3, worker_count=2, prefetch=1)
    for step in range(3):
        assert_equal(next(loader), straight[step])
    loader.restore(1)
    for step in range(1, 5):
        assert_equal(next(loader), straight[step])
    loader.close()


def test_a_last_epoch_ends_in_empty_rows(table, config):
    source = Cc3mSource(table, rules=PairRules(training=False))
    loader = make_loader(source, config, spec(4), global_batch=4, shuffle=False, num_epochs=1)
    batches = list(loader)
    assert loader.num_steps == len(batches) == loader.state == 3
    assert [b.item_mask.tolist() for b in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert not batches[2].segment_ids[2:].any() and loader.skipped == []
    with pytest.raises(StopIteration):
        next(loader)
    loader.restore(2)
    assert_equal(next(loader), batches[2])
    with pytest.raises(DataError, match=r"data state 4 is not in 0 \.\.\. 3"):
        loader.restore(4)


@pytest.mark.parametrize(
    ("budget", "allowed"), [(0, 0), (0.0, 0), (0.01, 0), (0.2, 6), (0.999, 29), (1, 1), (10.0, 10), (40, 40)]
)
def test_a_budget_is_a_share_below_one_or_a_count(budget, allowed):
    assert allowed_errors(budget, 30) == allowed
    config = get_config()
    config.data.error_budget = budget
    assert allowed_errors(validate(config).data.error_budget, 30) == allowed, (
        "configurations hold it as float"
    )


def test_messages_hold_no_control_characters():
    for error in (DataError("a\x1b[31m\x9b"), SampleError("f\x07", "b\n\x7f"), Problem(0, "f\x1b", "\tc\r")):
        assert not set(str(error)) & set("\x1b\x07\x7f\x9b\r")
    assert str(DataError("a\x1b\né")) == "a\\x1b\né"


def break_images(table):
    """Zero bytes, half a file, no file, no image: rows 1, 3, 5, 7."""
    folder = table.parent / "val"
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "5.png").unlink()
    (folder / "7.png").write_bytes(b"<html>gone</html>")


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_samples_are_masked_counted_and_named(table, config, workers, caplog):
    break_images(table)
    source = Cc3mSource(table, rules=PairRules(training=False))
    loader = make_loader(
        source,
        config,
        spec(5),
        global_batch=5,
        shuffle=False,
        num_epochs=2,
        worker_count=workers,
        error_budget=4,
    )
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    good = np.array([True, False, True, False, True, False, True, False, True, True])
    for epoch in (batches[:2], batches[2:]):
        assert np.concatenate([b.item_mask for b in epoch]).tolist() == good.tolist()
        segments = np.concatenate([b.segment_ids for b in epoch])
        assert segments.any(1).tolist() == good.tolist()
        targets = np.concatenate([b.target for b in epoch])
        assert not targets[~good].any()  # never another sample's image
    assert len(loader.skipped) == 4  # each once, although met in both epochs
    assert [skip.index for skip in loader.skipped] == [1, 3, 5, 7]
    reasons = ["empty", "broken", "cannot be read", "no known image format"]
    for skip, reason, row in zip(loader.skipped, reasons, (1, 3, 5, 7)):
        assert reason in skip.reason and f"{row}.png" in skip.reason and f"cc3m_{row}" in skip.reason
        assert skip.where == f"{table}:{row + 2}"
        assert str(skip) in caplog.text


@pytest.mark.parametrize("budget, allowed", [(3, 3), (0.3, 3), (0, 0), (0.05, 0)])
def test_a_spent_budget_is_one_error_that_names_the_first(table, config, budget, allowed):
    break_images(table)
    source = Cc3mSource(table, rules=PairRules(training=False))
    loader = make_loader(
        source, config, spec(1), global_batch=1, shuffle=False, num_epochs=1, error_budget=budget
    )
    with pytest.raises(DataError, match=rf"{allowed + 1} samples .* allows {allowed}") as caught:
        list(loader)
    assert "cc3m.tsv:3: cc3m_1:" in str(caught.value) and "1.png: image file is empty" in str(caught.value)
    assert loader.state == 2 * allowed + 2  # at once


def test_processes_share_the_budget(table, config):
    break_images(table)
    source = Cc3mSource(table, rules=PairRules(training=False))
    for budget, allowed in ((4, 2), (3, 2), (0, 0)):
        loader = make_loader(
            source,
            config,
            spec(2),
            global_batch=2,
            shuffle=False,
            num_epochs=1,
            error_budget=budget,
            process_index=1,
            process_count=2,
        )
        with pytest.raises(DataError, match=f"the error budget allows {allowed}"):
            list(loader)  # rows 1, 3, 5, 7 are all of the second process


def test_rows_of_the_table_count_against_the_budget(table, config):
    table.write_text(table.read_text() + "\n...\tval/0.png\nno path")
    source = Cc3mSource(table, rules=PairRules(training=False))
    loader = make_loader(source, config, spec(4), global_batch=4, shuffle=False, num_epochs=1, error_budget=2)
    batches = list(loader)
    assert batches[2].item_mask.tolist() == [True, True, False, False]
    assert [s.reason for s in loader.skipped] == [
        "empty caption",
        "1 tab-separated cells, the header has 2",
    ]


def test_long_captions_are_cut_and_counted(table, config):
    table.write_text(table.read_text() + "\n" + "the dog " * 200 + "\tval/0.png")
    source = Cc3mSource(table, rules=PairRules(training=False))
    loader = make_loader(source, config, spec(11), global_batch=11, shuffle=False, num_epochs=1)
    batch = next(loader)
    assert loader.truncated == 1 and batch.item_mask.all()
    start = batch.voken_start[10]
    assert start == 48 - 9
    assert batch.tokens[10, start:].tolist() == [*config.tokenizer.voken_ids, 835]
    assert (batch.labels[10] != -100).sum() == 3


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"global_batch": 10, "accumulation": 4}, r"global_batch = 10 is not .* = 4 rows x 1 x 4"),
        (
            {"global_batch": 8, "accumulation": 2, "process_count": 3},
            "8 over accumulation = 2 gives 4 rows.*3 proc",
        ),
        ({"global_batch": 4, "process_count": 2, "process_index": 2}, "process_index = 2 of 2"),
        ({"global_batch": 4, "error_budget": 1.5}, "a share below 1 .0.01. or a count .10., got 1.5"),
        ({"global_batch": 4, "error_budget": -1}, "got -1"),
        ({"global_batch": 4, "seed": -1}, "seed must be in 0 ... 4294967295, got -1"),
    ],
)
def test_sizes_that_do_not_divide_are_errors_with_the_numbers(source, config, kwargs, message):
    with pytest.raises(DataError, match=message):
        make_loader(source, config, spec(4), **kwargs)


def test_a_source_of_one_sample_fills_any_batch(table, config):
    table.write_text("caption\timage_path\na dog\tval/0.png")
    source = Cc3mSource(table, rules=PairRules(training=False))
    batch = take(make_loader(source, config, spec(4), global_batch=4), 2)[1]
    assert batch.item_mask.all() and batch.row_id.tolist() == [4, 5, 6, 7]


def test_an_error_in_a_worker_is_the_same_error(source, config):
    tight = spec(4, length=9, targets=3)  # no room for BOS, vokens and ending
    for workers in (0, 1):
        loader = make_loader(source, config, tight, global_batch=4, worker_count=workers)
        with pytest.raises(DataError, match="8 positions are left for a target"):
            next(loader)
        loader.close()


def test_a_loader_that_is_interrupted_while_it_opens_ends_its_workers(source, config, monkeypatch):
    @contextlib.contextmanager
    def interrupted():  # as by a signal that was held back
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_signals_held", interrupted)
    loader, before = make_loader(source, config, spec(4), global_batch=4, worker_count=1), active_children()
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    loader.close()
    assert set(active_children()) <= set(before) and loader.state == 0


# ------------------------------------------------------------------------------- buckets and packing


LENGTHS = LengthIndex(np.array([17, 24, 31, 40, 18, 20, 45, 29, 33, 48], np.int32), np.zeros(10, np.int32))


def layout(name):
    """Samples that differ in length: in buckets, or two to a row."""
    if name == "buckets":
        return {"shape": spec(4, images=0), "buckets": (24, 48), "index": LENGTHS}
    return {"shape": spec(4, length=96, items=8, images=0, pack=2), "index": LENGTHS}


@pytest.fixture
def ragged(table):
    """Captions of the lengths of ``LENGTHS``: BOS, words, ten for the vokens and ``###``."""
    lines = table.read_text().split("\n")
    words = [" ".join(["the"] * (length - 10)) for length in LENGTHS.lengths]
    rows = [f"{words[i]}\tval/{i}.png" for i in range(ROWS)]
    table.write_text("\n".join([lines[0], *rows]))
    return Cc3mSource(table, rules=PairRules(training=False))


@pytest.mark.parametrize("name", ["buckets", "pack"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_planned_rows_are_the_same_for_any_process_count(ragged, config, name, accumulation):
    kwargs = {"steps": 5, "accumulation": accumulation, **layout(name)}
    whole = run(ragged, config, **kwargs)
    for count in (2, 4):
        parts = [run(ragged, config, process_index=p, process_count=count, **kwargs) for p in range(count)]
        for step in range(5):
            assert_equal(join([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("name", ["buckets", "pack"])
def test_planned_rows_resume_on_another_process_and_worker_count(ragged, config, name):
    straight = run(ragged, config, steps=7, **layout(name))
    for start, count in ((1, 2), (4, 1)):
        parts = [
            run(
                ragged,
                config,
                steps=7 - start,
                start=start,
                process_index=p,
                process_count=count,
                worker_count=count - 1,
                prefetch=1,
                **layout(name),
            )
            for p in range(count)
        ]
        for step in range(7 - start):
            assert_equal(join([part[step] for part in parts]), straight[start + step])


def test_a_bucket_has_its_own_static_shape_and_cuts_nothing(ragged, config):
    loader = make_loader(
        ragged,
        config,
        spec(4, images=0),
        global_batch=4,
        seed=3,
        num_epochs=1,
        buckets=(24, 48),
        index=LENGTHS,
    )
    batches = list(loader)
    assert {b.tokens.shape for b in batches} == {(4, 24), (4, 48)}
    seen = np.concatenate([b.row_id[b.item_mask] for b in batches])
    assert sorted(seen) == list(range(ROWS)) and loader.truncated == 0
    sizes = np.concatenate([b.segment_ids.sum(1)[b.item_mask] for b in batches])
    assert sorted(sizes) == sorted(LENGTHS.lengths)


def test_packed_rows_hold_every_sample_whole(ragged, config):
    packed = run(ragged, config, steps=3, **layout("pack"))
    plain = run(ragged, config, steps=3, rows=8)
    for one, many in zip(packed, plain):
        assert one.tokens.shape == (4, 96) and one.item_id.shape == (8,)
        assert sorted(one.item_id) == sorted(many.item_id)
        for slot, number in enumerate(one.item_id):
            row, segment = divmod(slot, 2)
            here = one.segment_ids[row] == segment + 1
            other = list(many.item_id).index(number)
            there = many.segment_ids[other] == 1
            for name in ("tokens", "labels", "positions"):
                np.testing.assert_array_equal(
                    getattr(one, name)[row, here], getattr(many, name)[other, there]
                )
            start = np.flatnonzero(here)[0]
            assert one.voken_start[slot] - start == many.voken_start[other] and one.voken_row[slot] == row
            np.testing.assert_array_equal(one.target[slot], many.target[other])
        places = one.label_positions[one.label_positions > 0]
        assert (
            len(places) == 24 and (np.take_along_axis(one.labels, one.label_positions, 1) != -100).sum() == 24
        )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"buckets": (24, 48)}, "need the length index"),
        ({"buckets": (24, 40), "index": LENGTHS}, "last bucket is 40, rows have 48"),
        (
            {"buckets": (24, 48), "index": LENGTHS, "shuffle": False},
            "length buckets go with shuffled samples",
        ),
        (
            {"spec": spec(2, items=4, images=0, pack=2), "index": LENGTHS},
            r"\d+% of rows of 48 positions do not hold 2 samples; use longer rows",
        ),
        ({"spec": spec(2, items=4, images=0, pack=2)}, "need the length index"),
        (
            {"spec": spec(2, items=4, images=0, pack=2), "index": LENGTHS, "process_count": 4},
            "gives 2 rows of 2 samples, which 4 processes",
        ),
    ],
)
def test_plans_that_cannot_be_are_errors(ragged, config, kwargs, message):
    with pytest.raises(DataError, match=message):
        make_loader(ragged, config, kwargs.pop("spec", spec(4)), global_batch=4, **kwargs)
