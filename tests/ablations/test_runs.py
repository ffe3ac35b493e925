"""Which rows the ablations have and how they are run, on a faked trainer and judge."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.ablations import __main__ as command
from benchmarks.ablations import page, paper, rows, work
from benchmarks.ablations.rows import STAGE1, STAGE2, VARIANTS, Row, RowError, plan
from tiny import run_file


def test_rows_are_the_variants_of_the_configuration_file():
    ours = {variant: "stage1" for variant in STAGE1} | {variant: "stage2" for variant in STAGE2}
    # eight vokens are the plain run
    assert {n: s for n, s in ours.items() if n != "plain"} == {
        n: s for n, s in run_file("ablations").ROWS.items() if n != "vokens_8"
    }
    plain = rows.variant_config(Row("plain"), argparse.Namespace(steps=None, story_steps=None))
    assert plain.model.backbone.num_vokens == paper.VOKENS["plain"] == 8


def test_needs_come_first_and_one_seed_after_the_other():
    planned = plan(["guidance_15", "lora", "no_cap"], [1, 0, 1])
    assert [(row.variant, row.seed) for row in planned] == [
        (variant, seed) for seed in (1, 0) for variant in ("plain", "no_cap", "lora", "guidance_15")
    ]
    for position, row in enumerate(plan(VARIANTS, [0])):
        assert row.need is None or plan(VARIANTS, [0]).index(row.need) < position
    assert Row("no_stage1").need is None and Row("prefix").need == Row("plain")
    with pytest.raises(RowError, match="unknown row 'vokens_3'; known: plain"):
        plan(["vokens_3"], [0])


def test_steps_scale_the_warm_up_and_settings_name_what_numbers_depend_on():
    options = argparse.Namespace(steps=None, story_steps=None, pairs=20, stories=5)
    whole = rows.variant_config(Row("no_cap"), options)
    options.steps = whole.run.num_steps // 5
    fifth = rows.variant_config(Row("no_cap"), options)
    assert fifth.optimizer.warmup_steps == round(whole.optimizer.warmup_steps / 5) > 0
    settings = rows.row_settings(Row("no_cap", 3), options, "hash")
    assert settings["config"]["loss.caption"] == 0.0 and settings["config"]["run.seed"] == 3
    assert settings["judge"] == {"seed": 3, "pairs": 20, "native": False}
    assert "run.save_every" not in settings["config"]  # it changes no number
    command = work.train_command(Row("no_cap", 3), settings, Path("w"))
    assert command[-3:] == [
        "--config.run.seed=3",
        f"--config.run.num_steps={options.steps}",
        f"--config.optimizer.warmup_steps={fifth.optimizer.warmup_steps}",
    ]
    lora = rows.row_settings(Row("lora"), options, "hash")
    assert lora["from"]["run.num_steps"] == options.steps != lora["config"]["run.num_steps"]
    sweep = rows.row_settings(Row("guidance_7.5"), options, "hash")
    assert sweep["judge"]["guidance"] == 7.5 and "config" not in sweep and sweep["from"] == lora["from"]
    zero_shot = rows.row_settings(Row("zero_shot"), options, "hash")
    stage2 = rows.variant_config(Row("lora"), options).inference.guidance_scale
    assert zero_shot["judge"]["guidance"] == stage2 and "guidance" not in lora["judge"]
    options.steps = 1
    assert rows.variant_config(Row("plain"), options).optimizer.warmup_steps == 0


class Machine:
    """Stands in for the trainer and the judge: notes what is run, can fail or be stopped at a row."""

    def __init__(self):
        self.ran, self.fails, self.stops = [], set(), set()

    def __call__(self, line):
        line = list(line)
        flag = lambda name: line[line.index(name) + 1]  # noqa: E731
        if line[1] == "minigpt5_jax.train":
            folder, [steps] = (
                Path(flag("--workdir")),
                [int(word.partition("=")[2]) for word in line if word.startswith("--config.run.num_steps=")],
            )
            self.ran.append(("train", folder.name, line))
            if folder.name in self.fails:
                raise RowError("ended with status 1")
            if folder.name in self.stops:
                raise KeyboardInterrupt
            (folder / "checkpoints" / f"{steps:08d}").mkdir(parents=True, exist_ok=True)
            lines = [
                {"step": 1, "loss": 2.0},
                {"step": steps, "loss": 1.0, "text": 3.0},
                {"step": steps, "validation/caption": 0.5},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
            return
        assert line[1] == "minigpt5_jax.evaluation.shapes" and list(
            Path(flag("--run"), "checkpoints").iterdir()
        )
        self.ran.append(("judge", Path(flag("--out")).parent.name, line))
        Path(flag("--out")).write_text(json.dumps({"result": {}, "step": 7}))

    def names(self, what):
        return [name for kind, name, _ in self.ran if kind == what]


@pytest.fixture
def machine(monkeypatch):
    """The faked trainer and judge; backbones and plots are left alone."""
    fake = Machine()
    monkeypatch.setattr(work, "run_command", fake)
    monkeypatch.setattr(work, "git_revision", lambda: "0123")
    monkeypatch.setattr(work, "machine", lambda: "a machine")
    monkeypatch.setattr(command, "assets_hash", lambda: "hash")
    monkeypatch.setattr(page, "draw", lambda path, *args, **kwargs: path.write_bytes(b"png"))
    return fake


@pytest.fixture
def call(tmp_path, machine):
    """``call("--rows", "plain")`` in folders of its own."""
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "shapes")]
    return lambda *argv: command.main([*folders, *argv])


def test_a_row_is_trained_judged_and_written(tmp_path, machine, call):
    call("--rows", "lora,guidance_3", "--steps", "40", "--story_steps", "30", "--pairs", "8")
    assert machine.names("train") == ["plain_seed0", "lora_seed0"]
    assert machine.names("judge") == ["plain_seed0", "lora_seed0", "guidance_3_seed0"]
    line = machine.ran[2][2]
    assert "configs/ablations.py:shapes,lora" in line and "--config.run.num_steps=30" in line
    assert f"--config.run.init_from={tmp_path / 'work/plain_seed0/checkpoints'}" in line
    judged = {name: " ".join(line[2:]) for kind, name, line in machine.ran if kind == "judge"}
    run = f"--run {tmp_path / 'work/plain_seed0'} --what pairs --count 8 --seed 0"
    assert judged["plain_seed0"].startswith(f"{run} --native --out ")
    assert judged["guidance_3_seed0"].startswith(f"{run} --inference guidance_scale=3 --native --out ")
    assert f"--run {tmp_path / 'work/lora_seed0'} --what stories --count 60 " in judged["lora_seed0"]
    written = json.loads((tmp_path / "shapes/plain_seed0.json").read_text())
    assert written["training"] == {
        "step": 7,
        "losses": {"loss": 1.0, "text": 3.0},
        "validation": {"caption": 0.5},
    }
    assert written["command"].startswith("python -m minigpt5_jax.train --config configs/ablations.py:shapes ")
    assert written["settings"]["judge"] == {"seed": 0, "pairs": 8, "native": True}
    assert json.loads((tmp_path / "shapes/guidance_3_seed0.json").read_text())["command"] is None
    assert (tmp_path / "shapes.md").read_text().startswith("# The paper's ablations")


def test_rows_of_a_seed_share_the_drawn_files(tmp_path, machine, call):
    call("--rows", "no_cap,lora", "--steps", "40")
    plain, no_cap, lora = ((tmp_path / f"work/{v}_seed0/data").resolve() for v in ("plain", "no_cap", "lora"))
    assert plain == no_cap != lora and plain.parent == tmp_path / "work" and plain.is_dir()
    call("--rows", "plain", "--seeds", "1", "--steps", "40")
    assert (tmp_path / "work/plain_seed1/data").resolve() not in (plain, lora)


def test_what_is_there_is_not_run_again_and_a_stopped_row_goes_on(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    machine.stops = {"no_cap_seed0"}
    with pytest.raises(KeyboardInterrupt):
        call("--rows", "plain,no_cap", "--steps", "40")
    assert not (tmp_path / "shapes/no_cap_seed0.json").exists()
    note = json.loads((tmp_path / "work/no_cap_seed0/row.json").read_text())
    (tmp_path / "work/no_cap_seed0/row.json").write_text(json.dumps({**note, "seconds": 100.0}))
    (tmp_path / "work/no_cap_seed0/kept").touch()
    machine.stops = set()
    call("--rows", "plain,no_cap", "--steps", "40")
    assert machine.names("train") == ["plain_seed0", "no_cap_seed0", "no_cap_seed0"]
    assert (tmp_path / "work/no_cap_seed0/kept").exists()  # the trainer found its folder as it left it
    seconds = json.loads((tmp_path / "shapes/no_cap_seed0.json").read_text())["seconds"]
    assert seconds["training"] >= 100.0
    before = len(machine.ran)
    call("--rows", "plain,no_cap", "--steps", "40")
    assert len(machine.ran) == before


def test_results_of_other_settings_are_refused_before_anything_runs(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    with pytest.raises(RowError, match=r"run\.num_steps: 40 there, 50 now(.|\n)*--force"):
        call("--rows", "no_cap,plain", "--steps", "50")
    assert machine.names("train") == ["plain_seed0"]
    (tmp_path / "work/plain_seed0/old").touch()
    call("--rows", "no_cap,plain", "--steps", "50", "--force")
    assert machine.names("train") == ["plain_seed0", "plain_seed0", "no_cap_seed0"]
    assert not (tmp_path / "work/plain_seed0/old").exists()
    # Another count needs another judgement, not another training.
    with pytest.raises(RowError, match=r"judge\.pairs: 200 there, 9 now"):
        call("--rows", "plain", "--steps", "50", "--pairs", "9")
    call("--rows", "plain", "--steps", "50", "--pairs", "9", "--force")
    assert machine.names("train").count("plain_seed0") == 2 and machine.names("judge")[-1] == "plain_seed0"
    assert json.loads((tmp_path / "shapes/plain_seed0.json").read_text())["settings"]["judge"]["pairs"] == 9


def test_rows_with_other_settings_are_listed_as_done(machine, call, capsys, tmp_path):
    call("--rows", "plain", "--steps", "40")
    capsys.readouterr()
    call("--rows", "plain,no_cap", "--steps", "50", "--list")
    _, plain, no_cap, remedy = capsys.readouterr().out.splitlines()
    assert plain.split()[:2] == ["plain_seed0", "40"] and "done with other settings" in plain
    assert no_cap.split()[:2] == ["no_cap_seed0", "50"] and no_cap.endswith("to run")
    assert "refused" not in plain and "--results FOLDER" in remedy
    call("--rows", "plain", "--steps", "50", "--work", str(tmp_path / "w"), "--results", str(tmp_path / "r"))
    assert machine.names("train") == ["plain_seed0", "plain_seed0"], "as the remedy says"


def test_another_seed_must_have_the_same_settings(machine, call):
    call("--rows", "plain", "--steps", "40")
    with pytest.raises(RowError, match=r"row plain_seed1: .*plain_seed0.json is of other settings"):
        call("--rows", "plain", "--seeds", "1", "--steps", "50")
    call("--rows", "plain", "--seeds", "1", "--steps", "40")
    assert machine.names("train") == ["plain_seed0", "plain_seed1"]


def test_a_row_begun_with_other_settings_is_refused(machine, call):
    machine.stops = {"plain_seed0"}
    with pytest.raises(KeyboardInterrupt):
        call("--rows", "plain", "--steps", "40")
    machine.stops = set()
    with pytest.raises(RowError, match=r"plain_seed0 is of other settings(.|\n)*40 there, 50 now"):
        call("--rows", "plain", "--steps", "50")
    call("--rows", "plain", "--steps", "40")


def test_a_need_without_its_checkpoint_is_named(tmp_path, machine, call):
    call("--rows", "plain", "--steps", "40")
    call("--list", "--work", str(tmp_path / "elsewhere"), "--steps", "40")
    with pytest.raises(RowError, match="row plain_seed0: lora_seed0 needs its checkpoint, which is not in"):
        call("--rows", "lora", "--steps", "40", "--work", str(tmp_path / "elsewhere"))
    assert machine.names("train") == ["plain_seed0"]
    call("--rows", "lora", "--steps", "40", "--work", str(tmp_path / "elsewhere"), "--force")
    assert machine.names("train") == ["plain_seed0", "plain_seed0", "lora_seed0"]


def test_a_failed_row_stops_only_those_that_need_it(tmp_path, machine, call, capsys):
    machine.fails = {"plain_seed0"}
    with pytest.raises(RowError, match="2 rows failed: plain_seed0, lora_seed0"):
        call("--rows", "lora,no_cap", "--steps", "40")
    assert machine.names("judge") == ["no_cap_seed0"]
    assert "not run, because plain_seed0 failed" in capsys.readouterr().err
    assert "no_cap, seed 0" in (tmp_path / "shapes.md").read_text()


def test_a_foreign_folder_is_left_alone(tmp_path, machine, call):
    (tmp_path / "work/plain_seed0").mkdir(parents=True)
    (tmp_path / "work/plain_seed0/thesis.txt").touch()
    with pytest.raises(RowError, match="holds something that is no row"):
        call("--rows", "plain", "--force")
    assert (tmp_path / "work/plain_seed0/thesis.txt").exists() and not machine.ran


@pytest.mark.parametrize("flag", ["--steps", "--story_steps", "--pairs", "--stories"])
def test_counts_are_at_least_one(flag, machine, call, capsys):
    with pytest.raises(SystemExit):
        call("--rows", "plain", flag, "0")
    assert f"{flag}: invalid count value: '0'" in capsys.readouterr().err and not machine.ran


def test_what_is_not_installed_is_told_before_anything_runs(machine, call, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find(name) if name != "rouge_score" else None
    )
    with pytest.raises(RowError, match=r"rouge_score not installed: pip install 'minigpt5_jax\[results\]'"):
        call("--rows", "lora")
    assert not machine.ran
