"""Checkpoints: bit-exact round trips, other meshes, damaged and foreign folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging as python_logging
import resource
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt5_jax.training import checkpoint, provenance
from minigpt5_jax.training.checkpoint import Checkpoints
from minigpt5_jax.training.checksum import checksums
from minigpt5_jax.training.provenance import (
    NOT_LOADED,
    CheckpointError,
    check_compatible,
    describe_run,
    hash_parameters,
)
from minigpt5_jax.training.state import init_state

LABELS = {"mapper/fc/kernel": "mapper", "llm/voken": "llm", "vae/conv": "frozen"}


def mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def make_state(mesh_, seed=0):
    """A TrainState with sharded parameters and moments that are not zero."""
    optimizer = optax.partition(
        {"mapper": optax.adamw(1e-2), "llm": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, LABELS
    )
    first, second = jax.random.split(jax.random.key(seed))
    trainable = {
        "mapper/fc/kernel": jax.device_put(
            jax.random.normal(first, (16, 8)), NamedSharding(mesh_, P("fsdp", "data"))
        ),
        "llm/voken": jax.device_put(jax.random.normal(second, (9, 4)), NamedSharding(mesh_, P())),
    }
    state = init_state(trainable, LABELS, optimizer, seed)

    @jax.jit
    def step(state):
        grads = {path: jnp.sin(value) for path, value in state.trainable.items()}
        full = {**grads, "vae/conv": optax.MaskedNode()}
        updates, opt_state = optimizer.update(
            full, state.opt_state, {**state.trainable, "vae/conv": optax.MaskedNode()}
        )
        trainable = {path: value + updates[path] for path, value in state.trainable.items()}
        return type(state)(state.step + 1, trainable, opt_state, state.rng)

    return step(state), step


def assert_same(a, b):
    def bits(tree):
        leaves = [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in jax.tree.leaves(tree)
        ]
        return [np.asarray(x) for x in leaves]

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(bits(a), bits(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def meta(**changes):
    config = {
        "model": {"mapper": {"name": "encoder_decoder", "d_model": 8}, "remat": False},
        "optimizer": {"lr_mapper": 1e-3},
        "tuning": {"rules": (("a", "b"),)},
    }
    described = describe_run(config, tokenizer={"sha256": "aa", "num_vokens": 8}, frozen={"vae": "bb"})
    return {**described, **changes}


def test_round_trip_is_bit_exact_while_the_state_is_donated(tmp_path):
    state, step = make_state(mesh(2, 4))
    expected = jax.tree.map(jnp.copy, vars(state))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, vars(state), 17, meta(), losses={"loss": 1.0})
    jax.jit(step, donate_argnums=0)(state)  # goes on at once, before the files are written
    checkpoints.wait()

    restored, data_state, saved = Checkpoints(tmp_path / "checkpoints").restore(expected)
    assert_same(restored, expected)
    assert data_state == 17
    assert saved["tokenizer"] == {"sha256": "aa", "num_vokens": 8}
    assert restored["trainable"]["mapper/fc/kernel"].sharding.spec == P("fsdp", "data")


def test_restores_onto_another_mesh_and_only_what_is_asked_for(tmp_path):
    state, _ = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, vars(state), 0, meta())
    checkpoints.wait()
    other = NamedSharding(mesh(8, 1), P("data", None))
    like = {
        "trainable": {
            "mapper/fc/kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=other),
            "llm/voken": jax.ShapeDtypeStruct((9, 4), jnp.float32, sharding=NamedSharding(other.mesh, P())),
        }
    }
    restored, _, _ = checkpoints.restore(like)
    assert restored.keys() == {"trainable"}
    assert restored["trainable"]["mapper/fc/kernel"].sharding == other
    assert_same(restored["trainable"], state.trainable)


def test_abstract_key_and_state(tmp_path):
    state, _ = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, vars(state), 0, meta())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), vars(state)
    )
    checkpoints.wait()
    assert_same(checkpoints.restore(abstract)[0], vars(state))


def test_keeps_latest_and_best(tmp_path):
    state, _ = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best=1, best_metric="image")
    for step, image in ((1, 0.5), (2, 0.1), (3, 0.4), (4, None), (5, float("nan"))):
        checkpoints.save(step, vars(state), step, meta(), metrics=None if image is None else {"image": image})
    checkpoints.wait()
    assert checkpoints.steps == [2, 4, 5]
    assert checkpoints.latest_step == 5
    assert checkpoints.restore(vars(state), step=2)[1] == 2


def test_an_unknown_best_metric_is_said(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        Checkpoints(tmp_path, best_metric="imgae").save(
            1, {"step": jnp.asarray(1)}, 0, meta(), metrics={"image": 1.0, "text": 2.0}
        )
    assert any("'imgae'" in r.getMessage() and "image, text" in r.getMessage() for r in caplog.records)


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    for value in (1.0, 2.0):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(4, {"trainable": {"a": jnp.full(3, value)}}, 0, meta())
        checkpoints.close()
    restored, _, _ = Checkpoints(tmp_path).restore({"trainable": {"a": jnp.zeros(3)}})
    np.testing.assert_array_equal(restored["trainable"]["a"], np.ones(3))


def test_refuses_a_state_behind_a_non_finite_loss(tmp_path):
    state, _ = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step 9 is not saved.*image.*nan"):
        checkpoints.save(9, vars(state), 0, meta(), losses={"text": 1.0, "image": float("nan")})
    assert checkpoints.latest_step is None


def test_missing_folder_and_step(tmp_path):
    like = {"step": jnp.zeros((), jnp.int32)}
    missing = Checkpoints(tmp_path / "none")
    assert missing.latest_step is None
    with pytest.raises(CheckpointError, match="none does not exist"):
        missing.restore(like)
    assert not (tmp_path / "none").exists()  # looking for a checkpoint makes no folder
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Checkpoints(tmp_path).restore(like)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, like, 0, meta())
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"has no step 7; it has \[1\]"):
        checkpoints.restore(like, step=7)


def test_half_written_and_damaged_steps_are_passed_over(tmp_path, caplog):
    state, _ = make_state(mesh(2, 4))
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, vars(state), step, meta())
    checkpoints.close()
    newest = tmp_path / "00000002"
    shutil.copytree(newest, tmp_path / "00000003.orbax-checkpoint-tmp-0")  # a save that was cut off
    for file in (newest / "trainable").rglob("*"):
        if file.is_file() and "manifest" not in file.name and "METADATA" not in file.name:
            file.write_bytes(b"")

    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1, 2]
    with caplog.at_level("WARNING", logger="absl"):
        restored, data_state, _ = checkpoints.restore(vars(state))
    assert data_state == 1 and checkpoints.latest_step == 1
    assert_same(restored, vars(state))
    assert any(
        "step 2 in" in record.getMessage() and "step 1 is the newest that can" in record.getMessage()
        for record in caplog.records
    )
    for opened in (checkpoints, Checkpoints(tmp_path)):  # known to be damaged, and not yet
        with pytest.raises(
            CheckpointError, match=r"step 2 in .* cannot be read .*: 1 \(--step 1\)$"
        ) as error:
            opened.restore(vars(state), step=2)
        assert len(str(error.value)) < 400, "no walls of TensorStore's text"
    checkpoints.save(2, vars(state), 2, meta())  # the damaged step can be written again
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(vars(state))[1] == 2


def weights(value):
    return {"trainable": {"a": jnp.full((5, 3), value, jnp.float32)}}


def two_steps(folder):
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, weights(step), step, meta(stage=step), metrics={"image": step})
    checkpoints.close()
    return folder / "00000002"


def empty_all(step):
    for file in step.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def empty_folder(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "all files empty": empty_all,
    "description empty": lambda step: (step / "meta/metadata").write_bytes(b""),
    "description cut": lambda step: (step / "meta/metadata").write_text('{"data_state"'),
    "description of nothing": lambda step: (step / "meta/metadata").write_text("{}"),
    "no description": lambda step: shutil.rmtree(step / "meta"),
    "empty folder": empty_folder,
    "no parameters": lambda step: shutil.rmtree(step / "trainable"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_reader_takes_the_newest_step_that_can_be_read(tmp_path, caplog, damage):
    damage(two_steps(tmp_path))
    with caplog.at_level("WARNING", logger="absl"):
        assert Checkpoints(tmp_path, read_only=True).newest_readable() == 1
    [said] = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert "step 2 in" in said and "step 1 is the newest that can" in said and len(said) < 400
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(weights(0.0))[1] == 1 and checkpoints.latest_step == 1
    assert checkpoints.meta()["stage"] == 1 and checkpoints.paths("trainable") == ("a",)
    checkpoints.save(2, weights(7.0), 2, meta())  # the step can be written again
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(weights(0.0), step=2)[0]["trainable"]["a"][0, 0] == 7


def test_parameters_that_were_tried_are_not_read_again(tmp_path, monkeypatch):
    two_steps(tmp_path)
    checkpoints, reads = Checkpoints(tmp_path, read_only=True), []
    manager = type(checkpoints._manager)
    restore = manager.restore
    monkeypatch.setattr(manager, "restore", lambda *a, **b: reads.append(1) or restore(*a, **b))
    step = checkpoints.newest_readable()
    checkpoints.close()  # as open_run does; loading opens it again
    for count in (1, 2):
        assert checkpoints.restore(weights(0.0), step)[0]["trainable"]["a"][0, 0] == step == 2
        assert len(reads) == count, "kept for one reader"


def test_a_damaged_step_does_not_push_out_one_that_can_be_read(tmp_path):
    (two_steps(tmp_path) / "meta/metadata").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best=0)
    assert checkpoints.newest_readable() == 1
    checkpoints.save(3, weights(3.0), 3, meta())
    checkpoints.close()
    assert Checkpoints(tmp_path).steps == [1, 3]


def test_where_nothing_can_be_read_every_step_is_named(tmp_path):
    two_steps(tmp_path)
    for step in ("00000001", "00000002"):
        (tmp_path / step / "meta/metadata").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read:\n  step 1: .*\n  step 2: .*"
    ):
        Checkpoints(tmp_path).newest_readable()
    with pytest.raises(CheckpointError, match="step 2 in .* cannot be read .* nor can any other"):
        Checkpoints(tmp_path).meta(2)


def test_a_flipped_bit_is_found(tmp_path, monkeypatch):
    two_steps(tmp_path)
    meta_file = tmp_path / "00000002/meta/metadata"
    saved = json.loads(meta_file.read_text())
    assert saved["checksums"]["trainable"] == {"['a']": checksums(weights(2)["trainable"])["a"]}
    saved["checksums"]["trainable"]["['a']"] ^= 1  # as if the array had changed
    meta_file.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"trainable\['a'\] is not what was saved.*--step 1"):
        Checkpoints(tmp_path).restore(weights(0), step=2)
    assert Checkpoints(tmp_path).newest_readable() == 1
    del saved["checksums"]  # as earlier versions wrote it
    meta_file.write_text(json.dumps(saved))
    assert Checkpoints(tmp_path).newest_readable() == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_a_checksum_changes_with_one_bit_one_place_and_not_with_the_mesh(dtype):
    bits = np.random.default_rng(0).integers(0, 2, (16, 8 * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    values = bits if dtype == "bool" else np.packbits(bits, axis=1)
    values = values.view(jnp.dtype(dtype)).reshape(4, -1)
    changed = values.copy().view(np.uint8)
    changed[2, 1] ^= 1
    changed = changed.view(values.dtype)
    sharded = jax.device_put(
        values, NamedSharding(mesh(2, 4), P("fsdp", "data" if dtype == "bool" else None))
    )
    found = checksums({"a": values, "sharded": sharded, "changed": changed, "moved": values[::-1].copy()})
    assert found["a"] == found["sharded"]
    assert len({found["a"], found["changed"], found["moved"]}) == 3


def test_checksums_of_an_accelerator_come_in_one_transfer(monkeypatch):
    values = {"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int32)}
    one_by_one, transfers, get = checksums(values), [], jax.device_get
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(tree) or get(tree))
    assert checksums(values) == one_by_one and len(transfers) == 1


@pytest.mark.parametrize("version", ["now", "before"])
def test_the_best_step_stays_after_a_restart(tmp_path, version):
    """``before``: metrics are in the lines of the run only."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    values = {2: 0.1, 3: 0.5, 4: 0.4, 5: 0.3}
    for step, image in values.items():
        checkpoints.save(step, weights(step), step, meta(), metrics={"image": image, "text": 1.0})
    checkpoints.close()
    assert Checkpoints(folder).steps == [2, 4, 5]
    if version == "before":
        for file in folder.glob("*/meta/metadata"):
            saved = json.loads(file.read_text())
            assert saved.pop("metrics").keys() == {"image", "text"}
            file.write_text(json.dumps(saved))
        lines = [json.dumps({"step": s, "validation/image": v}) for s, v in values.items()]
        lines = [json.dumps({"step": 2, "loss": 9.0}), *lines, '{"step": 5, "val']
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    reopened = Checkpoints(folder)
    reopened.save(6, weights(6), 6, meta(), metrics={"image": 0.9})
    reopened.close()
    assert Checkpoints(folder).steps == [2, 5, 6]


