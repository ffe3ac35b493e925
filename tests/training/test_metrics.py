"""Progress: lines, images, reading one step late, divergence, and life without TensorFlow."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from minigpt5_jax.config import get_config
from minigpt5_jax.training import metrics as metrics_module
from minigpt5_jax.training.compiling import Announced, compiling
from minigpt5_jax.training.metrics import Metrics, TrainingDiverged, due
from minigpt5_jax.training.tracking import TrackerError, check_tracker, open_tracker
from minigpt5_jax.wiring.training import make_loop

OPEN_TENSORBOARD = metrics_module._open_tensorboard


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def step_metrics(loss, **more):
    return {"loss": jnp.float32(loss), **{name: jnp.float32(value) for name, value in more.items()}}


def test_a_line_every_few_steps_is_the_mean_since_the_last(tmp_path):
    with Metrics(tmp_path, 5, log_every=2, samples_per_step=8) as metrics:
        for step, (loss, image) in enumerate([(5, 1), (4, float("nan")), (3, 2), (2, 4), (1, 1)], start=1):
            metrics.push(step, step_metrics(loss, image=image))
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 4]
    assert [line["loss"] for line in written] == [5.0, 4.0, 2.5]
    assert "image" not in written[1]  # nothing was counted there: no NaN in the file, no zero either
    assert written[2]["image"] == 3.0
    assert all(line["samples_per_s"] > 0 for line in written)


def test_compiling_is_said_and_is_no_part_of_the_pace(tmp_path, capfd, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])

    def step(state, batch):
        assert compiling() is (len(batch) not in compiled)
        clock[0] += 100.0 if len(batch) not in compiled else 0.0
        compiled.add(len(batch))
        return state

    compiled, metrics = set(), Metrics(tmp_path, 12, log_every=2)
    announced = Announced(step, "the step", metrics)
    for number, length in enumerate((4, 4, 4, 6, 6, 4), start=1):
        announced(None, np.zeros(length))
        clock[0] += 1.0
        metrics.push(number, step_metrics(1.0))
    clock[0] += 1.0
    metrics.flush()
    assert "00:06 left" in metrics._bar.postfix
    metrics.close()
    assert not compiling()
    shown = capfd.readouterr().err
    assert shown.count("compiling the step, once before it first runs") == 1
    assert shown.count("compiling the step, anew for batches of another length") == 1
    assert shown.count("the step is compiled (100 s)") == 2


def test_values_are_read_one_step_late(tmp_path):
    class Watched:
        read = False

        def __array__(self, dtype=None, copy=None):
            self.read = True
            return np.asarray(1.0, dtype)

    first, second = Watched(), Watched()
    metrics = Metrics(tmp_path, 2)
    metrics.push(1, {"loss": first})
    assert not first.read
    metrics.push(2, {"loss": second})
    assert first.read and not second.read
    assert metrics.flush() == {"loss": 1.0}
    assert metrics.flush() is None
    metrics.close()


@pytest.mark.parametrize("where", ["/runs/a/checkpoints/00000003", None])
def test_divergence_names_step_losses_and_checkpoint(tmp_path, where):
    metrics = Metrics(
        tmp_path, 9, last_checkpoint=lambda: where, samples=lambda step: [step, 17] if where else ()
    )
    metrics.push(4, step_metrics(float("nan"), text=2.5))
    with pytest.raises(TrainingDiverged) as error:
        metrics.push(5, step_metrics(1.0))
    message = str(error.value)
    assert "step 4" in message and "loss=nan" in message and "text=2.5" in message
    assert (where or "no checkpoint was saved yet") in message
    samples = "samples of this step, by their places in the training data from 0: 4 17; "
    assert (samples in message) is bool(where)
    metrics.push(6, step_metrics(1.0, image=float("inf")))
    with pytest.raises(TrainingDiverged, match="image not finite"):
        metrics.close()
    assert not lines(tmp_path)


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 9)

    class Full:
        name = str(tmp_path / "metrics.jsonl")

        def write(self, line):
            raise OSError(28, "No space left on device")

        flush = close = write

    metrics._writer._lines = Full()
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        metrics.write(1, {"loss": 1.0})


def test_an_error_in_the_loop_is_not_replaced_by_the_pending_step(tmp_path):
    with pytest.raises(KeyError, match="broken"), Metrics(tmp_path, 2) as metrics:
        metrics.push(1, step_metrics(float("nan")))
        raise KeyError("broken")


def test_resuming_drops_lines_of_steps_that_are_done_again(tmp_path):
    with Metrics(tmp_path, 9, log_every=1) as metrics:
        for step in (1, 2, 3):
            metrics.push(step, step_metrics(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off when the machine went away
    with Metrics(tmp_path, 9, first_step=2, log_every=1) as metrics:
        metrics.push(3, step_metrics(30))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_pauses_do_not_count_in_the_rate(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 3, log_every=1, samples_per_step=8) as metrics:
        metrics.push(1, step_metrics(1))
        now[0] += 2.0
        metrics.flush()
        with metrics.paused():
            now[0] += 100.0
        metrics.push(2, step_metrics(1))
        now[0] += 4.0
    assert [line["samples_per_s"] for line in lines(tmp_path)] == [4.0, 2.0]


def test_the_time_left_is_that_of_steps_without_the_one_that_compiles(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    with Metrics(tmp_path, 60, first_step=10, log_every=2) as metrics:
        shown = []
        for step, seconds in ((11, 118.0), (12, 2.0), (13, 4.0)):
            metrics.push(step, step_metrics(1))
            now[0] += seconds
            metrics.flush()
            shown.append(metrics._bar.postfix)
            with metrics.paused():
                now[0] += 50.0
    assert "left" not in shown[0]
    assert [text.split(" left")[0] for text in shown[1:]] == ["01:36", "02:21"]  # 48 steps of 2, 47 of 3 s


def test_validation_lines_and_images(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with Metrics(tmp_path, 9) as metrics:
        metrics.write(5, {"caption": 0.25}, prefix="validation/")
        path = metrics.image(5, "grid", pixels)
    assert lines(tmp_path)[0]["validation/caption"] == 0.25
    assert path == tmp_path / "images" / "grid_000005.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_inactive_process_checks_but_writes_nothing(tmp_path):
    metrics = Metrics(tmp_path / "w", 9, active=False)
    metrics.write(1, {"a": 1.0})
    metrics.push(1, step_metrics(float("inf")))
    with pytest.raises(TrainingDiverged):
        metrics.flush()
    metrics.close()
    assert not (tmp_path / "w").exists()


def test_due():
    assert [step for step in range(1, 8) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(4))


def test_without_tensorflow_one_notice_and_the_run_goes_on(tmp_path, monkeypatch, caplog, capfd):
    def missing(name, *args, **kwargs):
        if name == "tensorflow":
            os.write(2, b"a banner of C++")
            raise ModuleNotFoundError("No module named 'tensorflow'")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(metrics_module, "_open_tensorboard", OPEN_TENSORBOARD)
    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level("WARNING", logger="absl"), Metrics(tmp_path, 3, log_every=1) as metrics:
        for step in (1, 2):
            metrics.push(step, step_metrics(1.0))
    notices = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert len(notices) == 1 and "minigpt5_jax[metrics]" in notices[0]
    assert len(lines(tmp_path)) == 2
    assert "banner" not in capfd.readouterr().err


TENSORBOARD = """
import sys
import numpy as np
from minigpt5_jax.training.metrics import Metrics
assert "tensorflow" not in sys.modules and "clu" not in sys.modules
with Metrics(sys.argv[1], 2, log_every=1) as metrics:
    metrics.push(1, {"loss": np.float32(0.5)})
    metrics.image(1, "grid", np.zeros((4, 4, 3), np.uint8))
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1] + "/tensorboard")
events.Reload()
tags = events.Tags()
from tensorflow import make_ndarray
print([float(make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")], sorted(tags["tensors"]))
"""


def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    """In a process of its own: TensorFlow comes late, and not into the other tests."""
    pytest.importorskip("tensorboard")
    done = subprocess.run(
        [sys.executable, "-c", TENSORBOARD, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.5] ['grid', 'loss', 'samples_per_s']"


# ------------------------------------------------------------------------------------- trackers


def test_a_tracker_takes_what_is_written(tmp_path, monkeypatch):
    """W&B's calls, by a stand-in: offline and without its package."""
    said = []

    class Run:
        def log(self, values, step):
            said.append((step, values))

        def finish(self):
            said.append("finished")

    fake = types.ModuleType("wandb")
    fake.Image = lambda image: image.shape
    fake.init = lambda **given: said.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    check_tracker("wandb")
    tracker = open_tracker("wandb", "mine", tmp_path, {"run": {"seed": 1}})
    with Metrics(tmp_path, 2, log_every=1, tracker=tracker) as metrics:
        metrics.push(1, step_metrics(5, image=float("nan")))
        metrics.flush()
        metrics.image(1, "held_out", np.zeros((2, 3, 3), np.uint8))
    opened, (step, values), picture, end = said
    assert (opened["name"], opened["config"]) == ("mine", {"run": {"seed": 1}})
    assert step == 1 and values["loss"] == 5.0 and "image" not in values
    assert picture == (1, {"held_out": (2, 3, 3)}) and end == "finished"


def test_a_tracker_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_tracker.py").write_text(
        "class Mine:\n"
        "    scalars = image = close = print\n"
        "def open_tracker(name, workdir, config):\n"
        "    mine = Mine()\n"
        "    mine.given = name, config\n"
        "    return mine\n"
    )
    (tmp_path / "no_tracker.py").touch()
    check_tracker("my_tracker")
    assert open_tracker("my_tracker", "run", tmp_path, {}).given == ("run", {})
    with pytest.raises(TrackerError, match=r"no function open_tracker\(name, workdir, config\)"):
        check_tracker("no_tracker")


def test_a_tracker_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    config = get_config()
    config.run.update(tracker="wandb", workdir=str(tmp_path / "run"))
    with pytest.raises(
        TrackerError, match="needs the package wandb .*`pip install wandb`, or run.tracker=none"
    ):
        make_loop(config)
    assert not (tmp_path / "run").exists(), "refused before anything is made"
    check_tracker("none")
    assert open_tracker("none", "", tmp_path, {}) is None