def test_a_save_that_failed_is_said_of_its_own_step(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, weights(1), 1, meta())

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(CheckpointError, match="cannot save step 1 in .*No space left"):
        checkpoints.save(2, weights(2), 2, meta())
    monkeypatch.setattr(checkpoints._manager, "close", full)
    with pytest.raises(CheckpointError, match="cannot save step 1 in .*No space left"):
        checkpoints.close()


@pytest.fixture
def small_files():
    """Files of this process end at 100 kB while it is entered: the system refuses the rest."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def large(step):
    values = np.random.default_rng(step).standard_normal((256, 1024))
    return {"trainable": {f"a{i}": jnp.asarray(values, jnp.float32) for i in range(3)}}


@pytest.mark.parametrize("told_by", ["check", "close"])
def test_a_disk_that_fails_is_told_in_a_line_and_leaves_the_step_before(
    tmp_path, capfd, small_files, told_by
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, large(4), 4, meta())
    checkpoints.wait()
    checkpoints.check()
    with small_files():
        checkpoints.save(6, large(6), 6, meta())
        with pytest.raises(CheckpointError) as error:
            while told_by == "check":  # as every step does
                checkpoints.check()
            checkpoints.close()
    assert str(error.value) == (
        f"cannot save step 6 in {tmp_path}: File too large; once this is mended, the same command goes on "
        "from step 4, which is whole"
    )
    assert "Traceback" not in capfd.readouterr().err
    again = Checkpoints(tmp_path)
    assert_same(again.restore(large(0))[0], large(4))
    again.save(6, large(6), 6, meta())
    again.close()
    assert Checkpoints(tmp_path).steps == [4, 6]


def test_only_folders_open_for_writing_change_what_python_prints(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "_hush", checkpoint._Hush())  # other tests may have left folders open
    asyncio = python_logging.getLogger("asyncio")
    for logger in (logging.get_absl_logger(), asyncio):
        monkeypatch.setattr(logger, "filters", [])

    def hushed():
        """Whether asyncio may tell of Orbax's errors that nobody asked for, and the hook is another."""
        caplog.clear()
        for file in ("site/orbax/write.py", "site/other.py"):
            try:
                exec(compile("raise ValueError", file, "exec"))
            except ValueError:
                asyncio.exception("exception was never retrieved, of %s", file)
        assert "site/other.py" in caplog.text
        return "site/orbax" not in caplog.text, sys.unraisablehook is not before

    before, writers = sys.unraisablehook, [Checkpoints(tmp_path / name) for name in "ab"]
    for writer in writers:
        writer.save(1, weights(1), 1, meta())
    assert hushed() == (True, True)
    writers[0].close()
    assert hushed() == (True, True)
    writers[1].close()
    assert hushed() == (False, False)
    assert Checkpoints(tmp_path / "a", read_only=True).steps == [1]
    assert hushed() == (False, False)


def test_other_shape_dtype_or_leaf_is_one_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"trainable": {"a": jnp.zeros((4, 2)), "b": jnp.zeros(3)}}, 0, meta())
    checkpoints.wait()
    other = {"trainable": {"a": jnp.zeros((4, 3)), "b": jnp.zeros(3, jnp.bfloat16), "c": jnp.zeros(1)}}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(other)
    message = str(error.value)
    assert "trainable['a'] is float32[4,2] in the checkpoint, float32[4,3] here" in message
    assert "trainable['b'] is float32[3] in the checkpoint, bfloat16[3] here" in message
    assert "trainable['c'] is not in the checkpoint" in message
    with pytest.raises(CheckpointError, match="part 'opt_state' is not in the checkpoint"):
        checkpoints.restore({"opt_state": {"a": jnp.zeros(1)}})


def test_check_compatible_names_every_differing_key_with_both_values():
    saved = meta()
    check_compatible(saved, meta())
    other = meta(tokenizer={"sha256": "cc", "num_vokens": 8}, frozen={"vae": "bb", "unet": "dd"})
    other["config"] = {
        **saved["config"],
        "model": {"mapper": {"name": "encoder_decoder", "d_model": 16}, "remat": True},
    }
    with pytest.raises(CheckpointError) as error:
        check_compatible(saved, other)
    message = str(error.value)
    assert "config.model.mapper.d_model: checkpoint 8, this run 16" in message
    assert "tokenizer.sha256: checkpoint 'aa', this run 'cc'" in message
    assert "frozen.unet: checkpoint 'absent', this run 'dd'" in message
    assert "remat" not in message and "num_vokens" not in message
    check_compatible(saved, other, allow=("config.model.mapper", "tokenizer", "frozen.unet"))


def test_towers_that_either_run_did_not_load_are_not_compared():
    saved = meta(frozen={"vae": "bb", "unet": NOT_LOADED, "vit": NOT_LOADED})
    check_compatible(saved, meta(frozen={"vae": "bb", "unet": "dd", "vit": NOT_LOADED}))
    check_compatible(saved, meta(frozen={"vae": NOT_LOADED, "unet": NOT_LOADED, "vit": "ee"}))
    with pytest.raises(CheckpointError, match=r"frozen.vae: checkpoint 'bb', this run 'cc'$"):
        check_compatible(saved, meta(frozen={"vae": "cc", "unet": "dd", "vit": "ee"}))


def test_other_optimizer_settings_do_not_count_as_another_model():
    other = meta()
    other["config"] = {**other["config"], "optimizer": {"lr_mapper": 5.0}}
    check_compatible(meta(), other)


def test_hash_changes_with_a_single_bit_and_with_the_name():
    params = {"generator/vae/a": jnp.arange(4.0), "generator/unet/b": jnp.ones(2, jnp.bfloat16)}
    hashes = hash_parameters(params)
    assert hashes.keys() == {"generator/vae", "generator/unet"}
    changed = hash_parameters({**params, "generator/vae/a": jnp.arange(4.0).at[3].add(1e-6)})
    assert changed["generator/unet"] == hashes["generator/unet"]
    assert changed["generator/vae"] != hashes["generator/vae"]
    renamed = hash_parameters({"generator/vae/c": params["generator/vae/a"]})
    assert renamed["generator/vae"] != hashes["generator/vae"]


@pytest.mark.parametrize("sharded", [False, True])
def test_large_arrays_are_hashed_in_pieces_and_only_once(monkeypatch, sharded):
    values = np.random.default_rng(0).standard_normal((7, 4, 2)).astype(np.float32)
    params = {"generator/vae/a": jnp.asarray(values), "generator/vae/b": jnp.float32(2.0)}
    if sharded:
        sharding = NamedSharding(mesh(4, 2), P(None, "data", "fsdp"))
        params["generator/vae/a"] = jax.device_put(values, sharding)
    expected = hashlib.sha256()
    for name, value in (("generator/vae/a", values), ("generator/vae/b", np.float32(2.0))):
        expected.update(f"{name} {np.shape(value)} float32 ".encode() + value.tobytes())
    seen = []
    monkeypatch.setattr(provenance, "PIECE", 70)  # two layers of 32 bytes
    monkeypatch.setattr(
        provenance, "_on_host", lambda x, before=provenance._on_host: seen.append(x.nbytes) or before(x)
    )
    assert hash_parameters(params) == {"generator/vae": expected.hexdigest()}
    assert seen == [64, 64, 64, 32, 4]
    assert hash_parameters(dict(params)) == {"generator/vae": expected.hexdigest()} and len(seen) == 5
    hash_parameters({**params, "generator/vae/b": jnp.float32(2.0)})  # equal, but another array
    assert len(seen) == 10
